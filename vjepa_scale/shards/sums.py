"""Checksums: taken while the same bytes are written, so that a copy is as fast as the slowest of the three; or of a
file, however long it is.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from vjepa_scale.core.worker_pool import beat

_WORTH_A_THREAD = 2**16  # bytes
_BLOCK = 2**20


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


def sha256_beating(path: Path) -> str:
    """Of a file, of which there may be more than can be read within a time limit."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
            beat()
    return digest.hexdigest()
