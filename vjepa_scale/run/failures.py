"""Why did an attempt end? Each rank that fails leaves a report; here the one that knows most is found.

    <run>/<stage>/failures/JOB.RANK.json   rank, step, kind, message, user_error, bystander, traceback, log

Light: it does not import torch.
"""

import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import FULL, PassingError, UserError, reason_of
from vjepa_scale.core.files import read_json, write_json, write_last_words
from vjepa_scale.core.ranks import Ranks

Report = dict[str, Any]

# What a rank sees when another one has gone: less telling than that one's own exception.
_BYSTANDERS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_KEYS = {"rank", "step", "kind", "message", "user_error", "bystander", "log"}
_BYSTANDER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass
class Progress:
    """``step``: the step that is being computed, for whoever reports a failure; None before the first."""

    step: int | None = None


def report_failure(folder: Path, ranks: Ranks, step: int | None, error: BaseException, *, logs: Path) -> None:
    """Write this rank's report. step: the one that was being computed, if training had begun."""
    log = logs / f"{ranks.job_id}_{ranks.rank}_log.err"
    path = folder / f"{_file_name(ranks.job)}.{ranks.rank}.json"
    told = told_as(error)
    report = {
        "rank": ranks.rank,
        "step": step,
        "kind": type(told).__name__,
        "message": str(told),
        "user_error": isinstance(told, UserError) and not isinstance(told, PassingError),
        "bystander": _is_bystander(told),
        "traceback": "".join(traceback.format_exception(error)),
        "log": str(log) if log.exists() else None,
    }
    write_last_words(folder.parent, lambda: write_json(path, report))


def told_as(error: BaseException) -> BaseException:
    """The error, or what it means to a user: a full disk is theirs to mend, and may be so by the next attempt."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return error
    return PassingError(
        f"cannot be written: {reason_of(error)}",
        where=error.filename or "a log or a file",
        fix="with space there, the same launch goes on from the last checkpoint, which is whole",
    )


def worst_failure(folder: Path, job: str) -> Report | None:
    """The most telling report of an attempt, with its own path under ``report``; None where no rank left one.

    job: Ranks.job of the attempt, or a pattern for it

    A user's mistake comes first, then an exception of a rank's own, then those that only lost a peer.
    """
    paths = folder.glob(f"{_file_name(job)}.*.json")
    reports = [{**report, "report": str(path)} for path in paths for report in _read(path)]
    return min(reports, key=lambda report: (_rank_of_evidence(report), report["rank"]), default=None)


def _read(path: Path) -> Iterator[Report]:
    """The report in a file; nothing where the file is damaged, or no report."""
    with suppress(UserError):
        found = read_json(path)
        if isinstance(found, dict) and found.keys() >= _KEYS and isinstance(found["rank"], int):
            yield found


def _rank_of_evidence(report: Report) -> int:
    return 0 if report["user_error"] else 2 if report["bystander"] else 1


def _is_bystander(error: BaseException) -> bool:
    message = str(error).lower()
    return type(error).__name__ in _BYSTANDERS or any(word in message for word in _BYSTANDER_WORDS)


def _file_name(job: str) -> str:
    return job.replace("/", "_")
