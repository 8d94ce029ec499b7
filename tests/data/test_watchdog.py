"""The watchdog of a loader's workers, in a time of its own: which silence ends a worker, and which does not."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vjepa_scale.data import watchdog
from vjepa_scale.data.substitution import Place
from vjepa_scale.data.watchdog import Awaited, DecodeStatus, WorkerWatchdog

TURN_S = 0.25  # between two looks
LIMIT_S = 2.0  # eight turns


class Worker:
    """sentinel: itself, for ``wait_for``"""

    def __init__(self, *, ended: bool = False) -> None:
        self.sentinel, self.ended, self.killed = self, ended, 0
        self.pid = 2**22 + 1  # no process has it

    def kill(self) -> None:
        self.killed += 1


class Board:
    """The serial numbers of all workers, turn by turn."""

    def __init__(self, *turns: Sequence[int | None]) -> None:
        self._turns = turns
        self.turn = 0

    def serial(self, number: int) -> int | None:
        serial = self._of_turn(number)
        return serial if serial is not None and serial % 2 else None

    def moves(self, number: int) -> tuple[int, int]:
        return self._of_turn(number) or 0, 0

    def _of_turn(self, number: int) -> int | None:
        return self._turns[min(self.turn, len(self._turns) - 1)][number]

    def place(self, number: int) -> Place:
        return Place(self.turn, number, "a", 7)


def watched(
    board: Board, workers: Sequence[Worker], turns: int, seconds: Iterator[float] | None = None, **limits: Any
) -> Any:
    """The watchdog after so many turns, of TURN_S each or of ``seconds``. Nothing here waits."""
    now = [100.0]

    def wait(seconds_: float) -> bool:
        assert seconds_ == TURN_S
        board.turn += 1
        now[0] += TURN_S if seconds is None else next(seconds)
        return board.turn > turns

    with pytest.MonkeyPatch.context() as patch:
        idle = SimpleNamespace(start=lambda: None, join=lambda: None)
        event = SimpleNamespace(wait=wait, set=lambda: None)
        patch.setattr(watchdog, "threading", SimpleNamespace(Thread=lambda **_: idle, Event=lambda: event))
        patch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(watchdog, "wait_for", lambda sentinels, timeout: [s for s in sentinels if s.ended])
        dog = WorkerWatchdog(cast("DecodeStatus", board), cast("Any", workers), limit_s=LIMIT_S, **limits)
        dog._watch()
    return dog


@pytest.mark.parametrize(("turns", "killed"), [(7, 0), (8, 0), (9, 1), (30, 1)])
def test_a_worker_is_killed_after_the_limit_and_once(turns: int, killed: int) -> None:
    """Silent since the first look: after eight turns that is the limit, and no more than it."""
    worker = Worker()
    dog = watched(Board([1]), [worker], turns)
    assert worker.killed == killed
    assert dog._killed == ({0: Place(9, 0, "a", 7)} if killed else {})


def test_a_busy_worker_is_not_killed_for_the_sum_of_its_clips() -> None:
    """A clip every five turns, for fifty: each below the limit."""
    worker = Worker()
    watched(Board(*([2 * (turn // 5) + 1] for turn in range(51))), [worker], 50)
    assert not worker.killed


def test_a_worker_between_two_clips_is_not_silent() -> None:
    worker = Worker()
    watched(Board([None]), [worker], 50)
    assert not worker.killed
    # Nor does what it waited count for its next clip: of eight turns after the one in which it was seen.
    worker = Worker()
    watched(Board(*[[None]] * 20, [1]), [worker], 28)
    assert not worker.killed
    worker = Worker()
    watched(Board(*[[None]] * 20, [1]), [worker], 29)
    assert worker.killed == 1


def test_workers_are_judged_one_by_one() -> None:
    workers = [Worker(), Worker(), Worker(ended=True), Worker()]
    dog = watched(Board(*([turn * 2 + 1, 5, 5, None] for turn in range(21))), workers, 20)
    assert [worker.killed for worker in workers] == [0, 1, 0, 0]  # the third had ended by itself
    assert list(dog._killed) == [1]


def test_a_job_that_was_suspended_has_not_been_silent() -> None:
    """One turn of an hour counts as two turns: six of eight are not yet the limit."""
    worker = Worker()
    watched(Board([1]), [worker], 7, iter([TURN_S, 3600.0, *[TURN_S] * 9]))
    assert not worker.killed
    worker = Worker()
    watched(Board([1]), [worker], 8, iter([TURN_S, 3600.0, *[TURN_S] * 9]))
    assert worker.killed == 1


# -- a worker that hangs outside a decoder --------------------------------------------------------------------------

ITEM_S = 4.0  # sixteen turns


@pytest.mark.parametrize(
    ("moves", "awaited", "turns", "stuck"),
    [
        # Its batch is awaited, and it comes no further: the first turn sees it, sixteen more are the limit.
        ([[None, 4]], [Awaited(0, 1)], 17, None),
        ([[None, 4]], [Awaited(0, 1)], 18, 1),
        ([[None, 4]], [None], 60, None),  # the rank is at work: a worker that has loaded ahead has nothing to do
        ([[None, 4]], [None] * 20 + [Awaited(0, 1)], 36, None),  # nor does that time count for the next wait
        ([[None, 4]], [None] * 20 + [Awaited(0, 1)], 38, 1),
        ([[None, 4]], [Awaited(turn // 10, 1) for turn in range(60)], 58, None),  # one batch after another
        ([[None, 2 * (turn // 10)] for turn in range(60)], [Awaited(0, 1)], 58, None),  # one clip after another
        ([[None, 2 * (turn // 10)] for turn in range(60)], [Awaited(0, 0)], 18, 0),  # another worker's is awaited
    ],
)
def test_a_worker_that_comes_no_further_is_killed_and_named(
    moves: list[list[int | None]], awaited: list[Awaited | None], turns: int, stuck: int | None
) -> None:
    workers, board = [Worker(), Worker()], Board(*moves)
    dog = watched(
        board, workers, turns, awaited=lambda: awaited[min(board.turn, len(awaited) - 1)], item_limit_s=ITEM_S
    )
    assert [worker.killed for worker in workers] == [int(number == stuck) for number in range(2)]
    assert (dog.stuck.worker if dog.stuck else None) == stuck
    assert not dog.lost()  # no clip is to blame


def test_a_worker_that_has_ended_is_the_loaders_to_notice() -> None:
    worker = Worker(ended=True)
    dog = watched(Board([4]), [worker], 60, awaited=lambda: Awaited(0, 0), item_limit_s=ITEM_S)
    assert dog.stuck is None
    assert not worker.killed


def test_the_real_thread_ends_when_it_is_told() -> None:
    dog = WorkerWatchdog(cast("DecodeStatus", Board([1])), cast("Any", []), limit_s=LIMIT_S)
    assert dog._thread.is_alive()
    dog.stop()
    assert not dog._thread.is_alive()
