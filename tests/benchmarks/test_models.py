"""Benchmarks of networks, of the step, and of both beside the published code."""

import json
import math
import re
from pathlib import Path
from statistics import mean

import pytest
import torch

from tests.benchmarks.peer import write_peer
from tests.benchmarks.running import SMALL, STEPS, TINY, Run, column, load, numbers, of_step, run_process, table
from tests.inference.checkpoint import SIZE, write_checkpoint
from vjepa_scale.demo.surprise import EVENTS
from vjepa_scale.demo.synthetic import World, write_videos

# -- models ------------------------------------------------------------------------------------------


def test_encoder(run: Run) -> None:
    sizes = ("--sizes", "48x1x2", "24x1x1", "--grids", "2x2x2", "2x4x4", "--repeats", 1, "--batch", 1)
    code, text, _ = run("encoder", *sizes)
    assert code == 0
    assert f"torch {torch.__version__}, cpu, float32, 1 threads, batch 1; ms, ours / transformers" in text
    rows = table(text)
    (first, *_) = rows[0]
    assert first.split() == ["width", "depth", "tokens"]
    assert [row[first].split() for row in rows] == [
        [width, "1", tokens] for width in ("48", "24") for tokens in ("8", "32")
    ]
    for row in rows:
        for name in ("forward", "forward + backward"):
            ours, theirs, quotient = numbers(row[name])
            assert ours > 0
            assert quotient == pytest.approx(theirs / ours, abs=0.01 + 0.02 * theirs / ours**2)


def test_host(run: Run) -> None:
    code, text, _ = run("host", "--model", "vit_tiny", "--ranks", 4, "--repeats", 1, *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, rank 1 of 4, torch ")
    rows = table(text)
    assert [row[""] for row in rows] == ["optimiser", "plan", "rank", "tables"]
    column(rows, "the first way")
    for row in rows:
        assert numbers(row["this code"])[0] >= 0


def test_watching(run: Run) -> None:
    code, text, _ = run("watching", "--steps", 2, *SMALL, "pretrain.clip.size=32", "engine.threads=1")
    assert code == 0
    rows = table(text)
    assert [row["step"] for row in rows] == ["plain", "counted", "measured", "mean, measured every 10"]
    plain, counted, measured, usual = column(rows, "ms")
    assert usual == pytest.approx(counted + (measured - counted) / 10, abs=0.02)
    assert numbers(rows[2]["over plain"])[0] == pytest.approx(100 * (measured / plain - 1), abs=0.2)


@pytest.mark.slow
def test_collapse(tmp_path: Path) -> None:
    """A run of twelve steps; whether all variants are judged as they should be is for the script's own sizes."""
    sizes = ("--seeds", 5, "--steps", 12, "--clips", 16, "--data", tmp_path / "data", "--out", tmp_path / "runs")
    only = ("--only", "target equals encoder", "--")
    text = run_process("collapse", *sizes, *only, *SMALL, "data.workers=0", "log.effective_rank_every=1")
    assert "target equals encoder, seed 5: flagged at step 2 by collapse/distance" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("  collapse/distance ")]
    assert line == ["collapse/distance", "0", "to", "0", "limit", "1e-08"]


