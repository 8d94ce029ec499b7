"""What became of a run: every stage's state, from its files and, where one can be asked, from Slurm.

The files say what a stage did, Slurm says whether its job still waits or runs. Where Slurm does not answer the
files alone are read, and the answer says so. Light: it does not import torch, so it answers at once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.monitor import jobs
from vjepa_scale.monitor.jobs import JobState, SlurmUnavailable
from vjepa_scale.monitor.stage_files import StageFiles
from vjepa_scale.monitor.stage_state import Ask, judge_stage, judge_stage_to_come, who_runs
from vjepa_scale.monitor.states import RunStatus, StageStatus
from vjepa_scale.recipe import Recipe, load_recipe, stages_of


def read_status(run_folder: Path, *, ask: Ask = jobs.slurm_job) -> RunStatus:
    """Look at a run. Raises UserError if there is none.

    ask: what is asked about a Slurm job, as jobs.slurm_job is
    """
    recipe = run_recipe(run_folder)
    problem: str | None = None
    stages: list[StageStatus] = []
    for stage in stages_of(recipe).values():
        files = StageFiles(stage)
        owner, job = "unknown", None
        if files.rows and not files.finished:
            try:
                owner, job = who_runs(files, ask)
            except SlurmUnavailable as error:
                problem, ask = str(error), _never_again(error)
        before = next((earlier for earlier in reversed(stages) if earlier.launch == files.status.launch), None)
        stages.append(judge_stage(files, owner, job, before=before, unanswered=problem is not None))
    submitted = [status for status in stages if status.submitted is not None]
    last = max(submitted, key=lambda status: status.submitted or 0.0, default=None)
    source = _source(run_folder, last.launch) if last is not None and last.launch is not None else {}
    if last is not None and last.cluster == "local":
        _judge_those_to_come(stages, last, source.get("stages", []))
    return RunStatus(
        run=str(run_folder),
        launched=min(status.submitted or 0.0 for status in submitted if status.launch == last.launch) if last else None,
        launch=last.launch if last else None,
        cluster=last.cluster if last else next((status.cluster for status in stages if status.cluster), None),
        commit=source.get("commit"),
        dirty=source.get("dirty"),
        problem=problem,
        stages=stages,
    )


def run_recipe(run_folder: Path) -> Recipe:
    """The recipe of a run, with run.dir as the run is addressed now. Raises UserError if it is no run."""
    if not (run_folder / "recipe.yaml").is_file():
        raise UserError(
            "not a run folder: it has no recipe.yaml" if run_folder.is_dir() else "no such folder",
            where=run_folder,
            fix="give the run.dir of a recipe that was launched",
        )
    return load_recipe(run_folder / "recipe.yaml", [f"run.dir={json.dumps(str(run_folder))}"])


def _never_again(error: SlurmUnavailable) -> Ask:
    """Instead of asking about further jobs: each question would wait for its time-out."""

    def ask(job_id: str, *, name: str | None) -> JobState | None:
        raise error

    return ask


def _judge_those_to_come(stages: Sequence[StageStatus], last: StageStatus, planned: Sequence[str]) -> None:
    """The local loop submits a stage when its turn comes: until then only the launch's own list names it."""
    before: StageStatus | None = None
    for stage in stages:
        if stage.name in planned:
            if stage.launch != last.launch and stage.state != "done":
                judge_stage_to_come(stage, before, last)
            before = stage


def _source(run_folder: Path, launch: str) -> dict[str, Any]:
    """What the launch wrote down about itself; empty where it did not."""
    try:
        told = read_json(run_folder / "launches" / launch / "source.json")
    except UserError:
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("stages", []), list) else {}
