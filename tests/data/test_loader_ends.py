"""How a rank's loader ends its workers: those that hang are killed before DataLoader would wait for each of them."""

import signal
import threading
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.processes import LIMIT_S
from vjepa_scale.core.errors import PassingError
from vjepa_scale.data import loader
from vjepa_scale.data.loader import ClipsLost, Prefetched
from vjepa_scale.data.substitution import Place
from vjepa_scale.data.watchdog import Stuck
from vjepa_scale.run.failures import NothingSaved

KILLED_FIRST = ["kill 0", "kill 1", "kill 2", "shutdown", "kill 0", "kill 1", "kill 2"]
CLIP = Place(3, 1, "a", 7)


@pytest.mark.parametrize(
    ("raised", "stuck", "lost", "expected", "order"),
    [
        (NothingSaved("SIGUSR2", "stopped"), None, {}, NothingSaved, KILLED_FIRST),
        (NothingSaved("SIGUSR2", "stopped"), None, {CLIP: ("crash", "")}, NothingSaved, KILLED_FIRST),
        (KeyboardInterrupt(), None, {}, KeyboardInterrupt, KILLED_FIRST),
        (RuntimeError("a worker exited"), Stuck(1, 5, "sleeping", CLIP, 9.0), {}, PassingError, KILLED_FIRST),
        # Its other workers go on: they end by themselves.
        (RuntimeError("a worker exited"), None, {CLIP: ("crash", "")}, ClipsLost, KILLED_FIRST[3:]),
    ],
)
def test_what_ends_a_wait_and_the_workers(
    raised: BaseException,
    stuck: Stuck | None,
    lost: dict[Place, tuple[str, str]],
    expected: type[BaseException],
    order: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal's end is never taken for a lost clip, which would start new workers instead of ending the rank."""
    calls: list[str] = []

    class Iterator:
        _workers = tuple(
            SimpleNamespace(is_alive=lambda: True, kill=lambda number=number: calls.append(f"kill {number}"))
            for number in range(3)
        )

        def __next__(self) -> int:
            raise raised

        def _shutdown_workers(self) -> None:
            calls.append("shutdown")

    watch = SimpleNamespace(stuck=stuck, lost=lambda: lost, stop=lambda: None)
    monkeypatch.setattr(loader, "WorkerWatchdog", lambda *_, **__: watch)
    monkeypatch.setattr(loader.DataLoader, "__iter__", lambda _: Iterator())
    board: Any = object()
    with pytest.raises(expected):
        next(iter(Prefetched(abs, [1], workers=0, prefetch=1, board=board)))
    assert calls == order


def _hangs(_: int) -> None:
    threading.Event().wait()


@pytest.mark.distributed
def test_workers_that_hang_are_dead_before_dataloader_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones; and nothing inside DataLoader takes the signal's exception for an error of a worker."""
    codes: list[int | None] = []
    whole = _MultiProcessingDataLoaderIter._shutdown_workers

    def looked_at(iterator: Any) -> None:
        if not codes:
            for worker in iterator._workers:
                worker.join(LIMIT_S)
                codes.append(worker.exitcode)
        whole(iterator)

    def end_wait(_: int, __: FrameType | None) -> None:
        if not items._waits:  # the workers are being started
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            return
        raise NothingSaved("SIGUSR2", "stopped")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", looked_at)
    items = Prefetched(_hangs, range(9), workers=2, prefetch=1)
    before = signal.signal(signal.SIGALRM, end_wait)
    try:
        waits = iter(items)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(NothingSaved):
            next(waits)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        items.close()
    assert codes == [-signal.SIGKILL] * 2
