"""The newcomer's command, on less data and for fewer steps."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.chain import launch, tool
from tests.report import browser


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    """``tools/demo.py WORDS``, whose commands run in this process and not in one each: ``make demo`` does the latter.

    Fewer pairs of videos are compared.
    """
    run = subprocess.run

    def command(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if options:
            return run(argv, **options)  # not the demo's
        name, words = Path(argv[1]).stem, argv[2:]
        done = launch(*words, check=False) if name == "launch" else tool(name, *words, check=False)
        print(done.stdout, done.stderr)
        return done

    with mock.patch("subprocess.run", command), mock.patch("vjepa_scale.demo.summary.SURPRISE_PAIRS", 5):
        return tool("demo", *words)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_runs_to_its_table_and_again(tmp_path: Path) -> None:
    shards = tmp_path / "data" / "shards"
    arguments = [
        "recipes/demo.yaml",
        f"run.dir={tmp_path / 'run'}",
        "engine.threads=1",
        *(f"data.sets.{name}.path={shards / folder}" for name, folder in (("synthetic", "train"), ("held_out", "val"))),
        f"data.sets.robot.path={shards / 'robot'}",
        "pretrain.steps=10",
        "cooldown.steps=4",
        "action.steps=10",
        "probe.steps=10",
        "probe.labels_per_class=1",
        "probe.global_batch=16",
        "probe.micro_batch=16",
        "--clips=176",
        "--val-clips=32",
        "--trajectories=8",
        "--episodes=3",
    ]
    done = demo(*arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps = {"pretrain": 10, "cooldown": 4, "action": 10, "probe": 10}
    assert {name: stage["steps"] for name, stage in summary["stages"].items()} == steps
    for name, stage in summary["stages"].items():
        assert stage["loss_start"] > 0
        assert stage["clips_per_s"] > 0
        assert (stage["effective_rank_end"] is None) == (name in ("action", "probe"))
    about = {"classes": 16, "labels_per_class": 10, "label_draws": 10, "held_out_clips": 32}
    assert summary["evaluation"] == about
    assert summary["chance"] == 1 / 16
    best = summary["best_checkpoint"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "pretrain" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["knn"] == max(row["knn"] for row in rows)].count(best["step"]) == 1
    assert {row["step"] for row in rows} == {1, 10}  # the ends of phases
    assert f"best checkpoint  of 2 of pretrain: that of step {best['step']}," in done.stdout
    for probe in (summary, summary["parts"]["shape"], summary["parts"]["motion"]):
        for measure in ("linear_probe", "knn"):
            assert probe[measure].keys() == {"trained", "untrained", "pixels"}
            assert all(0 <= accuracy <= 1 for accuracy in probe[measure].values())
            assert all(spread >= 0 for spread in probe[f"{measure}_std"].values())
    assert summary["probe"] == summary["linear_probe"]
    assert summary["attentive_probe"].keys() == {"trained", "untrained"}
    assert all(len(found["draws"]) == 5 for found in summary["attentive_probe"].values())
    assert all(0 <= share <= 1 for share in summary["controls"].values())
    planning = summary["planning"]
    assert planning["episodes"] == 3
    assert all(planning[policy] in (0, 1 / 3, 2 / 3, 1) for policy in ("success", "random", "still"))
    assert planning["still"] == 0  # every goal is farther away than its radius
    for line in ("$ python tools/make_shards.py", "$ python tools/launch.py", "trained  ", "untrained  ", "pixels  "):
        assert line in done.stdout
    for picture in ("landscape.png", "episode.png", "masks.png", "features.png"):
        assert (tmp_path / "run" / "pictures" / picture).read_bytes().startswith(b"\x89PNG")
    report = tmp_path / "run" / "report.html"
    assert f"{report} " in done.stdout
    with contextlib.ExitStack() as stack:
        if os.environ.get("CI") or not browser.missing():
            assert browser.problems_of(stack.enter_context(browser.chromium()), report) == []
    # A second run finds everything there and measures the same, also where the consolidated result is of another
    # checkpoint.
    shutil.rmtree(tmp_path / "run" / "consolidated")
    tool("consolidate", tmp_path / "run" / "pretrain", "--out", tmp_path / "run" / "consolidated")
    again = demo(*arguments)
    assert "already complete" in again.stdout
    repeated = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("linear_probe", "attentive_probe", "controls", "planning"):
        assert repeated[name] == summary[name]
