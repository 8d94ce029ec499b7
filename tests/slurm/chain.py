"""Runs of the tiny chain on a sandbox, and what they are compared with."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.chain import ROOT, checkpoint_tensors, metrics, tool, write_recipe
from tests.slurm.cluster import Cluster

TOOL = ROOT / "tools" / "launch.py"
NODES, TASKS = 2, 2


@dataclass
class Run:
    """One run folder, launched on a cluster by the command that users type."""

    cluster: Cluster
    folder: Path
    recipe: Path

    def command(self, *words: object) -> list[str]:
        return [sys.executable, str(TOOL), *map(str, words)]

    def tool(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``tools/launch.py WORDS`` as the cluster's user.

        In this process where that is who runs the tests: a start of Python with PyTorch costs 2.3 s of CPU.
        """
        if self.cluster.user is not None:
            return self.cluster.run(self.command(*words), check=check)
        with mock.patch.dict(os.environ, self.cluster.environment, clear=True):
            return tool("launch", *words, check=check)

    def launch(self, *words: object, check: bool = True) -> str:
        return self.tool(self.recipe, "--cluster", "slurm", *words, check=check).stdout

    def status(self) -> dict[str, Any]:
        """Stage name → what ``status --json`` says of it. The exit code is not looked at here."""
        said = self.tool("status", self.folder, "--json", check=False)
        return {stage["name"]: stage for stage in json.loads(said.stdout)["stages"]}

    def history(self, stage: str = "pretrain") -> list[dict[str, Any]]:
        path = self.folder / stage / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, *names: str, stage: str = "pretrain") -> list[dict[str, Any]]:
        return [row for row in self.history(stage) if row["event"] in names]

    def job_id(self, stage: str = "pretrain") -> str:
        return str(self.events("submitted", stage=stage)[-1]["job_id"])

    def steps(self, stage: str = "pretrain") -> int:
        """How many steps its metrics tell of."""
        path = self.folder / stage / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def make_run(cluster: Cluster, folder: Path, sets: dict[str, Path], name: str = "run", **sections: Any) -> Run:
    """A recipe for 2 nodes × 2 tasks, not yet launched. launch: merged over the usual.

    Without loader workers: their fork server is one more start of Python with PyTorch, 1.7 s of CPU for each rank.
    Where they matter, a test gives ``data={"workers": 1}``.
    """
    launch = {"nodes": NODES, "tasks_per_node": TASKS, "timeout_min": 30, **sections.pop("launch", {})}
    data = {"workers": 0, **sections.pop("data", {})}
    recipe = write_recipe(folder / f"{name}.yaml", folder / name, sets, launch=launch, data=data, **sections)
    return Run(cluster, folder / name, recipe)


def assert_same_training(found: Path, expected: Path, stage: str, step: int, scratch: Path) -> None:
    """Every row of the metrics (but for the time) and every bit of the last checkpoint are equal."""
    assert metrics(found, stage) == metrics(expected, stage)
    name = Path(stage, "checkpoints", f"step_{step:08d}")
    (scratch / "a").mkdir(exist_ok=True)
    (scratch / "b").mkdir(exist_ok=True)
    theirs, ours = checkpoint_tensors(expected / name, scratch / "a"), checkpoint_tensors(found / name, scratch / "b")
    assert theirs.keys() == ours.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in ours)
    assert any(key.startswith("target_encoder.") for key in ours)
    for key in theirs:
        assert torch.equal(theirs[key], ours[key]), f"{stage}: {key}"
