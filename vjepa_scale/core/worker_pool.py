"""Worker processes: how they start, and that they end with the process that wanted them; and ends other processes.

They come from a fork server, which imports what they need once, before any thread exists; forking the trainer itself,
with its threads and devices, would be unsafe. Workers that decode videos for shards need no PyTorch.
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

# The bytes that a Unix socket's path may have (Linux: 108 with the zero at its end), and those that multiprocessing
# adds to the temporary folder: /pymp-xxxxxxxx/listener-xxxxxxxx.
_SOCKET_PATH, _SOCKET_NAME = 107, 32
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

# Of glibc's mallopt: from what size on a block is the system's; how much free memory at the end stays.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_BEAT_S = 1.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crashed:
    """What stands for the result of an item whose worker died of it (a crash inside a native library)."""


class Silent:
    """What stands for the result of an item whose worker made no progress for too long, and was ended."""


def worker_context(*preload: str) -> ForkServerContext:
    """The start method of all worker processes.

    preload: modules that the fork server imports; it is started here where it does not run yet
    Raises UserError where no folder is short enough for their sockets.
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
    """Python processes started inside do not import from the current folder.

    multiprocessing starts its server and its resource tracker by ``python -c``, which would: a ``queue.py`` among a
    user's videos would stand for the standard library's.
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
    """Have multiprocessing put its Unix sockets where their paths fit, whatever the length of TMPDIR.

    It asks tempfile for a folder once; workers inherit the answer. (Python 3.14 does the same by itself.)
    """
    usual = tempfile.gettempdir()
    fits = len(os.fsencode(usual)) + _SOCKET_NAME <= _SOCKET_PATH
    for folder in (usual, *_SHORT_FOLDERS) if fits else _SHORT_FOLDERS:
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # one that is there already is kept
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
    """Start the server now, so that it and its workers never get these signals; preload: as for ``worker_context``.

    A cluster manager signals every process of a job. The rank wants to finish its step then, with data from
    its workers. Signals that arrive meanwhile reach this process when the server is up. (Not ignored, but
    blocked: that is inherited without a moment in which this process would ignore them too.)
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
        with _safe_path():
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)  # Python has just unblocked SIGTERM
        worker_context(*preload)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf_to)


def remove_socket_folder() -> None:
    """Remove this process's folder of workers' sockets, for one that ends by ``os._exit`` and not as Python does."""
    for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is util._remove_temp_dir:  # type: ignore[attr-defined]
            with suppress(OSError):
                finalizer()  # does nothing in a fork of the process that made the folder


