"""What a rank's supervisor reads in the run folder: reports of the other ranks, and the end of the rank's log.

A file server may hang, and with it each process that reads. So a supervisor does such work in threads (``aside``), for
which it waits a limited time. With hundreds of ranks, names are listed, and a file is read once. Does not import
PyTorch.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TypeVar

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.run.failures import file_name, read_report

T = TypeVar("T")

_TAIL_BYTES = 64 * 1024
# Words of PyTorch when it ends a rank because a collective has failed, and of a device that has failed itself.
_OF_COLLECTIVES = (b"ProcessGroupNCCL", b"DistBackendError", b"c10::")
_OF_DEVICES = (b"CUDA error",)


def aside(work: Callable[[], T]) -> Future[T]:
    """Starts work in a thread that does not keep this process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (the future has it)
            future.set_exception(error)

    Thread(target=run, name="files", daemon=True).start()
    return future


def result_of(work: Future[T], otherwise: T, *, patience_s: float) -> T:
    """Returns the result of work aside; ``otherwise`` if it has failed, or has none after so many seconds."""
    wait([work], patience_s)
    return work.result() if work.done() and work.exception() is None else otherwise


def say(text: str, *, patience_s: float) -> None:
    """Writes a line to stderr, which may be a file on the same server."""
    result_of(aside(lambda: os.write(2, f"{text}\n".encode())), 0, patience_s=patience_s)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def tells_of_a_lost_peer(log: Path, before: int) -> bool:
    """Returns whether the end of a rank's log says that a collective has ended it. before: bytes of earlier attempts"""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(before, size - _TAIL_BYTES))
        tail = file.read(_TAIL_BYTES)
    return any(word in tail for word in _OF_COLLECTIVES) and not any(word in tail for word in _OF_DEVICES)


class Peers:
    """The reports of this start of the job. All methods read the run folder: call them aside."""

    def __init__(self, failures: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = failures, ranks
        self._name = re.compile(re.escape(file_name(ranks.job)) + r"\.(\d+)\.(?:supervisor\.)?json")
        self._earlier: set[tuple[str, int]] = set()

    def forget_earlier(self) -> None:
        """Leaves out the reports that there are now: they are of a run with the same name."""
        self._earlier = {key for _, key in self._reports()}

    def have_failed(self) -> bool:
        """Returns whether another rank has left a report."""
        return any(rank != self._ranks.rank for rank, _ in self._reports())

    def wait_for_words(self, patience_s: float, *, every_s: float) -> None:
        """Returns when a report names a cause, or each rank has left one, at the latest after so many seconds."""
        read: set[tuple[str, int]] = set()
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            found = list(self._reports())
            if not found or len({rank for rank, _ in found}) >= self._ranks.world_size:
                return
            for _, key in found:
                if key not in read:
                    read.add(key)
                    report = read_report(self._folder / key[0])
                    if report is not None and not report["bystander"]:
                        return
            time.sleep(every_s)

    def _reports(self) -> Iterator[tuple[int, tuple[str, int]]]:
        """Yields rank, and name and inode, of each report; one that is written again has another inode."""
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                key = (entry.name, entry.inode())
                if (match := self._name.fullmatch(entry.name)) and key not in self._earlier:
                    yield int(match[1]), key
