"""Detects workers that hang or crash inside a decoder, and reports which clip caused it.

A call that hangs inside C cannot be interrupted in its own process, and may hold the interpreter's lock. So each
worker writes the clip that it is about to decode to a board in shared memory. A thread of the rank reads the board and
kills a worker whose line has not changed for too long.

A worker can also hang outside a decoder: in a read from a file server, or because it was stopped. That is no fault of
the clip, so no clip is replaced. The limit is longer, and counts only while the rank waits for that worker's batch.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess

import psutil
from torch.utils.data import get_worker_info

from vjepa_scale.core.worker_pool import worker_context
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.substitution import CRASH, TIME_LIMIT, Place

_LINE = 6  # serial number, step, slot, data set, record, number of clips that it has begun to read
_POLL_S = 0.25
# Signals that a decoder's bugs end a process with. Not SIGKILL (out of memory) and not SIGBUS (/dev/shm is full).
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class DecodeStatus:
    """One line per worker: the clip that it decodes now. It is pickled to each worker at its start.

    names: of the data sets
    """

    def __init__(self, names: Sequence[str], workers: int) -> None:
        self._names = list(names)
        self._lines = worker_context().RawArray("q", _LINE * workers)

    @contextmanager
    def decoding(self, ref: ClipRef) -> Iterator[None]:
        """Context manager of a worker around the decoding of one clip. Does nothing in the rank itself."""
        info = get_worker_info()
        if info is None:
            yield
            return
        at, lines = _LINE * info.id, self._lines
        self._write(at, ref)
        lines[at] += 1  # odd: decoding
        try:
            yield
        finally:
            lines[at] += 1

    def reading(self, ref: ClipRef) -> None:
        """A worker is about to read this clip's bytes. Does nothing in the rank itself."""
        if (info := get_worker_info()) is not None:
            self._write(_LINE * info.id, ref)
            self._lines[_LINE * (info.id + 1) - 1] += 1

    def _write(self, at: int, ref: ClipRef) -> None:
        self._lines[at + 1 : at + 5] = [ref.step, ref.slot, self._names.index(ref.dataset), ref.record]

    def moves(self, worker: int) -> tuple[int, int]:
        """Returns what changes whenever a worker comes further."""
        return self._lines[_LINE * worker], self._lines[_LINE * (worker + 1) - 1]

    def serial(self, worker: int) -> int | None:
        """Returns the serial number of a worker's current decoding; None where it decodes nothing."""
        serial = self._lines[_LINE * worker]
        return serial if serial % 2 else None

    def place(self, worker: int) -> Place:
        step, slot, dataset, record = self._lines[_LINE * worker + 1 : _LINE * worker + 5]
        return Place(step, slot, self._names[dataset], record)


@dataclass(frozen=True)
class Awaited:
    """The batch that the rank waits for. item: its number; worker: who loads it"""

    item: int
    worker: int


@dataclass(frozen=True)
class Stuck:
    """A worker that was killed while the rank waited for its batch in vain.

    last:  the clip that it began last; None: no clip yet
    state: of its process, as the kernel calls it
    """

    worker: int
    pid: int
    state: str
    last: Place | None
    seconds: float

    def __str__(self) -> str:
        clip = "has begun no clip" if self.last is None else f"began record {self.last.record} of {self.last.dataset!r}"
        return (
            f"loader worker {self.worker} (pid {self.pid}, {self.state}) has come no further for {self.seconds:.0f} s; "
            f"it {clip}{'' if self.last is None else ' last'}"
        )


class WorkerWatchdog:
    """Kills workers that decode one clip for longer than ``limit_s``, from its construction until ``stop``.

    awaited: returns the batch that the rank waits for; None while it waits for none
    item_limit_s: of a worker that comes no further while its batch is awaited; it becomes ``stuck``
    """

    def __init__(
        self,
        board: DecodeStatus,
        workers: Sequence[BaseProcess],
        *,
        limit_s: float,
        awaited: Callable[[], Awaited | None] = lambda: None,
        item_limit_s: float = float("inf"),
    ) -> None:
        self._board, self._workers, self._limit_s = board, workers, limit_s
        self._awaited, self._item_limit_s = awaited, item_limit_s
        self.stuck: Stuck | None = None
        self._killed: dict[int, Place] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="silence-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def lost(self) -> dict[Place, tuple[str, str]]:
        """Returns the clips that workers were killed for or crashed on: place -> (cause, detail)."""
        found = dict.fromkeys(self._killed.values(), (TIME_LIMIT, f"more than {self._limit_s:g} s"))
        for number, worker in enumerate(self._workers):
            if number in self._killed or self._board.serial(number) is None:
                continue
            worker.join(_POLL_S)  # its connection may close before its exit status is available
            code = worker.exitcode
            if code is not None and -code in _CRASHES:
                found[self._board.place(number)] = (CRASH, signal.Signals(-code).name)
        return found

    def _watch(self) -> None:
        silent_s = [0.0] * len(self._workers)
        serials = [self._board.serial(number) for number in range(len(self._workers))]
        seen: tuple[Awaited, tuple[int, int]] | None = None
        idle_s = 0.0
        then = time.monotonic()
        while not self._stopped.wait(_POLL_S):
            # Counts turns of this thread, not wall-clock time: a suspended job must not count as hanging.
            turn_s, then = min(time.monotonic() - then, 2 * _POLL_S), time.monotonic()
            for number, worker in enumerate(self._workers):
                serial = self._board.serial(number)
                if serial is None or serial != serials[number]:
                    silent_s[number] = -turn_s
                silent_s[number] += turn_s
                serials[number] = serial
                ended = wait_for([worker.sentinel], timeout=0)  # not is_alive(): only one thread may read the status
                if silent_s[number] > self._limit_s and number not in self._killed and not ended:
                    self._killed[number] = self._board.place(number)
                    worker.kill()
            awaited = self._awaited()
            now = None if awaited is None else (awaited, self._board.moves(awaited.worker))
            idle_s = idle_s + turn_s if now == seen else 0.0
            seen = now
            if awaited is not None and idle_s > self._item_limit_s and self.stuck is None:
                self._give_up(awaited.worker, idle_s)

    def _give_up(self, number: int, seconds: float) -> None:
        worker = self._workers[number]
        if number in self._killed or wait_for([worker.sentinel], timeout=0):
            return  # it has ended, which the rank sees
        try:
            state = str(psutil.Process(worker.pid).status())
        except psutil.Error:
            state = "gone"
        last = self._board.place(number) if any(self._board.moves(number)) else None
        self.stuck = Stuck(number, worker.pid or 0, state, last, seconds)
        worker.kill()
