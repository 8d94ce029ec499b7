"""The status of a run: every stage's state, from its files and from Slurm.

The files say what a stage did, Slurm says whether its job still waits or runs. If Slurm does not answer, only the
files are read, and the result says so. Light: it does not import torch, so it answers at once.
"""

import json
import math
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.core.installed import as_called
from vjepa_scale.monitor import jobs
from vjepa_scale.monitor.jobs import JobState, SlurmUnavailable
from vjepa_scale.monitor.stage_files import StageFiles
from vjepa_scale.monitor.stage_state import Ask, judge_stage, judge_stage_to_come, who_runs
from vjepa_scale.monitor.states import ALIVE, RunStatus, StageStatus, clock, duration
from vjepa_scale.recipe import Recipe, load_recipe, stages_of


def read_status(run_folder: Path, *, ask: Ask = jobs.slurm_job) -> RunStatus:
    """Read the status of a run. Raises UserError if there is none.

    ask: returns the state of a Slurm job, as jobs.slurm_job does
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
    source = launch_source(run_folder, last.launch) if last is not None and last.launch is not None else {}
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
    """The recipe of a run, with the present path as run.dir. Raises UserError if it is no run."""
    if not (run_folder / "recipe.yaml").is_file():
        raise UserError(
            "not a run folder: it has no recipe.yaml" if run_folder.is_dir() else "no such folder",
            where=run_folder,
            fix="give the run.dir of a recipe that was launched",
        )
    return load_recipe(run_folder / "recipe.yaml", [f"run.dir={json.dumps(str(run_folder))}"])


def _never_again(error: SlurmUnavailable) -> Ask:
    """Raises the same error for further jobs: each query would wait for its timeout."""

    def ask(job_id: str, *, name: str | None) -> JobState | None:
        raise error

    return ask


def _judge_those_to_come(stages: Sequence[StageStatus], last: StageStatus, planned: Sequence[str]) -> None:
    """The local loop submits a stage when the stage before is done: until then only the launch's list names it."""
    before: StageStatus | None = None
    for stage in stages:
        if stage.name in planned:
            if stage.launch != last.launch and stage.state != "done":
                judge_stage_to_come(stage, before, last)
            before = stage


def launch_source(run_folder: Path, launch: str) -> dict[str, Any]:
    """The launch's source.json; empty if there is none."""
    try:
        source = read_json(run_folder / "launches" / launch / "source.json")
    except UserError:
        return {}
    return source if isinstance(source, dict) and isinstance(source.get("stages", []), list) else {}


WIDTH = 100
MOST_STRAGGLERS = 4


def as_json(status: RunStatus) -> str:
    """Everything, for programs."""
    content = asdict(status) | {"exit_code": status.exit_code, "time": time.time()}
    return json.dumps(_finite(content), indent=1)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: these become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(status: RunStatus) -> str:
    """A line about the run, then a line per stage, with remarks below it."""
    now = time.time()
    lines = [_headline(status, now)]
    if status.problem is not None:
        lines += _wrapped(f"Slurm does not answer ({status.problem}): this is from the run's files", "")
    table = [["stage", "state", "job", "step", "loss", "clips/s", "left*", "checkpoint"]]
    table += [_cells(stage) for stage in status.stages]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row, stage in zip(table, [None, *status.stages], strict=True):
        cells = [
            cell.rjust(width) if column in (3, 4, 5, 6) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if stage is not None:
            indent = " " * (widths[0] + 2)
            for remark in _remarks(stage, now):
                lines += _wrapped(remark, indent)
            lines += [f"{indent}  {path}" for path in _paths(stage)]  # whole, to be copied
    if any(stage.eta_s is not None for stage in status.stages):
        lines.append("* at the rate of the last steps; phases of another geometry differ")
    return "\n".join(lines)


def _headline(status: RunStatus, now: float) -> str:
    if status.launched is None:
        return f"{status.run}: {as_called('never launched by tools/launch.py')}"
    folder = f" (launches/{status.launch})" if status.launch else ""
    commit = ""
    if status.commit:
        commit = f", commit {status.commit[:10]}" + (" with local changes" if status.dirty else "")
    return f"{status.run}: launched {clock(status.launched, now)}{folder} on {status.cluster}{commit}"


def _cells(stage: StageStatus) -> list[str]:
    return [
        stage.name,
        stage.state,
        stage.job_id or "-",
        f"{'-' if stage.step is None else stage.step}/{'?' if stage.last_step is None else stage.last_step}",
        "-" if stage.loss is None else f"{stage.loss:.4f}",
        "-" if stage.clips_per_s is None else f"{stage.clips_per_s:.1f}",
        "-" if stage.eta_s is None else duration(stage.eta_s),
        "-" if stage.checkpoint is None else f"{stage.checkpoint}, {duration(stage.checkpoint_age_s or 0.0)} ago",
    ]


def _remarks(stage: StageStatus, now: float) -> list[str]:
    out = [stage.detail] if stage.detail else []
    if stage.state == "stopped" and stage.owner != "unknown":  # an unknown one may still run
        out.append("the same command goes on")
    if (best := stage.best) is not None:
        others = f"; {best.evaluated} evaluated" if best.evaluated > 1 else ""
        out.append(f"best: step {best.step} ({best.words}{others})")
    if stage.signs:
        out.append(f"signs of a collapse: {', '.join(stage.signs)}")
    if stage.spikes:
        out.append(f"spikes: {stage.spikes}")
    out += [f"straggler: {words}" for words in stage.stragglers[:MOST_STRAGGLERS]]
    if (more := len(stage.stragglers) - MOST_STRAGGLERS) > 0:
        out.append(f"and {more} more ranks that hold up the others (--json has all)")
    if stage.late and stage.idle_s is not None:
        ago = duration(stage.idle_s)
        if stage.no_step_yet:
            out.append(f"no step yet, {ago} after its start")
        else:
            usual = "" if stage.step_s is None else f" (its steps took {stage.step_s:.2g} s)"
            out.append(f"last step {ago} ago{usual}")
    if stage.attempt > 1 or (stage.endings and stage.state in ALIVE):
        # Weeks of time limits are one item, not hundreds.
        grouped = Counter(ending.partition(", saved")[0].partition(" at step")[0] for ending in stage.endings)
        causes = ", ".join(what if count == 1 else f"{count} × {what}" for what, count in grouped.items())
        causes = causes.replace("ended without an error message", "an end without an error message")
        out.append(f"attempt {stage.attempt}" + (f", after {causes}" if causes else ""))
    error = stage.error
    if error is not None and stage.state != "done":
        when = f" ({clock(error.time, now)})" if error.time is not None else ""
        out.append(("error: " if error.ended else "an earlier error: ") + error.who + when)
    return out


def _paths(stage: StageStatus) -> list[str]:
    """Files with the full error, or with a hint if there is none."""
    if stage.without_a_word and stage.log:
        return [f"log {Path(stage.log).with_suffix('.err')}"]
    if stage.error is None or stage.state == "done":
        return []
    files = (("log", stage.error.log), ("report", stage.error.report))
    return [f"{word} {path}" for word, path in files if path]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
