"""A run folder whose files are written by hand, and what Slurm and processes answer about its jobs."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chain import write_recipe
from vjepa_scale.checkpoint.manifest import describe_file, write_manifest
from vjepa_scale.monitor.jobs import (
    JobState,
    SlurmUnavailable,
    process_facts,
)
from vjepa_scale.monitor.states import RunStatus, StageStatus
from vjepa_scale.monitor.status import as_json, read_status, render

# The chain's stages: pretrain has steps 0 to 11, cooldown 12 to 17. 8 clips per step.


class Run:
    """A run folder whose files are written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, time.time()
        write_recipe(folder / "recipe.yaml", folder, {"left": folder / "no", "right": folder / "data"})

    def add(self, stage: str, event: str, *, ago: float = 100.0, **values: Any) -> None:
        path = self.folder / stage / "history.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({"time": self.now - ago, "event": event, **values}) + "\n")

    def submit(
        self, stage: str, *, job: str = "100", cluster: str = "slurm", ago: float = 1000.0, **values: Any
    ) -> None:
        name, launch = f"run-{stage}", str(self.folder / "launches" / "0001")
        self.add(stage, "submitted", ago=ago, cluster=cluster, job_id=job, name=name, launch=launch, **values)

    def start(self, stage: str, *, job: str = "100", restart: int = 0, step: int = 0, ago: float = 900.0) -> None:
        kind = "resume" if step not in (0, 12) else "fresh" if step == 0 else "continue"
        self.add(
            stage, "started", ago=ago, job=f"{job}.0-{restart}", job_id=job, host="n1", kind=kind, step=step, repeated=0
        )

    def fail(self, stage: str, *, restart: int = 0, step: int | None = 7, ago: float = 80.0, **values: Any) -> None:
        job = {"job": f"100.*-{restart}", "job_id": "100"}
        log = self.folder / stage / "logs" / "100_1_log.err"
        row = {"kind": "ValueError", "message": "a bad\nclip", "rank": 1, "step": step, "user_error": False}
        self.add(stage, "failed", ago=ago, log=str(log), report=None, **(job | row | values))

    def train(self, stage: str, first: int, last: int, *, seconds: float = 2.0, ago: float = 0.0) -> None:
        path = self.folder / stage / "metrics.jsonl"
        phases = {"pretrain": lambda step: "warmup" if step < 5 else "constant", "cooldown": lambda step: "decay"}
        with open(path, "a") as file:
            for step in range(first, last):
                row = {"step": step, "stage": stage, "phase": phases[stage](step), "loss": 1 / (step + 1)}
                file.write(json.dumps(row | {"clips_per_s": 8 / seconds}) + "\n")
        os.utime(path, (time.time() - ago,) * 2)

    def save(self, stage: str, step: int) -> None:
        folder = self.folder / stage / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        tensors = folder / "__0_0.distcp"
        tensors.write_bytes(b"tensors")
        first = 0 if stage == "pretrain" else 12
        write_manifest(
            folder, step=step, world_size=1, files={tensors.name: describe_file(tensors)}, extra={"first": first}
        )
        self.add(stage, "saved", step=step)

    def finish(self, stage: str) -> None:
        end = 12 if stage == "pretrain" else 18
        self.start(stage, step=end - 6 if stage == "pretrain" else 12)
        self.save(stage, end)
        self.add(stage, "done", step=end)

    def look(self, ask: Callable[..., JobState | None] | JobState | None = None) -> RunStatus:
        """ask: what Slurm answers about every job, or the function that answers."""
        status = read_status(self.folder, ask=ask if callable(ask) else lambda job_id, name: ask)
        assert render(status).count("\n") >= len(status.stages)
        assert json.loads(as_json(status))["exit_code"] == status.exit_code
        return status

    def pretrain(self, ask: Callable[..., JobState | None] | JobState | None = None) -> StageStatus:
        return self.look(ask).stages[0]


def job(state: str, **values: Any) -> JobState:
    return JobState(job_id="100", name="run-pretrain", state=state, **({"restarts": 0} | values))


def no_answer(job_id: str, *, name: str | None = None) -> JobState | None:
    raise SlurmUnavailable("Unable to contact slurm controller")


def as_launcher(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    return process_facts(process.pid)


def plan_both(run: Run) -> None:
    launch = run.folder / "launches" / "0001"
    launch.mkdir(parents=True)
    facts = {"stages": ["pretrain", "cooldown"], "commit": "0123456789abcdef", "dirty": True}
    (launch / "source.json").write_text(json.dumps(facts))
