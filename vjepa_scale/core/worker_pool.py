"""Starts worker processes, ends them together with their parent, and ends trees of other processes.

Workers are forked from a fork server, which imports their modules once, before any thread exists. Forking the trainer
itself, with its threads and devices, would be unsafe. Workers that decode videos for shards need no PyTorch.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import psutil

from vjepa_scale.core import log
from vjepa_scale.core.errors import UserError

# The maximum bytes of a Unix socket's path (Linux: 108 with the terminating zero), and the bytes that multiprocessing
# appends to the temporary folder: /pymp-xxxxxxxx/listener-xxxxxxxx.
_SOCKET_PATH, _SOCKET_NAME = 107, 32
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

# Parameters of glibc's mallopt: the size from which blocks are mapped by the system; the free memory kept at the end.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_BEAT_S = 1.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crashed:
    """The result of an item that killed its worker (a crash inside a native library)."""


class Silent:
    """The result of an item whose worker was killed because it made no progress for too long."""


def worker_context(*preload: str) -> ForkServerContext:
    """Returns the multiprocessing context of all worker processes.

    preload: modules that the fork server imports; with any, the server is started here if it is not running
    Raises UserError if no folder has a short enough path for their sockets.
    """
    _choose_socket_folder()
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
        with _safe_path():
            forkserver.ensure_running()
    return context


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keeps Python processes that are started inside from importing from the current folder.

    multiprocessing starts its server and its resource tracker by ``python -c``, which would import from it: a
    ``queue.py`` among a user's videos would replace the standard library's.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _choose_socket_folder() -> None:
    """Makes multiprocessing put its Unix sockets into a folder with a short path, whatever the length of TMPDIR.

    multiprocessing gets the folder from tempfile once, and workers inherit it. (Python 3.14 does the same by itself.)
    """
    usual = tempfile.gettempdir()
    fits = len(os.fsencode(usual)) + _SOCKET_NAME <= _SOCKET_PATH
    for folder in (usual, *_SHORT_FOLDERS) if fits else _SHORT_FOLDERS:
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # does nothing if there is one already
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise UserError(
        f"no folder for the sockets of worker processes: their paths may have {_SOCKET_PATH} bytes, and none of "
        f"{', '.join(_SHORT_FOLDERS)} can be written",
        where=f"TMPDIR {usual}",
        fix=f"set TMPDIR to a folder of at most {_SOCKET_PATH - _SOCKET_NAME} bytes that can be written",
    )


def start_fork_server(*preload: str, deaf_to: Collection[signal.Signals]) -> None:
    """Starts the server with these signals blocked, in its workers too. preload: as for ``worker_context``.

    A cluster manager signals every process of a job, and the rank needs its workers' data to finish its step.
    Signals that arrive during the start reach this process when the server is running. They are blocked and not
    ignored: children inherit both, but this process would lose signals that it ignores meanwhile.
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
        with _safe_path():
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)  # ensure_running has unblocked SIGTERM
        worker_context(*preload)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf_to)


def remove_socket_folder() -> None:
    """Removes this process's folder of workers' sockets. For a process that ends by ``os._exit``."""
    for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is util._remove_temp_dir:  # type: ignore[attr-defined]
            with suppress(OSError):
                finalizer()  # does nothing in a fork of the process that made the folder


