"""Ends processes, with everything that they have started."""

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

# How long the kernel may take to end a process that was killed.
_KILLED_S = 5.0


def process_tree(root: int | psutil.Process) -> list[psutil.Process]:
    """A process (or the one of this id), then everything below it; empty where it has ended."""
    try:
        process = psutil.Process(root) if isinstance(root, int) else root
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(tree: Sequence[psutil.Process]) -> None:
    """Kill processes (SIGKILL), parents first: they must not start others. Does not wait for them."""
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end_processes(tree: Sequence[psutil.Process], *, patience_s: float) -> bool:
    """Ask the root of a process tree to end (SIGTERM), and kill what is left of all after ``patience_s`` seconds.

    Returns whether nothing had to be killed.
    """
    deadline = time.monotonic() + patience_s
    with suppress(psutil.NoSuchProcess):
        tree[0].terminate()
    psutil.wait_procs(tree[:1], timeout=patience_s)
    _, alive = psutil.wait_procs(tree, timeout=max(1.0, deadline - time.monotonic()))
    kill_processes(alive)
    psutil.wait_procs(alive, timeout=_KILLED_S)
    return not alive
