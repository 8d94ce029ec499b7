"""The newcomer's command, on less data and for fewer steps."""

import json
import shutil
from pathlib import Path

import pytest

from tests.chain import tool


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_runs_to_its_table_and_again(tmp_path: Path) -> None:
    arguments = [
        "recipes/demo.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"data.sets.synthetic.path={tmp_path / 'data' / 'shards' / 'train'}",
        "pretrain.steps=10",
        "cooldown.steps=4",
        "--clips=192",
        "--val-clips=64",
    ]
    done = tool("demo", *arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stages"]["pretrain"]["steps"] == 10
    assert summary["stages"]["cooldown"]["steps"] == 4
    for stage in summary["stages"].values():
        assert stage["loss_start"] > 0
        assert stage["clips_per_s"] > 0
        assert 1 < stage["effective_rank_end"] < 128
    assert summary["evaluation"] == {"classes": 16, "labels_per_class": 10, "held_out_clips": 64}
    assert summary["chance"] == 1 / 16
    for probe in (summary, summary["parts"]["shape"], summary["parts"]["motion"]):
        for measure in ("linear_probe", "knn"):
            assert probe[measure].keys() == {"trained", "untrained", "pixels"}
            assert all(0 <= accuracy <= 1 for accuracy in probe[measure].values())
    for line in ("$ python tools/make_shards.py", "$ python tools/launch.py", "trained  ", "untrained  ", "pixels  "):
        assert line in done.stdout
    # A second run finds everything there and measures the same, also where the consolidated result is of another
    # checkpoint.
    shutil.rmtree(tmp_path / "run" / "consolidated")
    tool("consolidate", tmp_path / "run" / "pretrain", "--out", tmp_path / "run" / "consolidated")
    again = tool("demo", *arguments)
    assert "already complete" in again.stdout
    repeated = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert repeated["linear_probe"] == summary["linear_probe"]