def start_worker(process: log.Process) -> None:
    """Initialises a worker: logging, one thread, ignores Ctrl-C, and exits when its parent ends, even by SIGKILL.

    process: the name under which it logs
    The worker's parent by pid is the fork server, which lives as long as any of its children. A watchdog that
    checks the parent's pid (as DataLoader's own does) would therefore never fire.
    """
    log.apply(process)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "start_worker is for worker processes"
    threading.Thread(target=_die_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees.

    A clip's pictures are tens of megabytes. glibc returns such blocks to the system at once and gets zeroed pages for
    the next clip, which costs 5 % of a loader's CPU time (benchmarks/loader.py). Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(setting, 2**30)


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def map_in_workers(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, silence_s: float | None = None
) -> Iterator[tuple[int, Result | Crashed | Silent]]:
    """Yields (number of the item, function(item)) for every item, as they finish.

    items: read as workers become free, never all at once
    silence_s: a worker that has not called ``heartbeat`` for so many seconds is killed, and its item yields Silent
    Other workers may have killed a worker by using up the memory. So its item runs again at the end, alone, and
    yields Crashed only if it kills its worker again. Exceptions propagate.
    """
    suspects = list[tuple[int, Item]]()
    pool = _Pool(function, silence_s)
    try:
        for task, result in pool.run(enumerate(items), workers):
            if isinstance(result, Crashed):
                suspects.append(task)
            else:
                yield task[0], result
        for suspect in suspects:
            yield from ((number, result) for (number, _), result in pool.run(iter([suspect]), 1))
    finally:
        pool.end()


def heartbeat() -> None:
    """In a worker: reports progress to the parent. In any other process: does nothing."""
    if _line is not None:
        _line.heartbeat()


class _Line:
    """A worker's end of its pipe: sends heartbeats, at most one a second, and results."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._sent_at = time.monotonic()

    def heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._sent_at > _BEAT_S:
            self._sent_at = now
            self._connection.send(None)

    def send(self, result: object, error: Exception | None = None) -> None:
        self._sent_at = time.monotonic()
        self._connection.send((result, error))


_line: _Line | None = None


def _work(function: Callable[[Any], Any], connection: "Connection[Any, Any]", process: log.Process) -> None:
    """The main loop of a worker: receives an item, sends its result, until the pipe is closed."""
    global _line
    start_worker(process)
    _line = _Line(connection)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = function(item)
        except Exception as error:  # noqa: BLE001 (the parent raises it again)
            error.add_note("".join(traceback.format_exception(error)))
            _line.send(None, error)
        else:
            _line.send(result)


class _Worker:
    def __init__(self, function: Callable[[Any], Any], number: int) -> None:
        context = worker_context(getattr(function, "func", function).__module__)  # also for a partial
        self.connection, theirs = context.Pipe()
        logged = log.current().worker(number)
        self._process = context.Process(target=_work, args=(function, theirs, logged), daemon=True)
        self._process.start()
        theirs.close()  # then the pipe ends when the worker dies
        self.task: Any = None
        self.silent_s = 0.0

    def give(self, task: tuple[int, Any]) -> None:
        self.task, self.silent_s = task, 0.0
        self.connection.send(task[1])

    def kill(self) -> None:
        self._process.kill()
        self.connection.close()
        self._process.join(timeout=1)  # does not wait for one that hangs in the kernel (a dead file server)


class _Pool:
    """Workers that have one item each. So the item is known when a worker dies or becomes silent."""

    def __init__(self, function: Callable[[Any], Any], silence_s: float | None) -> None:
        self._function, self._silence_s = function, silence_s
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}
        self._started = itertools.count()

    def run(self, tasks: Iterator[tuple[int, Any]], width: int) -> Iterator[tuple[tuple[int, Any], Any]]:
        """Yields (task, result) as they finish. A task is (number, item)."""
        turn_s = None if self._silence_s is None else min(_BEAT_S, self._silence_s / 4)
        while True:
            for task in itertools.islice(tasks, width - len(self._busy)):
                self._give(task)
            if not self._busy:
                return
            began = time.monotonic()
            ready = wait_for(list(self._busy), timeout=turn_s)
            # Counts turns of this loop, not wall time: a suspended job has not been silent.
            waited_s = min(time.monotonic() - began, 2 * (turn_s or 0.0))
            for worker in list(self._busy.values()):
                if worker.connection in ready:
                    yield from self._receive(worker)
                elif self._silence_s is not None and self._became_silent(worker, waited_s):
                    yield worker.task, Silent()

    def _give(self, task: tuple[int, Any]) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        try:
            worker.give(task)
        except OSError:  # it died while it was idle
            worker.kill()
            worker = self._start()
            worker.give(task)
        self._busy[worker.connection] = worker

    def _start(self) -> _Worker:
        return _Worker(self._function, next(self._started))

    def _receive(self, worker: _Worker) -> Iterator[tuple[tuple[int, Any], Any]]:
        worker.silent_s = 0.0
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._discard(worker)
            yield worker.task, Crashed()
            return
        if message is None:  # a heartbeat
            return
        del self._busy[worker.connection]
        self._idle.append(worker)
        result, error = message
        if error is not None:
            raise error
        yield worker.task, result

    def _became_silent(self, worker: _Worker, waited_s: float) -> bool:
        assert self._silence_s is not None
        worker.silent_s += waited_s
        if worker.silent_s <= self._silence_s:
            return False
        self._discard(worker)
        return True

    def _discard(self, worker: _Worker) -> None:
        del self._busy[worker.connection]
        worker.kill()

    def end(self) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()


# -- ending processes and all their descendants ----------------------------------------------------


# Seconds that the kernel may take to end a killed process.
_KILLED_S = 5.0


def process_tree(root: int | psutil.Process) -> list[psutil.Process]:
    """Returns a process (or the one with this id), then all its descendants; empty if it has ended."""
    try:
        process = psutil.Process(root) if isinstance(root, int) else root
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(tree: Sequence[psutil.Process]) -> None:
    """Kills processes (SIGKILL), parents first, so that they cannot start others. Does not wait for them."""
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end_processes(tree: Sequence[psutil.Process], *, patience_s: float) -> bool:
    """Sends SIGTERM to the root of a process tree, and SIGKILL to those that are left after ``patience_s`` seconds.

    Returns whether all ended without SIGKILL.
    """
    deadline = time.monotonic() + patience_s
    with suppress(psutil.NoSuchProcess):
        tree[0].terminate()
    psutil.wait_procs(tree[:1], timeout=patience_s)
    _, alive = psutil.wait_procs(tree, timeout=max(1.0, deadline - time.monotonic()))
    kill_processes(alive)
    psutil.wait_procs(alive, timeout=_KILLED_S)
    return not alive
