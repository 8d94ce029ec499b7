"""ledger.jsonl of a run: what its results depend on, in addition to recipe, seed and step. Does not import PyTorch.

Rows have ``event``, and are written before the step changes anything:

    substituted  a clip was replaced: stage, and the fields of data/substitution.py's DecodeFailure. Replayed on resume:
                 the clip is then replaced without decoding
    spike        a step was skipped, or training was rolled back: stage, and the fields of ``Spike``; loss and grad_norm
                 (null: not finite), and clips, the data set and key of each slot. Replayed on resume
    stop         the run stopped itself: stage, step, reason, pid. Does not affect results

Only the trainer's rank 0 writes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Spike:
    """A step that changed nothing, and what was done.

    to:  of a rollback, the step of the checkpoint from which training went on
    saw: why it is a spike, in words
    """

    step: int
    action: Literal["skip", "rollback"]
    saw: str
    to: int | None = None

    def __str__(self) -> str:
        then = "skipped" if self.to is None else f"rolled back to step {self.to}"
        return f"step {self.step} {then}: {self.saw}"


def rows_of(path: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a stage, oldest first."""
    return (row for row in read_jsonl(path) if row.get("stage") == stage)


def read_spikes(path: Path, stage: str) -> list[Spike]:
    """Returns the spikes of a stage, oldest first. Raises UserError if one of their rows is not whole."""
    return [spike_of(row, where=path) for row in rows_of(path, stage) if row.get("event") == "spike"]


def spike_of(row: Mapping[str, Any], *, where: Path) -> Spike:
    """Returns the spike of a row. Raises UserError if the row is not whole."""
    step, to, action, saw = (row.get(key) for key in ("step", "to", "action", "saw"))
    if isinstance(step, int) and isinstance(saw, str):
        if action == "skip" and to is None:
            return Spike(step, "skip", saw)
        if action == "rollback" and isinstance(to, int):
            return Spike(step, "rollback", saw, to)
    raise not_whole(row, where=where)


def not_whole(row: Mapping[str, Any], *, where: Path) -> UserError:
    """Returns the error for a row that is not as this module's text says."""
    return UserError(
        f"a row of {row.get('stage')!r} that is not whole: {dict(row)}",
        where=where,
        fix="restore this file from a copy: the results of the run depend on it",
    )
