"""One trainer per stage. The lock is the kernel's: it is released however its holder ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.core.ranks import Ranks

# The ranks of a run that was just killed may take a moment to be gone.
PATIENCE_S = 10.0

HELD = "another process is training this stage"


@contextmanager
def only_trainer_of(folder: Path, ranks: Ranks, *, patience_s: float) -> Iterator[None]:
    """Rank 0 holds a stage's lock inside; every rank raises PassingError where another job holds it.

    patience_s: how long the holder has to end. After a node failure it may be our own predecessor, whose
    processes end only when they notice that their peers are gone.
    """
    from vjepa_scale.distributed import process_group  # PyTorch, which launchers do without

    with open(folder / ".lock", "a") as lock:
        if not process_group.from_rank_0(ranks.is_main and _locked(lock, patience_s)):
            raise PassingError(HELD, where=folder, fix="wait for it, or end it")
        yield


def refuse_if_training(folder: Path) -> None:
    """Raise UserError if a stage is being trained now. For launchers, before they touch anything of it."""
    if (folder / ".lock").exists():
        with open(folder / ".lock", "a") as lock:
            if not _locked(lock, PATIENCE_S):
                raise UserError(HELD, where=folder, fix="wait for it, or end it")


def _locked(lock: IO[str], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        except OSError as error:
            raise UserError(
                f"this file system has no locks: {error.strerror}", where=lock.name, fix="mount it with flock"
            ) from None
