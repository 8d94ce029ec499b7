"""Benchmark of checkpoints."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.running import SMALL, Run, column, numbers, table


def test_checkpoint_training(run: Run, tmp_path: Path) -> None:
    small = ("pretrain.global_batch=2", "pretrain.micro_batch=2", "masks.group=2", "engine.threads=1", *SMALL)
    alone = ("cooldown=null", "action=null", "probe=null")
    clip = "pretrain.clip={frames: 4, size: 32}"
    code, text, _ = run("checkpoint", "--saves", 2, "--skip-consolidation", "--dir", tmp_path, *small, *alone, clip)
    assert code == 0
    head, _, *lines = text.strip().splitlines()
    assert head.endswith("MB of tensors, 2 saves; median milliseconds")
    assert numbers(head)[0] >= 1
    found = {line[:36].strip(): numbers(line[36:])[0] for line in lines}
    assert list(found) == [
        "a step",
        "a save that training waits for",
        "a save in the background: the copy",
        "all that training waits",
        "beyond the copy, of a step",
        "a step while it is being written",
    ]
    assert all(value > 0 for name, value in found.items() if name != "beyond the copy, of a step")
    step, copy = found["a step"], found["a save in the background: the copy"]
    beyond = 100 * max(0.0, found["all that training waits"] - copy) / step
    assert found["beyond the copy, of a step"] == pytest.approx(beyond, abs=0.1 + 10 / step)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoint_consolidation(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("checkpoint", "--model", "vit_tiny", "--skip-training", "--dir", tmp_path)
    assert code == 0
    assert re.match(r"vit_tiny: a checkpoint of 0\.1 GB, written in \d+ s\n", text)
    rows = table(text)
    assert [row["to"] for row in rows] == ["safetensors", "huggingface"]
    column(rows, "seconds")
    column(rows, next(name for name in rows[0] if name.startswith("peak GiB")))
    assert not list(tmp_path.iterdir())
