"""Workers of ``map_in_workers`` that fall silent, in a time of its own: which silence ends one, and which does not."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vjepa_scale.core import worker_pool
from vjepa_scale.core.worker_pool import Silent, map_in_workers

SILENCE_S = 4.0
TURN_S = 1.0  # a quarter of it, and no more than a second

# What a worker says in the turns of an item: "." nothing, "b" a beat, "r" the result.
Script = str


class Stage:
    """The time, and the workers that were started. jumps: turns that last longer"""

    def __init__(self, jumps: dict[int, float] | None = None) -> None:
        self.now, self.turn, self.jumps = 0.0, 0, jumps or {}
        self.workers: list[Worker] = []

    def wait(self, connections: list["Worker"], timeout: float | None) -> list["Worker"]:
        """Whoever says something in this turn; nobody: the turn passes."""
        assert timeout == TURN_S
        self.turn += 1
        assert self.turn < 1000, "it never ends"
        ready = [worker for worker in connections if worker.next_word()]
        self.now += self.jumps.get(self.turn, TURN_S)
        return ready


class Worker:
    """A worker of the pool, and its own connection."""

    stage: Stage

    def __init__(self, function: object, number: int) -> None:
        self.stage.workers.append(self)
        self.connection, self.task, self.silent_s = self, None, 0.0
        self.killed, self._script, self._word = False, iter(()), ""

    def give(self, task: tuple[int, Script]) -> None:
        self.task, self.silent_s = task, 0.0  # type: ignore[assignment]
        self._script: Iterator[str] = iter(task[1])

    def next_word(self) -> bool:
        self._word = next(self._script)
        return self._word != "."

    def recv(self) -> Any:
        return None if self._word == "b" else ("made", None)

    def kill(self) -> None:
        self.killed = True


def results(
    monkeypatch: pytest.MonkeyPatch,
    *items: Script,
    workers: int = 1,
    jumps: dict[int, float] | None = None,
) -> tuple[list[Any], Stage]:
    """By item: what came back, "Silent" where that is a Silent; and the stage."""
    stage = Stage(jumps)
    monkeypatch.setattr(worker_pool, "_Worker", type("Scripted", (Worker,), {"stage": stage}))
    monkeypatch.setattr(worker_pool, "wait_for", stage.wait)
    monkeypatch.setattr(worker_pool, "time", SimpleNamespace(monotonic=lambda: stage.now))
    found = dict(map_in_workers(str, items, workers=workers, silence_s=SILENCE_S))
    told = [found[number] for number in range(len(items))]
    return ["Silent" if isinstance(value, Silent) else value for value in told], stage


@pytest.mark.fault(
    "data",
    "a decoder hangs while shards are made",
    "the worker is ended after its limit, the video rejected with the reason",
)
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("r", "made"),
        ("...r", "made"),
        ("....r", "made"),  # silent for the limit, and no longer
        (".....r", "Silent"),
        ("....b....b....r", "made"),  # a beat begins the count anew
        ("....b.....r", "Silent"),
        ("b" * 50 + "r", "made"),
    ],
)
def test_a_worker_is_ended_after_the_limit_and_not_before(
    script: Script, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, stage = results(monkeypatch, script)
    assert told == [expected]
    assert len(stage.workers) == 1


def test_silence_does_not_add_up_over_items_and_workers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told, stage = results(monkeypatch, *["...r"] * 20)
    assert told == ["made"] * 20
    assert len(stage.workers) == 1
    told, stage = results(monkeypatch, "...r", ".....r", "....r", "....r")
    assert told == ["made", "Silent", "made", "made"]
    assert len(stage.workers) == 2  # another one in the place of the silent one


def test_one_that_talks_does_not_speak_for_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = results(monkeypatch, "bbbbbbbbr", ".....r", ".b.b.b.r", workers=3)
    assert told == ["made", "Silent", "made"]


def test_a_job_that_was_suspended_has_not_been_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of an hour counts as two turns."""
    assert results(monkeypatch, "..r", jumps={2: 3600.0})[0] == ["made"]
    assert results(monkeypatch, "...r", jumps={2: 3600.0})[0] == ["made"]
    assert results(monkeypatch, "....r", jumps={2: 3600.0})[0] == ["Silent"]


def test_a_worker_says_at_most_one_beat_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], list[object]()
    monkeypatch.setattr(worker_pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    line = worker_pool._Line(SimpleNamespace(send=sent.append))  # type: ignore[arg-type]
    for at, count in ((100.5, 0), (101.0, 0), (101.25, 1), (102.0, 1), (102.5, 2)):
        now[0] = at
        line.heartbeat()
        assert len(sent) == count
    now[0] = 103.25
    line.send("made")
    now[0] = 104.0  # a result is a word, too
    line.heartbeat()
    assert sent == [None, None, ("made", None)]
