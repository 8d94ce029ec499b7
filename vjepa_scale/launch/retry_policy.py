"""An attempt at a stage has ended: is there another? The same rules on Slurm and on this machine.

A stage may go on for weeks over time limits and preemptions: what counts is that attempts bring it further.
It gives up when

- the user has something to mend,
- the same kind of failure came at the same step twice in a row: it would come again, and burn the allocation,
- more than ``launch.max_restarts`` restarts in a row brought no new checkpoint.

Light: it does not import torch.
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
    """What follows an attempt: nothing, since the stage is done; another attempt; or an end to trying.

    ended: the attempt's ``interrupted`` or ``failed`` row, in words
    why:   of ``stop``
    """

    kind: Literal["done", "again", "stop"]
    ended: str
    why: str = ""
    user_error: bool = False


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
    """Write down how the attempt that has just ended failed, unless the history says how it ended; then judge it.

    job:    Ranks.job of its processes, or a pattern for it
    job_id: of a job whose attempts count together over its requeues; None: all attempts since the last launch
    log:    where to look if no rank has left a report
    setup:  which line of the site's setup failed, in words
    early_signal: what ended the ranks, if it may have been before they could listen to it
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
        told = {key: value for key, value in report.items() if key != "traceback"}
        history.add("failed", job=job, job_id=job_id or job, **told)
    tried = _tried(history, job_id)
    verdict = judge(tried, max_restarts=max_restarts)
    _log.debug(
        "%s: %d attempts so far, at most %d restarts without a checkpoint: %s", job, len(tried), max_restarts, verdict
    )
    if verdict.kind == "again" and any(row["event"] == "cancelled" for row in history.since_submission()):
        return Verdict("stop", verdict.ended, "it was cancelled")
    return verdict


def _tried(history: History, job_id: str | None) -> list[Attempt]:
    if job_id is None:
        return attempts(history.since_submission())
    return [attempt for attempt in attempts(history.rows()) if attempt.job_id == job_id]


def judge(tried: Sequence[Attempt], *, max_restarts: int) -> Verdict:
    """What follows the last of these attempts, which has ended."""
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
    if before is not None and _alike(before, end):
        return Verdict("stop", ended, f"{end['kind']} {_at(end)} twice in a row: it would come again")
    if reason := _no_progress(tried, max_restarts):
        return Verdict("stop", ended, reason)
    return Verdict("again", ended)


def refuse_endless_restarts(history: History, *, job_id: str, max_restarts: int) -> None:
    """Before a job's next attempt: raise UserError where the earlier ones brought nothing.

    For restarts that nobody of ours decided on: Slurm itself requeues a job whose node failed.
    """
    if reason := _no_progress(_tried(history, job_id), max_restarts):
        raise UserError(reason, where="launch.max_restarts", fix="see the errors in history.jsonl, then launch again")


def _alike(before: Row, end: Row) -> bool:
    """The same failure at the same step? What ranks see that lost a peer is always alike and says nothing."""
    if before["event"] != "failed" or end.get("bystander"):
        return False
    same = (before["kind"], before["step"]) == (end["kind"], end["step"])
    # Before the first step a kind says less: only the same words are the same failure.
    return same and (end["step"] is not None or before["message"] == end["message"])


def _at(end: Row) -> str:
    return "before the first step" if end["step"] is None else f"at step {end['step']}"


def _no_progress(tried: Sequence[Attempt], max_restarts: int) -> str | None:
    fruitless = 0
    for attempt in reversed(tried):
        if attempt.saved is not None:
            break
        # A signal before the first step is nobody's failure: a job may be preempted as it starts.
        if not (attempt.end and attempt.end["event"] == "interrupted" and attempt.end["step"] is None):
            fruitless += 1
    return f"{fruitless} attempts in a row brought no new checkpoint" if fruitless > max_restarts else None
