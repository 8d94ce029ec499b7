"""Garbage is collected between steps, by their numbers, and never by itself inside a run of steps."""

import gc
import weakref

import pytest

from vjepa_scale.training.garbage import EVERY, SharedCollections


def test_which_steps_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[tuple[int, int]] = []
    step = -1
    was_on = gc.isenabled()
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append((step, generation)))
    with SharedCollections() as garbage:
        assert not gc.isenabled()
        for step in range(2 * EVERY):
            garbage.after(step, saved=step == EVERY + 10)
    assert gc.isenabled() == was_on
    assert collected == [(-1, 2), (EVERY - 1, 1), (EVERY + 10, 2), (2 * EVERY - 1, 1)]


def test_what_there_was_before_is_looked_at_again_only_afterwards() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    before = Cycle()
    gone = weakref.ref(before)
    with SharedCollections() as garbage:
        assert gc.get_freeze_count() > 0
        del before
        garbage.after(0, saved=True)
        assert gone() is not None
        new = Cycle()
        gone_too = weakref.ref(new)
        del new
        garbage.after(1, saved=True)
        assert gone_too() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None


def test_collection_is_on_again_after_an_error() -> None:
    with pytest.raises(KeyError), SharedCollections():
        raise KeyError
    assert gc.isenabled()


def test_a_program_that_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with SharedCollections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