def start_worker(process: log.Process) -> None:
    """First thing in a worker: one thread, Ctrl-C left to the parent, and death with it, even by SIGKILL.

    process: as which it logs
    The worker's parent by pid is the fork server, which lives as long as any of its children does; so what
    watches for a lost parent by pid (as DataLoader's own watchdog) would wait for ever.
    """
    log.apply(process)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "start_worker is for worker processes"
    threading.Thread(target=_die_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees.

    A clip's pictures are tens of megabytes. glibc gives such blocks back to the system at once and gets others for the
    next clip, page by page and zeroed: a twentieth of a loader's CPU time (benchmarks/loader.py). Where there is no
    glibc, this does nothing.
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
    """(number of the item, function(item)) for every item, as they finish.

    items: taken as workers become free, never all at once
    silence_s: a worker that has not called ``heartbeat`` for so long is ended, and its item comes back as Silent
    A worker that dies may have died of its neighbours (no memory is left): its item is done again at the end,
    alone, and comes back as Crashed only if it kills a worker then too. Exceptions propagate.
    """
    suspects = list[tuple[int, Item]]()
    crew = _Crew(function, silence_s)
    try:
        for task, result in crew.run(enumerate(items), workers):
            if isinstance(result, Crashed):
                suspects.append(task)
            else:
                yield task[0], result
        for suspect in suspects:
            yield from ((number, result) for (number, _), result in crew.run(iter([suspect]), 1))
    finally:
        crew.end()


def heartbeat() -> None:
    """In a worker: tell whoever waits for it that there is progress. Anywhere else, nothing."""
    if _line is not None:
        _line.heartbeat()


class _Line:
    """A worker's end of its pipe: beats, at most one a second, then the result."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._said = time.monotonic()

    def heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._said > _BEAT_S:
            self._said = now
            self._connection.send(None)

    def send(self, result: object, error: Exception | None = None) -> None:
        self._said = time.monotonic()
        self._connection.send((result, error))


_line: _Line | None = None


def _work(function: Callable[[Any], Any], connection: "Connection[Any, Any]", process: log.Process) -> None:
    """A worker's life: an item comes, a result goes, until the pipe is closed."""
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
        except Exception as error:  # noqa: BLE001 (raised again where the results are wanted)
            error.add_note("".join(traceback.format_exception(error)))
            _line.send(None, error)
        else:
            _line.send(result)


class _Worker:
    def __init__(self, function: Callable[[Any], Any], number: int) -> None:
        context = worker_context(getattr(function, "func", function).__module__)  # of a partial, too
        self.connection, theirs = context.Pipe()
        logged = log.current().worker(number)
        self._process = context.Process(target=_work, args=(function, theirs, logged), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is the pipe's end
        self.task: Any = None
        self.silent_s = 0.0

    def give(self, task: tuple[int, Any]) -> None:
        self.task, self.silent_s = task, 0.0
        self.connection.send(task[1])

    def kill(self) -> None:
        self._process.kill()
        self.connection.close()
        self._process.join(timeout=1)  # one that is stuck in the kernel (a dead file server) is left to it


class _Crew:
    """Workers that have one item each: so it is known whose item it was when one dies or falls silent."""

    def __init__(self, function: Callable[[Any], Any], silence_s: float | None) -> None:
        self._function, self._silence_s = function, silence_s
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}
        self._started = itertools.count()

    def run(self, tasks: Iterator[tuple[int, Any]], width: int) -> Iterator[tuple[tuple[int, Any], Any]]:
        """(task, result) as they finish. A task is (number, item)."""
        turn_s = None if self._silence_s is None else min(_BEAT_S, self._silence_s / 4)
        while True:
            for task in itertools.islice(tasks, width - len(self._busy)):
                self._give(task)
            if not self._busy:
                return
            began = time.monotonic()
            ready = wait_for(list(self._busy), timeout=turn_s)
            # In turns, not by the clock: a job that was suspended has not been silent.
            waited_s = min(time.monotonic() - began, 2 * (turn_s or 0.0))
            for worker in list(self._busy.values()):
                if worker.connection in ready:
                    yield from self._heard(worker)
                elif self._silence_s is not None and self._fell_silent(worker, waited_s):
                    yield worker.task, Silent()

    def _give(self, task: tuple[int, Any]) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        try:
            worker.give(task)
        except OSError:  # it died while it had nothing to do
            worker.kill()
            worker = self._start()
            worker.give(task)
        self._busy[worker.connection] = worker

    def _start(self) -> _Worker:
        return _Worker(self._function, next(self._started))

    def _heard(self, worker: _Worker) -> Iterator[tuple[tuple[int, Any], Any]]:
        worker.silent_s = 0.0
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker)
            yield worker.task, Crashed()
            return
        if said is None:
            return
        del self._busy[worker.connection]
        self._idle.append(worker)
        result, error = said
        if error is not None:
            raise error
        yield worker.task, result

    def _fell_silent(self, worker: _Worker, waited_s: float) -> bool:
        assert self._silence_s is not None
        worker.silent_s += waited_s
        if worker.silent_s <= self._silence_s:
            return False
        self._lose(worker)
        return True

    def _lose(self, worker: _Worker) -> None:
        del self._busy[worker.connection]
        worker.kill()

    def end(self) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()


# -- ending processes with everything that they have started ---------------------------------------


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
