"""Detects workers that hang or crash inside a decoder, and reports which clip caused it.

A call that hangs inside C cannot be interrupted in its own process, and may hold the interpreter's lock. So each
worker writes the clip that it is about to decode to a board in shared memory. A thread of the rank reads the board and
kills a worker whose line has not changed for too long.
"""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess

from torch.utils.data import get_worker_info

from vjepa_scale.core.worker_pool import worker_context
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.substitution import CRASH, TIME_LIMIT, Place

_LINE = 5  # serial number, step, slot, data set, record
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
        lines[at + 1 : at + _LINE] = [ref.step, ref.slot, self._names.index(ref.dataset), ref.record]
        lines[at] += 1  # odd: decoding
        try:
            yield
        finally:
            lines[at] += 1

    def serial(self, worker: int) -> int | None:
        """Returns the serial number of a worker's current decoding; None where it decodes nothing."""
        serial = self._lines[_LINE * worker]
        return serial if serial % 2 else None

    def place(self, worker: int) -> Place:
        step, slot, dataset, record = self._lines[_LINE * worker + 1 : _LINE * (worker + 1)]
        return Place(step, slot, self._names[dataset], record)


class WorkerWatchdog:
    """Kills workers that decode one clip for longer than ``limit_s``, from its construction until ``stop``."""

    def __init__(self, board: DecodeStatus, workers: Sequence[BaseProcess], *, limit_s: float) -> None:
        self._board, self._workers, self._limit_s = board, workers, limit_s
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
