"""ledger.jsonl of a run: what its results depend on, in addition to recipe, seed and step. Does not import PyTorch.

Rows have ``event``, and are written before the step changes anything:

    substituted  a clip was replaced: stage, and the fields of data/substitution.py's DecodeFailure. Replayed on resume:
                 the clip is then replaced without decoding
    spike        a step was skipped, or training was rolled back: stage, and the fields of ``Spike``; loss and grad_norm
                 (null: not finite), and clips, the data set and key of each slot. Replayed on resume
    stop         the run stopped itself: stage, step, kind of the error, reason, pid. Does not affect results

Only the trainer's rank 0 writes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl

LEDGER = "ledger.jsonl"
# Errors with which a run ends itself over spikes (training/spikes.py, training/step.py).
ENDED_BY_SPIKES = ("SpikeError", "NonFiniteLossError")


@dataclass(frozen=True)
class Spike:
    """A step that changed nothing, and what was done.

    to:  of a rollback, the step of the checkpoint from which training went on
    saw: why it is a spike, in words
    left_out: of a rollback, the clips of each data set that are left out from ``to`` on
    counts: whether bounds count it: not if the run has ended itself over spikes since, and was launched again
    """

    step: int
    action: Literal["skip", "rollback"]
    saw: str
    to: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    counts: bool = True

    def __str__(self) -> str:
        then = "skipped" if self.to is None else f"rolled back to step {self.to}"
        return f"step {self.step} {then}: {self.saw}"


def rows_of(path: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a stage, oldest first."""
    return (row for row in read_jsonl(path) if row.get("stage") == stage)


def read_spikes(path: Path, stage: str) -> list[Spike]:
    """Returns the spikes of a stage, oldest first. Raises UserError if one of their rows is not whole."""
    spikes: list[Spike] = []
    for row in rows_of(path, stage):
        if row.get("event") == "spike":
            spikes.append(spike_of(row, where=path))
        elif row.get("event") == "stop" and row.get("kind") in ENDED_BY_SPIKES:
            spikes = [replace(spike, counts=False) for spike in spikes]
    return spikes


def spike_of(row: Mapping[str, Any], *, where: Path) -> Spike:
    """Returns the spike of a row. Raises UserError if the row is not whole."""
    step, to, action, saw, left_out = (row.get(key) for key in ("step", "to", "action", "saw", "left_out"))
    if isinstance(step, int) and isinstance(saw, str):
        if action == "skip" and to is None:
            return Spike(step, "skip", saw)
        if action == "rollback" and isinstance(to, int) and _are_draws(left_out):
            return Spike(step, "rollback", saw, to, left_out or {})
    raise not_whole(row, where=where)


def _are_draws(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(count, int) for count in value.values())


def not_whole(row: Mapping[str, Any], *, where: Path) -> UserError:
    """Returns the error for a row that is not as this module's text says."""
    return UserError(
        f"a row of {row.get('stage')!r} that is not whole: {dict(row)}",
        where=where,
        fix="restore this file from a copy: the results of the run depend on it",
    )
