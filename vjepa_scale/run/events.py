"""history.jsonl of a stage: the events of all its jobs and restarts. Does not import PyTorch.

A row has ``time`` (seconds since 1970) and ``event``:

    submitted    a launch handed the stage to Slurm or to the local loop: cluster, job_id, name, launch, host, pid
    started      rank 0 is about to train: job, job_id, host, world_size, kind, step, repeated,
                 attention (the kernel)
    saved        a checkpoint is complete: job, step
    slow_step    a step takes many times the median, and rank 0 has written stacks: job, step, seconds, median,
                 stacks
    interrupted  stopped after a signal: job, signal, step (of the checkpoint that was saved then, or before it by a
                 rank that waited in vain for data)
    collapse     a figure has stayed beyond its limit: job, column, value, limit, step (training/collapse_watch.py)
    spike        a step was skipped or training rolled back: job, step, action, to, saw; run/ledger.py has more
    device       a rank holds up the others (training/device_watch.py): job, rank, node, device, problem (wrong: of its
                 results; slow; data: it waits for its batches), times (the others' median), share (of the steps'
                 time), over (it no longer does), step
    failed       an attempt failed: job, job_id, kind, message, rank, step, user_error, bystander, log, report;
                 recurs: False if it came from outside, such as SIGKILL; cause: of ends and hangs, as words without
                 process ids and seconds, which are compared
    requeued     another attempt follows: reason, job_id
    gave_up      no other attempt follows: reason
    cancelled    by tools/launch.py cancel, or by the launcher's Ctrl-C
    done         the last checkpoint is complete: job, step

Rows are only appended, each in one write. ``status`` reads this file, metrics.jsonl and the checkpoints, so it works
without Slurm's accounting.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vjepa_scale.core.files import append_jsonl, read_jsonl, write_last_words

Row = dict[str, Any]

_NUMBER, _STEP, _TEXT = (int, float), (int, type(None)), (str, type(None))
# The required keys of each event and their types. Other lines are ignored.
_ALWAYS: dict[str, Any] = {"time": _NUMBER, "event": str}
_OF_EVENT: dict[str, dict[str, Any]] = {
    "submitted": {"cluster": str, "job_id": (str, int)},
    "started": {"job": str, "kind": str, "step": int},
    "saved": {"step": int},
    "interrupted": {"signal": str, "step": _STEP},
    "failed": {
        "kind": str,
        "message": str,
        "rank": _STEP,
        "step": _STEP,
        "user_error": bool,
        "log": _TEXT,
        "report": _TEXT,
    },
    "collapse": {"column": str, "value": _NUMBER, "limit": _NUMBER, "step": int},
    "spike": {"step": int, "action": str, "to": _STEP, "saw": str},
    "device": {
        "rank": int,
        "node": str,
        "device": str,
        "problem": str,
        "times": (int, float, type(None)),
        "share": (int, float, type(None)),
        "over": bool,
        "step": int,
    },
    "gave_up": {"reason": str},
    "done": {"step": int},
}


# Types of optional keys.
_MAY_HAVE: dict[str, Any] = {"job": str, "job_id": (str, int), "name": _TEXT, "created": _NUMBER}


def _is_row(row: Row) -> bool:
    wanted = _ALWAYS | (_OF_EVENT.get(row["event"], {}) if isinstance(row.get("event"), str) else {})
    if not all(isinstance(row[key], kind) for key, kind in _MAY_HAVE.items() if key in row):
        return False
    return all(key in row and isinstance(row[key], kind) for key, kind in wanted.items())


class History:
    """The history of one stage."""

    def __init__(self, stage_folder: Path) -> None:
        self.path = stage_folder / "history.jsonl"

    def add(self, event: str, **values: Any) -> None:
        """Appends one row durably, also on a full disk (``keep_reserve`` of the stage's folder)."""
        row = {"time": time.time(), "event": event, **values}
        write_last_words(self.path.parent, lambda: append_jsonl(self.path, row, durable=True))

    def rows(self) -> list[Row]:
        return [row for row in read_jsonl(self.path) if _is_row(row)]

    def since_submission(self) -> list[Row]:
        """Returns the rows of the last launch, its ``submitted`` row first; all rows if there was no launch."""
        rows = self.rows()
        marks = [index for index, row in enumerate(rows) if row["event"] == "submitted"]
        return rows[marks[-1] :] if marks else rows


@dataclass
class Attempt:
    """One attempt at a stage, from the start of a job to its end.

    started: its ``started`` row; None if it failed before rank 0 wrote it
    saved:   the step of its last checkpoint; None without one
    end:     the row that ended it (interrupted, failed, done); None while it runs, or if it ended without
             writing one
    later:   rows ``cancelled``, ``requeued``, ``gave_up``
    """

    started: Row | None = None
    saved: int | None = None
    end: Row | None = None
    later: list[Row] = field(default_factory=list)

    @property
    def job_id(self) -> str | None:
        row = self.started or self.end
        return row.get("job_id") if row else None

    def is_of(self, job: str) -> bool:
        """Returns whether it belongs to this start of a job (Ranks.job, or a pattern for it)."""
        return self.started is not None and fnmatchcase(self.started["job"], job)


def attempts(rows: Sequence[Row]) -> list[Attempt]:
    """Returns the attempts that the rows record, oldest first.

    A row that names its job belongs to that start of it, also if a later one has begun: a node that Slurm has given
    up may still write, and its rows must not count for the job's next start.
    """
    out: list[Attempt] = []
    for row in rows:
        event = row["event"]
        if event == "started":
            out.append(Attempt(started=row))
        elif event in ("interrupted", "failed", "done"):
            mine = _attempt_of(row, out)
            if mine is None or mine.end is not None:  # it failed before its ``started`` row
                mine = Attempt()
                out.append(mine)
            mine.end = row
        elif event == "saved" and (mine := _attempt_of(row, out)) is not None:
            mine.saved = row["step"]
        elif event in ("cancelled", "requeued", "gave_up") and out:
            out[-1].later.append(row)
    return out


def _attempt_of(row: Row, tried: Sequence[Attempt]) -> Attempt | None:
    if "job" in row:
        return next((attempt for attempt in reversed(tried) if attempt.is_of(row["job"])), None)
    return tried[-1] if tried else None


def device_in_words(row: Row) -> str:
    """Returns a ``device`` row as text: ``rank 5 on n07, cuda:1 (…): 1.42 times as slow as the other ranks, …``."""
    times = "" if row["times"] is None else f", {row['times']:g} times as long as the other ranks"
    said = {
        "wrong": "computes wrong",
        "slow": f"slow: its matrix products take{times.removeprefix(',')}",
        "data": f"waits for its data{times}" + ("" if row["share"] is None else f", {row['share']:.0%} of the time"),
    }.get(row["problem"], row["problem"])
    who = f"rank {row['rank']} on {row['node']}, {row['device']}"
    if row["over"]:
        return f"{who}: no longer {'slow' if row['problem'] == 'slow' else 'waits for its data longer than the others'}"
    return f"{who}: {said} (at step {row['step']})"