def test_surprise(run: Run, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    list(write_videos(tmp_path / "videos", World(size=SIZE, fps=8, seconds=2.0), seed=0, train=1, val=0, workers=1))
    sizes = ("--world", tmp_path / "videos", "--pairs", len(EVENTS), "--seeds", 1000, 1001)
    code, text, _ = run("surprise", model, *sizes)
    assert code == 0
    head = ["", "all", "of each seed", *EVENTS, "by the maximum", "untrained"]
    rows = [row for row in table(text) if row["all"] != "---"]
    assert [list(row) for row in rows] == [head]
    assert rows[0][""] == str(model)
    share, error = numbers(rows[0]["all"])
    each, kinds = numbers(rows[0]["of each seed"]), [numbers(rows[0][event])[0] for event in EVENTS]
    assert all(0 <= value <= 1 for value in [share, *each, *kinds])
    assert share == pytest.approx(mean(each), abs=0.011)
    assert share == pytest.approx(mean(kinds), abs=0.011)
    assert error == pytest.approx(math.sqrt(share * (1 - share) / (2 * len(EVENTS))), abs=0.011)


def test_surprise_has_no_model(run: Run, tmp_path: Path) -> None:
    code, _, err = run("surprise", tmp_path / "none")
    assert code == 2
    assert str(tmp_path / "none") in err


@pytest.mark.slow
def test_step(run: Run) -> None:
    code, text, _ = run("step", *TINY, *STEPS, "--attention", "sdpa", "flash", *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, 4 frames of 32×32, 1 clips a step; fsdp, float32, ")
    first, second = of_step(text, clips=1)
    assert [(row["compile"], row["code"]) for row in (first, second)] == [("off", "ours")] * 2
    assert first["attention"] != second["attention"]


def test_a_steps_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts its readings: what runs inside a part and has a part of its own is counted once."""
    module = load("clock")
    readings = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(readings) / 1000)
    clock = module.Clock(torch.device("cpu"))
    network = torch.nn.Identity()
    clock.watch("target", network)

    class Owner:
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return network(network(x))

    owner = Owner()
    clock.time_method("backward", owner, "step")
    for _ in range(2):  # nothing stays from the step before
        row = clock.whole(lambda: owner.step(torch.zeros(1)), parts=True)
        # Readings: whole, backward, twice target's two, backward, whole.
        assert row == {"target": 2.0, "backward": 3.0, "rest": 2.0, "step": 7.0}
    assert clock.whole(lambda: owner.step(torch.zeros(1)), parts=False)["step"] == 7.0


def test_step_beside_the_published_code(run: Run, peer: Path) -> None:
    code, text, _ = run("step", *TINY, *STEPS, "--peer", peer, *SMALL)
    assert code == 0
    rows = of_step(text, clips=1)
    assert [row["code"] for row in rows] == ["ours", "published"]
    assert rows[1]["attention"] == "its SDPA"
    # Both have target, context, predictor, optimiser and EMA: a part that nothing reaches would be 0.
    assert all(numbers(row[part])[0] > 0 for row in rows for part in ("target", "context", "predictor", "optimiser"))
    note = text.splitlines()[-1]
    factor, ours, theirs, apart, *last = numbers(note.partition("published step takes")[2].replace("float32", ""))
    our_ms, their_ms = column(rows, "step")
    assert factor == pytest.approx(their_ms / our_ms, abs=0.01 + 0.1 * their_ms / our_ms**2)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert apart <= 1e-5
    assert last[0] == pytest.approx(last[1], rel=1e-3)  # four steps of the same optimiser on the same clips


def test_a_peer_that_computes_another_loss_is_not_timed(run: Run, tmp_path: Path) -> None:
    other = write_peer(tmp_path / "other", factor=0.5)
    code, text, err = run("step", *TINY, *STEPS, "--peer", other, *SMALL)
    assert code == 2
    assert "published |" not in text
    assert re.search(r"--peer: the loss is [\d.]+ here and [\d.]+ there, from the same weights", err)


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("jepa.loss_exponent=2", "jepa.loss_exponent: 2.0"),
        ("model.rope.layout=interleaved", "model.rope.layout: interleaved"),
        ("pretrain.clip={frames: 4, size: [32, 48]}", "pretrain.clip.size: 32"),
    ],
)
def test_a_recipe_that_the_published_code_cannot_follow(run: Run, peer: Path, override: str, wrong: str) -> None:
    code, _, err = run("precision", *TINY, "--peer", peer, *SMALL, override)
    assert code == 2
    assert wrong in err


def test_a_folder_without_the_published_code(run: Run, tmp_path: Path) -> None:
    code, _, err = run("precision", *TINY, "--peer", tmp_path, *SMALL)
    assert code == 2
    assert f"{tmp_path}: no checkout of the published code" in err


def test_precision(run: Run, peer: Path) -> None:
    code, text, _ = run("precision", *TINY, "--peer", peer, *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, 4 frames of 32 px, gain 1, loss ")
    assert numbers(text.partition("loss ")[2])[0] > 0
    rows = {row["beside our float32"]: row for row in table(text) if row["loss"] != "---"}
    assert list(rows) == ["ours, bf16 by FSDP2", "published, float32", "published, autocast"]
    for name in ("targets", "largest", "gradient"):
        ours, exact, theirs = (numbers(row[name])[0] for row in rows.values())
        assert exact <= 1e-5  # the same, from the same weights
        # Eight bits of mantissa.
        assert 1e-4 < ours < 0.1
        assert 1e-4 < theirs < 0.1
    assert numbers(rows["published, float32"]["loss"])[0] <= 1e-5


@pytest.mark.slow
@pytest.mark.distributed
def test_gpu_beside_the_published_code(peer: Path, tmp_path: Path) -> None:
    run_process("gpu", "--device", "cpu", "--toy", "--part", "peer", "--peer", peer, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["ours", "published"] * 3
    assert {row["state"] for row in rows} == {"measured"}
    for row in rows:
        assert row["median_ms"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert theirs["facts"]["× our time"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])
        assert theirs["facts"]["same weights, float32: losses differ by"] <= 1e-5
        losses = [side["facts"]["loss of the last step"] for side in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
