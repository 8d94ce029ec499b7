"""Worker processes: how they start, and that they end with the process that wanted them.

They come from a fork server, which imports the heavy libraries once, before any thread exists; forking the
trainer itself, with its threads and devices, would be unsafe.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerContext
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crashed:
    """What stands for the result of an item whose worker died of it (a crash inside a native library)."""


def worker_context() -> ForkServerContext:
    """The start method of all worker processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "av", "vjepa_scale.data.loader"])
    return context


def start_fork_server(*, deaf_to: Collection[signal.Signals]) -> None:
    """Start the server now, so that it and its workers never get these signals.

    A cluster manager signals every process of a job. The rank wants to finish its step then, with data from
    its workers. Signals that arrive meanwhile reach this process when the server is up. (Not ignored, but
    blocked: that is inherited without a moment in which this process would ignore them too.)
    """
    worker_context()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)  # Python has just unblocked SIGTERM
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf_to)


def start_worker() -> None:
    """First thing in a worker: one thread, Ctrl-C left to the parent, and death with it, even by SIGKILL.

    The worker's parent by pid is the fork server, which lives as long as any of its children does; so what
    watches for a lost parent by pid (as DataLoader's own watchdog) would wait for ever.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "start_worker is for worker processes"
    threading.Thread(target=_die_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def map_in_workers(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Iterator[tuple[int, Result | Crashed]]:
    """(index, function(item)) for every item, as they finish.

    A worker that dies takes its neighbours' work with it: what was in flight is done again, one item at a
    time, and only the item that kills a worker when alone comes back as Crashed. Exceptions propagate.
    """
    waiting, suspects = deque(range(len(items))), deque[int]()
    while waiting or suspects:
        # Suspects run alone; the others a few per worker ahead.
        alone = not waiting
        queue, width, ahead = (suspects, 1, 1) if alone else (waiting, workers, 4 * workers)
        running: dict[Future[Result], int] = {}
        with ProcessPoolExecutor(width, mp_context=worker_context(), initializer=start_worker) as pool:
            try:
                while queue or running:
                    while queue and len(running) < ahead:
                        running[pool.submit(function, items[queue[0]])] = queue[0]
                        queue.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                if alone:
                    yield from ((index, Crashed()) for index in running.values())
                else:
                    suspects.extend(running.values())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
