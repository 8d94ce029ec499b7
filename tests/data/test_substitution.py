"""What replaces a clip that does not decode: how often it is tried, and of which records."""

from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from vjepa_scale.core.errors import UserError
from vjepa_scale.data import substitution
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.substitution import Known, clip_or_substitute, substitute
from vjepa_scale.recipe.schema import DataConfig
from vjepa_scale.video.container import DecodeError

DATA = cast("DataConfig", SimpleNamespace(seed=7, decoder="pyav", sampling="time"))


class Shards:
    """Records whose videos are their numbers; some do not decode. read_: in order"""

    folder = Path("shards")

    def __init__(self, records: int, bad: Collection[int] = ()) -> None:
        self.records, self.bad, self.read_ = records, bad, list[int]()

    def read(self, record: int) -> int:
        self.read_.append(record)
        return record

    def key(self, record: int) -> str:
        return f"{record:09d}"

    def shard_of(self, record: int) -> Any:
        return SimpleNamespace(name="shard.tar")


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip's pictures are its record; windows do not matter here."""

    def pictures_of(ref: ClipRef, video: int, **_: object) -> list[int]:
        if video in SHARDS[0].bad:
            raise DecodeError("unreadable")
        return [video]

    def undecodable(shards: Shards, ref: ClipRef, error: DecodeError) -> UserError:
        return UserError(f"record {ref.record}: {error.reason}", where=shards.folder, fix="restore it")

    monkeypatch.setattr(substitution, "pictures_of", pictures_of)
    monkeypatch.setattr(substitution, "undecodable", undecodable)
    monkeypatch.setattr(substitution, "with_window", lambda ref, *_, **__: ref)


SHARDS = [Shards(0)]


def shown(shards: Shards, record: int, *, known: Known | None = None, records: Sequence[int] | None = None) -> Any:
    SHARDS[0] = shards
    ref = ClipRef(3, 1, "a", record, (0.0, 0.25), 4.0)
    kept = None if records is None else np.array(records)
    return clip_or_substitute(cast("Manifest", shards), ref, data=DATA, known=known or {}, records=kept)


def drawn(records: int, step: int, slot: int, attempt: int, *, seed: int = 7, kept: Sequence[int] | None = None) -> int:
    data = cast("DataConfig", SimpleNamespace(**{**vars(DATA), "seed": seed}))
    ref = ClipRef(step, slot, "a", 0, (0.0, 0.25), 4.0)
    of = None if kept is None else np.array(kept)
    return substitute(cast("Manifest", Shards(records)), ref, attempt=attempt, data=data, records=of).record


def test_every_record_may_come_and_no_other() -> None:
    assert {drawn(5, 0, slot, 1) for slot in range(200)} == {0, 1, 2, 3, 4}
    assert {drawn(100, 0, slot, 1, kept=[3, 50, 99]) for slot in range(200)} == {3, 50, 99}


def test_a_draw_is_of_seed_step_slot_and_attempt() -> None:
    """Of a million records, two draws for different things are the same one time in a million."""
    n = 1_000_000
    draws = {drawn(n, 0, 0, 1), drawn(n, 1, 0, 1), drawn(n, 0, 1, 1), drawn(n, 0, 0, 2), drawn(n, 0, 0, 1, seed=8)}
    assert len(draws) == 5
    assert drawn(n, 0, 0, 1) == drawn(n, 0, 0, 1)


def test_a_slot_gives_up_after_eight_clips() -> None:
    shards = Shards(1_000_000, bad=range(1_000_000))
    with pytest.raises(UserError, match=r"record 5: unreadable; nor do 7 others drawn in its place"):
        shown(shards, 5)
    assert len(shards.read_) == len(set(shards.read_)) == 8
    assert shards.read_[0] == 5
    tried = shards.read_
    for good in range(8):  # each of the eight is shown where it is the first that decodes
        ref, pictures, failures = shown(Shards(1_000_000, bad=tried[:good]), 5)
        assert (ref.record, pictures) == (tried[good], [tried[good]])
        assert [failure.record for failure in failures] == tried[:good]
        assert [failure.replacement for failure in failures] == tried[1 : good + 1]


def test_a_clip_that_failed_is_not_tried_again() -> None:
    shards = Shards(9, bad=[4])
    with pytest.raises(UserError, match="record 4: unreadable; the data set has no other clip"):
        shown(shards, 4, records=[4])
    assert shards.read_ == [4]


def test_a_known_failure_is_not_read() -> None:
    shards = Shards(1_000_000)
    ref, _, failures = shown(shards, 5, known={substitution.Place(3, 1, "a", 5): ("time limit", "more than 3 s")})
    assert 5 not in shards.read_
    assert [(failure.cause, failure.detail) for failure in failures] == [("time limit", "more than 3 s")]
    assert failures[0].replacement == ref.record
    # Of another step or slot it is another clip.
    assert shown(Shards(9), 5, known={substitution.Place(4, 1, "a", 5): ("", "")})[2] == []
    assert shown(Shards(9), 5, known={substitution.Place(3, 0, "a", 5): ("", "")})[2] == []
