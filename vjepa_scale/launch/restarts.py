"""An attempt at a stage has ended: is there another? The same rules on Slurm and on this machine.

A stage may go on for weeks over time limits and preemptions: what counts is that attempts bring it further.
It gives up when

- the user has something to mend,
- the same kind of failure came at the same step twice in a row: it would come again, and burn the allocation,
- more than ``launch.max_restarts`` restarts in a row brought no new checkpoint.

Light: it does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.training.failures import worst_failure
from vjepa_scale.training.history import Attempt, History, Row
from vjepa_scale.training.history import attempts as attempts_in


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


def close_attempt(history: History, failures: Path, job: str, *, job_id: str) -> None:
    """Write down how the attempt that has just ended failed, unless the history says how it ended.

    job: Ranks.job of its processes, or a pattern for it
    """
    tried = attempts(history)
    if tried and tried[-1].is_of(job) and tried[-1].end is not None:
        return
    report = worst_failure(failures, job)
    if report is None:
        report = {"kind": "Killed", "message": "the processes ended without a word", "rank": None, "step": None}
        report |= {"user_error": False, "log": None, "report": None}
    history.add("failed", job=job, job_id=job_id, **{key: value for key, value in report.items() if key != "traceback"})


def attempts(history: History, *, job_id: str | None = None) -> list[Attempt]:
    """The attempts since the last launch, or those of one job over its requeues."""
    if job_id is None:
        return attempts_in(history.since_submission())
    return [attempt for attempt in attempts_in(history.rows()) if attempt.job_id == job_id]


def judge(tried: Sequence[Attempt], *, max_restarts: int) -> Verdict:
    """What follows the last of these attempts, which has ended."""
    last = tried[-1]
    end = last.end or {"event": "failed", "kind": "Killed", "step": None, "message": "no word", "user_error": False}
    if end["event"] == "done":
        return Verdict("done", "done")
    if any(row["event"] == "cancelled" for attempt in tried for row in attempt.later):
        return Verdict("stop", "cancelled", "cancelled")
    failed = end["event"] == "failed"
    if failed:
        at = "before the first step" if end["step"] is None else f"at step {end['step']}"
        ended = f"{end['kind']} {at}: {str(end['message']).partition(chr(10))[0]}"
    else:
        ended = f"{end['signal']} at step {end['step']}"
    if failed and end["user_error"]:
        return Verdict("stop", ended, "it is for the user to mend", user_error=True)
    if max_restarts == 0:
        return Verdict("stop", ended, "launch.max_restarts is 0")
    before = tried[-2].end if len(tried) > 1 else None
    if failed and before is not None and end["step"] is not None and _alike(before, end):
        return Verdict("stop", ended, f"{end['kind']} at step {end['step']} twice in a row: it would come again")
    if reason := _no_progress(tried, max_restarts):
        return Verdict("stop", ended, reason)
    return Verdict("again", ended)


def refuse_endless_restarts(history: History, *, job_id: str, max_restarts: int) -> None:
    """Before a job's next attempt: raise UserError where the earlier ones brought nothing.

    For restarts that nobody of ours decided on: Slurm itself requeues a job whose node failed.
    """
    if reason := _no_progress(attempts(history, job_id=job_id), max_restarts):
        raise UserError(reason, where="launch.max_restarts", fix="see the errors in history.jsonl, then launch again")


def _alike(before: Row, end: Row) -> bool:
    return before["event"] == "failed" and (before["kind"], before["step"]) == (end["kind"], end["step"])


def _no_progress(tried: Sequence[Attempt], max_restarts: int) -> str | None:
    fruitless = 0
    for attempt in reversed(tried):
        if attempt.saved is not None:
            break
        fruitless += 1
    return f"{fruitless} attempts in a row brought no new checkpoint" if fruitless > max_restarts else None
