"""How many clips may be replaced: both sides of the rate, the window and what an error names."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.substitution import DecodeFailure
from vjepa_scale.recipe.schema import FaultsConfig
from vjepa_scale.training.skipped_clips import SkippedClips


def failure(step: int, slot: int, record: int = 7, cause: str = "unreadable") -> DecodeFailure:
    return DecodeFailure(step, slot, "left", record, key=f"k{slot}", shard="x.tar", cause=cause, replacement=3)


def enter(
    book: SkippedClips,
    step: int,
    slots: Iterable[int],
    *,
    rate: float,
    window: int = 10,
    global_batch: int = 10,
    write: bool = True,
) -> list[DecodeFailure]:
    faults, rows = FaultsConfig(max_rate=rate, window=window), [failure(step, slot) for slot in slots]
    return book.enter(rows, step=step, global_batch=global_batch, faults=faults, write=write)


@pytest.mark.parametrize(
    ("rate", "allowed"),
    [(0.29, 29), (0.57, 57), (0.01, 1), (0.009, 0), (0.999, 99)],  # in floats 0.29 · 100 and 0.57 · 100 are less
)
def test_as_many_as_the_rate_says_and_not_one_more(rate: float, allowed: int, tmp_path: Path) -> None:
    enter(SkippedClips(tmp_path, "pretrain"), 0, range(allowed), rate=rate, window=1, global_batch=100, write=False)
    with pytest.raises(UserError, match=rf"of the 100 clips of 1 steps, {allowed} may: ") as error:
        enter(SkippedClips(tmp_path, "pretrain"), 0, range(allowed + 1), rate=rate, window=1, global_batch=100)
    assert ("1 clip does not decode" in str(error.value)) == (allowed == 0)


@pytest.mark.parametrize(
    ("earlier", "refused"),
    [
        (20, True),  # of the same step, told by another rank's batch
        (19, True),
        (11, True),  # the first step of a window of ten that ends with 20
        (10, False),
        (21, False),  # of a step to come, which a resumed run has yet to reach
    ],
)
def test_the_window_ends_with_the_step_and_has_its_length(earlier: int, refused: bool, tmp_path: Path) -> None:
    book = SkippedClips(tmp_path, "pretrain")
    enter(book, earlier, [0], rate=0.01)
    if refused:
        with pytest.raises(UserError, match="2 clips do not decode"):
            enter(book, 20, [1], rate=0.01)
    else:
        enter(book, 20, [1], rate=0.01)


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, "; and 1 more"), (7, "; and 3 more")])
def test_an_error_names_four_clips(count: int, more: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        enter(SkippedClips(tmp_path, "pretrain"), 0, range(count), rate=0)
    named = [f"data set 'left', record k{slot} of x.tar (step 0): unreadable" for slot in range(4)]
    assert error.value.what.endswith("0 may: " + "; ".join(named) + more)


def test_slots_of_a_step_are_counted_and_clips_of_a_data_set(tmp_path: Path) -> None:
    book = SkippedClips(tmp_path, "pretrain")
    faults = FaultsConfig(max_rate=0.5)
    rows = [failure(4, 2), failure(4, 1, cause="time limit"), failure(4, 1, record=3)]
    assert [row.slot for row in book.enter(rows, step=4, global_batch=10, faults=faults, write=True)] == [1, 1, 2]
    enter(book, 5, [0], rate=0.5)
    assert [book.substituted(step) for step in (3, 4, 5)] == [
        {"substituted": 0},
        # Slot 1 lost two clips, and is one slot.
        {"substituted": 2, "substituted/time limit": 1, "substituted/unreadable": 2},
        {"substituted": 1, "substituted/unreadable": 1},
    ]
    assert book.counts() == {("left", "unreadable"): 3, ("left", "time limit"): 1}
    assert [json.loads(line)["slot"] for line in book.path.read_text().splitlines()] == [1, 1, 2, 0]


def test_ranks_that_do_not_write_know_the_same(tmp_path: Path) -> None:
    book = SkippedClips(tmp_path, "pretrain")
    enter(book, 4, [0], rate=0.5, write=False)
    assert not book.path.exists()
    assert book.known() == {(4, 0, "left", 7): ("unreadable", "")}
