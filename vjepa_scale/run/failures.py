"""Failure reports: each rank that fails writes one; ``worst_failure`` finds the one that names the cause.

    <run>/<stage>/failures/JOB.RANK.json            rank, step, kind, message, user_error, bystander, traceback, log
    <run>/<stage>/failures/JOB.RANK.supervisor.json the same and more, of the process that supervises the rank
                                                    (launch/supervisor.py): recurs, cause; of a rank that hung, account
    <run>/<stage>/failures/JOB.RANK.supervisor.told the same, of a rank that made no progress when the job was told to
                                                    end. It counts if the rank leaves no other report: then it was
                                                    ended before. It is no failure, so it does not end other ranks

Does not import PyTorch.
"""

import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import FULL, OutsideError, PassingError, UserError, reason_of
from vjepa_scale.core.files import read_json, write_json, write_last_words
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.run.blame import blamed
from vjepa_scale.run.rank_places import pattern_of, places_of

Report = dict[str, Any]

# Errors of a rank whose peer has ended, or ends the job. The peer's own exception names the cause.
_BYSTANDERS = ("DistBackendError", "DistNetworkError", "DistStoreError", "PeerDeviceError")
_KEYS = {"rank", "step", "kind", "message", "user_error", "bystander", "log"}
_TOLD = ".told"
_BYSTANDER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


def report_failure(folder: Path, ranks: Ranks, step: int | None, error: BaseException, *, logs: Path) -> None:
    """Writes this rank's report. step: the one that was being computed; None before the first."""
    shown = reported_error(error)
    more: Report = {"signal": error.signal} if isinstance(error, NothingSaved) else {}
    if isinstance(shown, OutsideError):
        more["recurs"] = False
    write_report(
        folder,
        ranks,
        logs=logs,
        step=step,
        kind=type(shown).__name__,
        message=str(shown),
        user_error=isinstance(shown, UserError) and not isinstance(shown, PassingError),
        bystander=_is_bystander(shown),
        traceback="".join(traceback.format_exception(error)),
        **more,
    )


def write_report(
    folder: Path, ranks: Ranks, *, logs: Path, supervisor: bool = False, told_to_end: bool = False, **values: Any
) -> None:
    """Writes a report with these values, of the rank itself or of its supervisor."""
    log = logs / f"{ranks.job_id}_{ranks.rank}_log.err"
    own = ".supervisor" if supervisor else ""
    path = folder / f"{file_name(ranks.job)}.{ranks.rank}{own}{_TOLD if told_to_end else '.json'}"
    report = {"rank": ranks.rank, **values, "log": str(log) if log.exists() else None}
    write_last_words(folder.parent, lambda: write_json(path, report))


def reported_error(error: BaseException) -> BaseException:
    """Returns the error to report: for a full disk a PassingError, since the user may free space meanwhile."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return error
    return PassingError(
        f"cannot be written: {reason_of(error)}",
        where=error.filename or "a log or a file",
        fix="with space there, the same launch goes on from the last checkpoint, which is whole",
    )


def worst_failure(folder: Path, job: str) -> Report | None:
    """Returns the report of an attempt that best names the cause, with its path as ``report``; None without reports.

    job: Ranks.job of the attempt, or a pattern for it

    User errors come first, then other exceptions and ends by a signal, then ends by SIGABRT, then ranks that hung, then
    errors of ranks that only lost a peer; of equals the earliest, and if several ranks say the same, the first rank.
    Of the last two kinds the message is that of ``blamed``, which names the ranks that are missing.
    """
    found = reports_of(folder, job)
    if not found:
        return None
    earliest = min(found, key=lambda report: (_priority(report), _written(report), report["rank"]))
    alike = [report for report in found if _said(report) == _said(earliest)]
    worst = min(alike, key=lambda report: report["rank"])
    return blamed(worst, found, places_of(folder.parent, job))


def reports_of(folder: Path, job: str) -> list[Report]:
    """Returns the reports of an attempt, each with its path as ``report``."""
    found = _read_all(folder, job, ".json")
    said = {report["rank"] for report in found}
    return found + [report for report in _read_all(folder, job, _TOLD) if report["rank"] not in said]


def _read_all(folder: Path, job: str, ending: str) -> list[Report]:
    paths = sorted(folder.glob(f"{pattern_of(file_name(job))}.*{ending}"))
    return [{**report, "report": str(path)} for path in paths if (report := read_report(path)) is not None]


def read_report(path: Path) -> Report | None:
    """Returns the report of a file; None if the file is damaged or not a report."""
    with suppress(UserError):
        found = read_json(path)
        if isinstance(found, dict) and found.keys() >= _KEYS and isinstance(found["rank"], int):
            return found
    return None


def _priority(report: Report) -> int:
    if report["user_error"]:
        return 0
    if report["bystander"]:
        return 4
    # A collective that fails ends the innocent ranks, too, by SIGABRT.
    return 3 if "account" in report else 2 if str(report.get("cause")).startswith("SIGABRT") else 1


def _written(report: Report) -> float:
    with suppress(OSError):
        return Path(report["report"]).stat().st_mtime
    return 0.0


def _said(report: Report) -> tuple[Any, ...]:
    return _priority(report), report["kind"], report["step"], report["message"]


class NothingSaved(BaseException):  # an ``except Exception`` of DataLoader or of a decoder must not take it for its own
    """A signal came while this rank waited for data that did not come. No step has been completed since ``step``.

    signal: its name
    """

    def __init__(self, signal: str, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def _is_bystander(error: BaseException) -> bool:
    message = str(error).lower()
    return type(error).__name__ in _BYSTANDERS or any(word in message for word in _BYSTANDER_WORDS)


def file_name(job: str) -> str:
    """Returns the part of a report's file name that is the job's."""
    return job.replace("/", "_")
