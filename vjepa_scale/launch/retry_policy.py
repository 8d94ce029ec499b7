"""Decides whether another attempt follows one that has ended. The same rules apply on Slurm and on this machine.

A stage may be restarted for weeks, after time limits and preemptions, as long as attempts bring new checkpoints.
It is not restarted

- after a user error,
- after the same kind of failure at the same step twice in a row, which would occur again (not if a rank was killed or
  stopped from outside),
- when more than ``launch.max_restarts`` restarts in a row brought no new checkpoint.

Does not import PyTorch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.run.events import Attempt, History, Row, attempts
from vjepa_scale.run.failures import worst_failure

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """The decision after an attempt. done: the stage is complete; again: another attempt; stop: no other attempt.

    ended: the attempt's ``interrupted`` or ``failed`` row as text
    why:   the reason of ``stop``
    """

    kind: Literal["done", "again", "stop"]
    ended: str
    why: str = ""
    user_error: bool = False

    def __str__(self) -> str:
        if self.kind == "done":
            return "the stage is complete"
        return f"{self.ended}; " + ("another attempt" if self.kind == "again" else f"no other attempt: {self.why}")


def end_of_attempt(
    history: History,
    failures: Path,
    *,
    job: str,
    job_id: str | None,
    max_restarts: int,
    log: Path,
    setup: str | None = None,
    early_signal: str | None = None,
) -> Verdict:
    """Records how the attempt that has just ended failed, unless the history has its end. Returns the decision.

    job:    Ranks.job of its processes, or a pattern for it
    job_id: the job whose attempts, over its requeues, are counted; None: all attempts since the last launch
    log:    named in the failure if no rank has left a report
    setup:  the message about a failed line of the site's setup
    early_signal: a signal that may have ended the ranks before they could handle it
    """
    mine = [attempt for attempt in _tried(history, job_id) if attempt.is_of(job)]
    if not mine and early_signal is not None and worst_failure(failures, job) is None:
        history.add("interrupted", job=job, job_id=job_id or job, signal=early_signal, step=None)
    elif not mine or mine[-1].end is None:
        report = worst_failure(failures, job)
        if report is None:
            kind, message = (
                ("SetupFailed", setup) if setup else ("Killed", "the processes ended without an error message")
            )
            report = {
                "kind": kind,
                "message": message,
                "rank": None,
                "step": None,
                "user_error": False,
                "bystander": not setup,
                "report": None,
                "log": str(log) if log.exists() else None,
            }
        if "signal" in report:  # a rank has stopped without the others, and nothing was saved then
            step = _last_saved(mine[-1]) if mine else None
            history.add("interrupted", job=job, job_id=job_id or job, signal=report["signal"], step=step)
        else:
            row = {key: value for key, value in report.items() if key not in ("traceback", "account")}
            history.add("failed", job=job, job_id=job_id or job, **row)
    tried = _tried(history, job_id)
    verdict = judge(tried, max_restarts=max_restarts)
    _log.debug(
        "job %s: attempt %d, at most %d restarts without a checkpoint; %s", job, len(tried), max_restarts, verdict
    )
    if verdict.kind == "again" and any(row["event"] == "cancelled" for row in history.since_submission()):
        return Verdict("stop", verdict.ended, "it was cancelled")
    return verdict


def _last_saved(attempt: Attempt) -> int | None:
    """Returns the step of the checkpoint at which the next attempt starts; None if there is none."""
    started = attempt.started
    begun = started["step"] if started is not None and started["kind"] == "resume" else None
    return begun if attempt.saved is None else attempt.saved


def _tried(history: History, job_id: str | None) -> list[Attempt]:
    if job_id is None:
        return attempts(history.since_submission())
    return [attempt for attempt in attempts(history.rows()) if attempt.job_id == job_id]


def judge(tried: Sequence[Attempt], *, max_restarts: int) -> Verdict:
    """Returns the decision after the last of these attempts, which has ended."""
    end = tried[-1].end
    assert end is not None, "an attempt that has ended"
    if end["event"] == "done":
        return Verdict("done", "done")
    if end["event"] == "interrupted":
        reason = _no_progress(tried, max_restarts)
        ended = f"{end['signal']} {_at(end)}"
        return Verdict("stop", ended, reason) if reason else Verdict("again", ended)
    ended = f"{end['kind']} {_at(end)}: {str(end['message']).partition(chr(10))[0]}"
    before = tried[-2].end if len(tried) > 1 else None
    if end["user_error"]:
        return Verdict("stop", ended, "it is for the user to mend", user_error=True)
    if max_restarts == 0:
        return Verdict("stop", ended, "launch.max_restarts is 0")
    if before is not None and _same_failure(before, end):
        return Verdict("stop", ended, f"{end['kind']} {_at(end)} twice in a row: it would come again")
    if reason := _no_progress(tried, max_restarts):
        return Verdict("stop", ended, reason)
    return Verdict("again", ended)


def refuse_endless_restarts(history: History, *, job_id: str, max_restarts: int) -> None:
    """Before a job's next attempt: raises UserError if too many earlier ones brought no new checkpoint.

    For restarts without a decision of this module: Slurm itself requeues a job whose node failed.
    """
    if reason := _no_progress(_tried(history, job_id), max_restarts):
        raise UserError(reason, where="launch.max_restarts", fix="see the errors in history.jsonl, then launch again")


def _same_failure(before: Row, end: Row) -> bool:
    """Returns whether both are the same failure at the same step.

    False for errors of a lost peer, which are always equal, and for what came from outside, such as SIGKILL.
    """
    if before["event"] != "failed" or end.get("bystander") or not end.get("recurs", True):
        return False
    same = (before["kind"], before["step"]) == (end["kind"], end["step"])
    # Before the first step a kind is less specific: the causes must be equal too. Words may have process ids.
    return same and (end["step"] is not None or _cause(before) == _cause(end))


def _cause(end: Row) -> str:
    return str(end.get("cause", end["message"]))


def _at(end: Row) -> str:
    return "before the first step" if end["step"] is None else f"at step {end['step']}"


def _no_progress(tried: Sequence[Attempt], max_restarts: int) -> str | None:
    fruitless = 0
    for attempt in reversed(tried):
        if attempt.saved is not None:
            break
        # A signal before the first step does not count: a job may be preempted just after its start.
        if not (attempt.end and attempt.end["event"] == "interrupted" and attempt.end["step"] is None):
            fruitless += 1
    return f"{fruitless} attempts in a row brought no new checkpoint" if fruitless > max_restarts else None
