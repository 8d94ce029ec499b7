"""The chain of stages on this machine: submitit's local executor for each, and our loop around it."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import submitit
import torch

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.launch.task import failure_folder, run_stage
from vjepa_scale.recipe import Recipe
from vjepa_scale.training.start import is_finished, stage_folder

FAILURE_GRACE_S = 15.0
INTERRUPT_GRACE_S = 3.0


class StageFailedError(RuntimeError):
    """A stage ended without its last checkpoint."""


def run_chain(recipe: Recipe, stages: list[str]) -> None:
    """Run stages one after the other, each as one submitit job; show rank 0's lines as they come.

    Raises UserError for what the user can mend, StageFailedError for everything else.
    """
    for stage in stages:
        if is_finished(recipe, stage):
            print(f"{stage} is already complete")
            continue
        run_one(recipe, stage)


def run_one(recipe: Recipe, stage: str) -> None:
    """One stage through submitit's local executor, to its end."""
    if recipe.launch.nodes > 1:
        raise UserError(
            f"{recipe.launch.nodes} nodes, but this is one machine",
            where="launch.nodes",
            fix="--cluster slurm, or launch.nodes=1",
        )
    for leftover in ("failures/*.json", "rendezvous/*"):  # a job's name is a process id, which may come again
        for stale in stage_folder(recipe, stage).glob(leftover):
            stale.unlink()
    logs = stage_folder(recipe, stage) / "logs"
    executor = submitit.LocalExecutor(folder=logs)
    tasks = recipe.launch.tasks_per_node
    gpus = [] if recipe.engine.device == "cpu" else _visible_gpus(os.environ)
    executor.update_parameters(
        tasks_per_node=tasks,
        gpus_per_node=len(gpus),  # submitit hides every GPU that is not asked for
        visible_gpus=gpus,
        timeout_min=recipe.launch.timeout_min,
    )
    job = executor.submit(run_stage, recipe, stage)
    print(f"{stage}: {tasks} processes, logs in {logs}/{job.job_id}_*", flush=True)
    try:
        _follow(job, failure_folder(recipe, stage))
    except KeyboardInterrupt:
        # Ctrl-C has reached the processes too; an interrupt of the launcher alone has not.
        time.sleep(INTERRUPT_GRACE_S)
        if not job.done():
            job.cancel()
        raise
    if not is_finished(recipe, stage):
        raise failure(recipe, stage, job, logs)


def _visible_gpus(environment: Mapping[str, str]) -> list[int]:
    """The GPUs that this process may use, by the numbers that CUDA_VISIBLE_DEVICES has for them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(torch.cuda.device_count()))
    numbers = [part.strip() for part in named.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"{named!r} is not a list of numbers", where="CUDA_VISIBLE_DEVICES", fix="for example 0,1")
    return [int(number) for number in numbers]


def _follow(job: submitit.Job, failures: Path) -> None:
    """Copy what rank 0 prints, and its warnings, to our own stdout until the job is over.

    Once a rank has failed, the others get a moment to say what they saw and are ended then: one that never
    reached the group would wait for its dead peer until ``engine.timeout_s``.
    """
    said = warned = 0
    deadline: float | None = None
    while True:
        over = job.done()
        warned = _copy_lines(Path(job.paths.stderr), warned, whole_lines=not over, only="warning: ")
        said = _copy_lines(Path(job.paths.stdout), said, whole_lines=not over)
        if over:
            return
        if deadline is None and any(failures.glob(f"{job.job_id}.*.json")):
            deadline = time.monotonic() + FAILURE_GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            job.cancel()
            deadline = None
        time.sleep(0.2)


def _copy_lines(log: Path, position: int, *, whole_lines: bool, only: str = "") -> int:
    """Print a log's lines that begin with ``only``, from a position on, without submitit's; returns where to go on."""
    if not log.exists():
        return position
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(position)
        for line in iter(file.readline, ""):
            if whole_lines and not line.endswith("\n"):
                break
            position = file.tell()
            if line.startswith(only) and not line.startswith("submitit "):
                print(line, end="", flush=True)
    return position


def failure(recipe: Recipe, stage: str, job: submitit.Job, logs: Path) -> Exception:
    """The error of the rank that knows most: a user's mistake first, then whoever is not just a bystander."""
    reports = [read_json(path) for path in sorted(failure_folder(recipe, stage).glob(f"{job.job_id}.*.json"))]
    for report in reports:
        if report["user_error"]:
            return UserError(report["message"])
    # A rank whose peer died sees a broken connection: less telling than the peer's own exception.
    reports.sort(key=lambda report: "DistBackendError" in report["kind"] or "gloo" in report["message"].lower())
    if not reports:
        return StageFailedError(f"{stage}: the processes ended without a word; see {logs}")
    worst = reports[0]
    first_line = worst["message"].partition("\n")[0]
    return StageFailedError(
        f"{stage}: rank {worst['rank']} failed with {worst['kind']}: {first_line}; "
        f"traceback in {failure_folder(recipe, stage)}, logs in {logs}"
    )
