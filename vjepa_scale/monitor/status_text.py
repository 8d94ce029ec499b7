"""A run's status in words for people, and as JSON for programs."""

import json
import math
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from vjepa_scale.monitor.states import ALIVE, RunStatus, StageStatus

WIDTH = 100


def as_json(status: RunStatus) -> str:
    """Everything, for programs."""
    content = asdict(status) | {"exit_code": status.exit_code, "time": time.time()}
    return json.dumps(_finite(content), indent=1)


def _finite(value: Any) -> Any:
    """JSON has no word for a loss that is not a number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(status: RunStatus) -> str:
    """A line about the run, then a line per stage with what there is to say below it."""
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
        lines.append("* at the pace of the last steps; a phase of another geometry takes its own time")
    return "\n".join(lines)


def _headline(status: RunStatus, now: float) -> str:
    if status.launched is None:
        return f"{status.run}: never launched by tools/launch.py"
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
    if stage.still:
        out.append(f"running, but no step for {duration(stage.idle_s or 0.0)}")
    if stage.attempt > 1 or (stage.endings and stage.state in ALIVE):
        # Weeks of time limits are one item, not hundreds.
        grouped = Counter(ending.partition(", saved")[0].partition(" at step")[0] for ending in stage.endings)
        causes = ", ".join(what if count == 1 else f"{count} × {what}" for what, count in grouped.items())
        causes = causes.replace("ended without a word", "an end without a word")
        out.append(f"attempt {stage.attempt}" + (f", after {causes}" if causes else ""))
    error = stage.error
    if error is not None and stage.state != "done":
        when = f" ({clock(error.time, now)})" if error.time is not None else ""
        out.append(("error: " if error.ended else "an earlier error: ") + error.who + when)
    return out


def _paths(stage: StageStatus) -> list[str]:
    """Where an error is told in full, or what may tell why there is none."""
    if stage.without_a_word and stage.log:
        return [f"log {Path(stage.log).with_suffix('.err')}"]
    if stage.error is None or stage.state == "done":
        return []
    told = (("log", stage.error.log), ("report", stage.error.report))
    return [f"{word} {path}" for word, path in told if path]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def duration(seconds: float) -> str:
    """90 s, 2.5 min, 3.0 h, 12 days: at most two digits that matter."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}" if seconds < 10 * size else f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def clock(when: float, now: float) -> str:
    """A local time; with its date if it is another day's."""
    moment = datetime.fromtimestamp(when)
    same_day = moment.date() == datetime.fromtimestamp(now).date()
    return moment.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M")
