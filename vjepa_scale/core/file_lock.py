"""A lock on a file. The kernel holds it, and releases it however its holder ends."""

import fcntl
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_scale.core.errors import UserError

_POLL_S = 0.2


@contextmanager
def file_lock(path: Path, *, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock of a file, which is made where it is absent; yields whether this process has it.

    patience_s: how long to wait for another holder; infinity: until it is free
    Raises UserError where the file system has no locks, OSError where the file cannot be opened.
    """
    with open(path, "a") as file:
        try:
            held = _lock(file.fileno(), patience_s)
        except OSError as error:
            raise UserError(
                f"this file system has no locks: {error.strerror}", where=path, fix="mount it with flock"
            ) from None
        yield held


def _lock(handle: int, patience_s: float) -> bool:
    if math.isinf(patience_s):
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
