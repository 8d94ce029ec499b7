"""Stacks of a rank and of its loader's workers, which hang."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from tests.processes import LIMIT_S
from vjepa_scale.core.stacks import write_stacks
from vjepa_scale.data.loader import Prefetched


def hangs_until(there: Path, index: int) -> tuple[int, int]:
    """The second item comes when the file is there."""
    while index == 1 and not there.exists():
        time.sleep(0.01)
    return index, os.getpid()


def stacks(file: Path, patience_s: float) -> str:
    with file.open("wb") as handle:
        write_stacks(handle, patience_s=patience_s)
    return file.read_text()


def test_a_worker_that_hangs_shows_where_and_one_that_is_stopped_its_state(tmp_path: Path) -> None:
    there, file = tmp_path / "there", tmp_path / "stacks.txt"
    loader = Prefetched(partial(hangs_until, there), range(2), workers=1, prefetch=2)
    try:
        items = iter(loader)
        _, worker = next(items)
        deadline = time.monotonic() + LIMIT_S
        while "in hangs_until" not in (text := stacks(file, LIMIT_S)):
            assert time.monotonic() < deadline, text
        own, _, of_worker = text.partition("\n-- ")
        assert own.startswith(f"-- this process, {os.getpid()} (threads: ")
        assert "in stacks\n" in own
        assert "in hangs_until" not in own
        assert of_worker.startswith(f"loader worker 0, process {worker}\n")

        os.kill(worker, signal.SIGSTOP)
        try:
            assert "no answer in 0.2 s: the process is stopped\n" in stacks(file, 0.2)
        finally:
            os.kill(worker, signal.SIGCONT)
        there.touch()
        assert next(items) == (1, worker)  # the signals did it no harm
    finally:
        loader.close()
