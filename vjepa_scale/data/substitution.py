"""Replaces clips that do not decode in training.

A slot whose clip fails shows another clip of the same data set: attempt a of slot i at step s is a hash of
(data.seed, s, i, a). So the data of a run are a function of recipe, seed, step and the set of failed clips, which
the run's ledger records (training/skipped_clips.py). Only decode failures are replaced: a shard that is missing,
truncated or unreadable stays an error.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.clips import ClipRef, Timed, pictures_of, undecodable, with_window
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.recipe.schema import DataConfig
from vjepa_scale.video.container import DecodeError

_log = logging.getLogger(__name__)

# A slot fails after this many clips. Where half of a data set is damaged, 1 slot in 256 reaches this limit.
ATTEMPTS = 8

TIME_LIMIT = "time limit"
CRASH = "crashes the decoder"


class Place(NamedTuple):
    """One clip in one slot of one step: the key of a failure."""

    step: int
    slot: int
    dataset: str
    record: int


@dataclass(frozen=True)
class DecodeFailure:
    """A clip that was not shown. The fields are those of a ledger row.

    key, shard:  of the record
    cause:       a category, for counts; detail: the specific error
    replacement: the record tried next (another failure where it fails too)
    """

    step: int
    slot: int
    dataset: str
    record: int
    key: str
    shard: str
    cause: str
    detail: str = ""
    replacement: int | None = None

    @property
    def place(self) -> Place:
        return Place(self.step, self.slot, self.dataset, self.record)

    def __str__(self) -> str:
        why = f"{self.cause}: {self.detail}" if self.detail else self.cause
        return f"data set {self.dataset!r}, record {self.key} of {self.shard} (step {self.step}): {why}"


# Failures known before decoding: place -> (cause, detail).
Known = Mapping[Place, tuple[str, str]]


def clip_or_substitute(
    manifest: Manifest,
    ref: ClipRef,
    *,
    data: DataConfig,
    known: Known,
    timed: Timed | None = None,
    records: Ints | None = None,
) -> tuple[ClipRef, list[npt.NDArray[np.uint8]], list[DecodeFailure]]:
    """Returns the clip that a slot shows, its T pictures, uint8 [H, W, 3], and the failures before it.

    known: clips to replace without an attempt
    records: records that the stage draws from; None: all
    Raises UserError where no clip of ATTEMPTS decodes.
    """
    failures: list[DecodeFailure] = []
    first: UserError | None = None
    for attempt in range(ATTEMPTS):
        candidate = substitute(manifest, ref, attempt=attempt, data=data, records=records) if attempt else ref
        if any(failure.record == candidate.record for failure in failures):
            continue
        if failures:
            failures[-1] = replace(failures[-1], replacement=candidate.record)
        place = Place(ref.step, ref.slot, ref.dataset, candidate.record)
        if place in known:
            error = DecodeError(*known[place])
        else:
            if _log.isEnabledFor(logging.DEBUG):
                shard, key = manifest.shard_of(candidate.record).name, manifest.key(candidate.record)
                _log.debug(
                    "step %d slot %d: opens record %d (%s) of %s",
                    ref.step,
                    ref.slot,
                    candidate.record,
                    key,
                    manifest.folder / shard,
                )
            if timed is not None:
                timed.reading(candidate)
            video = manifest.read(candidate.record)
            try:
                return candidate, pictures_of(candidate, video, decoder=data.decoder, timed=timed), failures
            except DecodeError as caught:
                error = caught
        first = first or undecodable(manifest, candidate, error)
        failures.append(
            DecodeFailure(
                *place,
                key=manifest.key(candidate.record),
                shard=str(manifest.folder / manifest.shard_of(candidate.record).name),
                cause=error.reason,
                detail=error.detail,
            )
        )
    assert first is not None
    others = len(failures) - 1
    more = f"; nor do {others} others drawn in its place" if others else "; the data set has no other clip"
    raise UserError(first.what + more, where=first.where, fix=first.fix)


def substitute(
    manifest: Manifest, ref: ClipRef, *, attempt: int, data: DataConfig, records: Ints | None = None
) -> ClipRef:
    """Draws the clip of a slot's attempt 1, 2, …: a record of the same data set, and a window in it."""
    draws = KeyedRng(data.seed, "substitute", ref.step, ref.slot, attempt)
    record = draws.integer(manifest.records) if records is None else int(records[draws.integer(len(records))])
    draw = KeyedRng(data.seed, "substitute.window", ref.step, ref.slot, attempt).uniform()
    ref = replace(ref, record=record)
    return with_window(ref, manifest, draw, frames=len(ref.times_s), sampling=data.sampling)
