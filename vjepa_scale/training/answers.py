"""Answers the supervisor of this rank when it asks whether the rank is alive, and writes the rank's stacks.

The answer says whether the main thread is in a collective: then its peers are what it waits for. A rank that is
stopped, or whose main thread holds Python's lock, does not answer, which is an answer too.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType

from vjepa_scale.core.errors import reason_of
from vjepa_scale.core.files import open_atomic
from vjepa_scale.core.stacks import write_own_stacks, write_worker_stacks
from vjepa_scale.run.progress import Page, part_of, step_of

_TICK_S, _PATIENCE_S = 0.25, 2.0
_INNERMOST = 6
# Where the code of a rank is while a collective blocks it.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/vjepa_scale/distributed/process_group.py")
# In that folder activation checkpointing computes, and checkpoints are written to files.
_NO_COLLECTIVES = ("/torch/distributed/algorithms/", "/torch/distributed/checkpoint/")

_log = logging.getLogger(__name__)


@contextmanager
def answering(page: Page, *, folder: Path, rank: int) -> Iterator[None]:
    """Answers inside, by a thread. Call it in the main thread. folder: the stage's, for ``stacks/``"""
    ended, main = threading.Event(), threading.get_ident()

    def answer() -> None:
        while not ended.wait(_TICK_S):
            if (asked := page.asked) != page.answered:
                # What it reduces is summed over the ranks; on a GPU the wait for that is outside PyTorch's collectives.
                waits = part_of(page) == "reduce" or is_in_a_collective(sys._current_frames().get(main))
                page.waits = int(waits)
                page.answered = asked
                _write(folder, step_of(page), rank, waits)

    thread = threading.Thread(target=answer, name="answers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_PATIENCE_S)  # not for ever: it may be writing to a file server that hangs


def is_in_a_collective(frame: FrameType | None) -> bool:
    """Returns whether one of a thread's innermost calls is of code that waits for other ranks."""
    files = [name.replace("\\", "/") for name in islice(_files(frame), _INNERMOST)]
    return any(
        any(word in name for word in _COLLECTIVES) and not any(word in name for word in _NO_COLLECTIVES)
        for name in files
    )


def _files(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def _write(folder: Path, step: int | None, rank: int, waits: bool) -> None:
    """Writes the rank's own stacks, then appends those of its workers: the rank may be killed while they answer."""
    at = "before the first step" if step is None else f"in step {step}"
    path = folder / "stacks" / f"hung_{'start' if step is None else f'step_{step}'}_rank_{rank}.txt"
    try:
        with open_atomic(path) as file:
            why = "waits for its peers" if waits else "does not go on"
            file.write(f"rank {rank} {why} {at}; its stacks, innermost call first\n\n".encode())
            write_own_stacks(file)
        _log.warning("rank %d %s %s: its stacks are in %s", rank, why, at, path)
        with open(path, "ab") as file:
            write_worker_stacks(file)
    except OSError as error:
        _log.warning("the stacks of rank %d cannot be written: %s", rank, reason_of(error))
