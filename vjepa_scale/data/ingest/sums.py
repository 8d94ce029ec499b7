"""Checksums that are taken while the same bytes are written: a copy is then as fast as the slowest of the three."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

_WORTH_A_THREAD = 2**16  # bytes


class Sha256:
    """A SHA-256 taken by another thread (hashing does not hold the interpreter's lock).

    A block must stay as it is until ``wait`` has returned.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._running: Future[None] | None = None

    def update(self, block: bytes | memoryview) -> None:
        self.wait()
        if len(block) < _WORTH_A_THREAD:
            self._digest.update(block)
        else:
            self._running = _threads().submit(self._digest.update, block)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def hexdigest(self) -> str:
        self.wait()
        return self._digest.hexdigest()


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="sha256")
