"""Writes the stacks of all threads of this process and of its loader workers, while they are stuck.

Python's faulthandler prints the stacks, of a worker in a signal handler: also if the worker is inside a library, or
holds Python's lock for ever. It prints into a file in memory, which the rank reads through ``/proc``. So workers need
neither a file of their own nor a connection. Workers only answer on Linux. Does not import PyTorch.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

# No worker has another use for it. NCCL uses it, in ranks only.
_SIGNAL = signal.SIGUSR1
_NAME = "vjepa_stacks of "
_POLL_S = 0.05


def answer_with_stacks(name: str) -> None:
    """In a worker: from now on the process that started it can get its stacks, under this name."""
    if hasattr(os, "memfd_create"):
        # The handler needs the open file as long as the process lives.
        faulthandler.register(_SIGNAL, file=os.memfd_create(_NAME + name), all_threads=True)


def write_stacks(file: BinaryIO, *, patience_s: float = 2.0) -> None:
    """Writes the stacks of this process and of its workers that answer. file: open for writing, on disk

    patience_s: as of ``write_worker_stacks``
    """
    write_own_stacks(file)
    write_worker_stacks(file, patience_s=patience_s)


def write_own_stacks(file: BinaryIO) -> None:
    """Writes the stacks of this process, at once. file: open for writing, on disk"""
    names = ", ".join(f"{thread.ident:#x} {thread.name}" for thread in threading.enumerate() if thread.ident)
    file.write(f"-- this process, {os.getpid()} (threads: {names})\n".encode())
    file.flush()
    faulthandler.dump_traceback(file.fileno(), all_threads=True)
    file.seek(0, os.SEEK_END)


def write_worker_stacks(file: BinaryIO, *, patience_s: float = 2.0) -> None:
    """Writes the stacks of the workers of this process, which are asked at the same time.

    patience_s: seconds in which all workers have to answer. One that does not is stopped, or blocked in the kernel: its
                state is written instead
    """
    asked = []
    for worker, name, answer in _workers():
        with suppress(psutil.Error, OSError):  # it has ended meanwhile
            before = len(answer.read_bytes())
            worker.send_signal(_SIGNAL)
            asked.append((worker, name, answer, before))
    deadline = time.monotonic() + patience_s
    for worker, name, answer, before in asked:
        with suppress(psutil.Error, OSError):
            printed = _printed(answer, before, deadline)
            words = printed or f"no answer in {patience_s:g} s: the process is {worker.status()}\n".encode()
            file.write(f"\n-- {name}, process {worker.pid}\n".encode() + words)
    file.flush()


def _workers() -> Iterator[tuple[psutil.Process, str, Path]]:
    """Yields each process below this one that has called ``answer_with_stacks``, its name, and the file it prints to.

    A worker is a child of the fork server.
    """
    for worker in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.Error):
            for handle in Path(f"/proc/{worker.pid}/fd").iterdir():
                _, found, name = os.readlink(handle).partition(_NAME)
                if found and _handles_the_signal(worker.pid):
                    yield worker, name.removesuffix(" (deleted)"), handle


def _handles_the_signal(pid: int) -> bool:
    """Returns whether the signal has a handler. It would end a worker that is about to register one."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")  # some sandboxes
    return bool(int(caught.split()[1], 16) >> (_SIGNAL - 1) & 1)


def _printed(answer: Path, before: int, deadline: float) -> bytes:
    """Returns what a worker prints after so many bytes, when it has finished or at the deadline."""
    printed = answer.read_bytes()[before:]
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        earlier, printed = printed, answer.read_bytes()[before:]
        if printed and printed == earlier:  # it has finished
            break
    return printed
