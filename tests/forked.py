"""The local executor of a launch without its starts of Python: ranks are forked from a process that has all imported.

submitit starts a process for a job and one for each rank, 2.6 s of CPU each. A job here is a process of the tests'
fork server, and its ranks are forks of that: the same environment, folder, logs, exit codes and failure reports.
The server that a rank starts for its loader workers is a fork of the rank.
"""

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vjepa_scale.monitor.jobs import this_process


def ended_process() -> dict[str, Any]:
    """``this_process`` for launch.local: one that nobody will find alive, though this process goes on."""
    return this_process() | {"started_ticks": 0}


class ForkedExecutor:
    """As much of submitit.LocalExecutor as vjepa_scale.launch.local uses."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ranks = Path(folder), 1

    def update_parameters(self, *, tasks_per_node: int, **_: object) -> None:
        self._ranks = tasks_per_node

    def submit(self, function: Callable[..., Any], *arguments: object) -> "ForkedJob":
        self._folder.mkdir(parents=True, exist_ok=True)
        words = pickle.dumps((function, arguments))
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_job, args=(words, self._ranks, self._folder, dict(os.environ), os.getcwd()))
        process.start()
        return ForkedJob(process, self._folder)


class ForkedJob:
    """paths: of rank 0's output"""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self._process, self.job_id = process, str(process.pid)
        self.paths = SimpleNamespace(
            stdout=folder / f"{self.job_id}_0_log.out", stderr=folder / f"{self.job_id}_0_log.err"
        )

    def done(self) -> bool:
        return not self._process.is_alive()


def _job(words: bytes, ranks: int, folder: Path, environment: dict[str, str], cwd: str) -> None:
    """Fork the ranks and wait for them; after one has failed the others are left to the launcher, as submitit does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    children = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            _rank(words, rank, ranks, folder)
        children.append(pid)
    signal.signal(signal.SIGTERM, lambda number, _: [os.kill(pid, number) for pid in children])
    for pid in children:
        os.waitpid(pid, 0)


def _rank(words: bytes, rank: int, ranks: int, folder: Path) -> None:
    """One rank; the end of its process, too."""
    code = 1
    try:
        job = str(os.getppid())
        for descriptor, (name, ending) in enumerate((("stdout", "out"), ("stderr", "err")), start=1):
            stream = open(folder / f"{job}_{rank}_log.{ending}", "w", buffering=1)  # noqa: SIM115 (the process's own)
            os.dup2(stream.fileno(), descriptor)
            setattr(sys, name, stream)
        os.environ |= {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
            "SUBMITIT_LOCAL_JOB_ID": job,
        }
        fork_servers()
        function, arguments = pickle.loads(words)  # noqa: S301 (from our own parent)
        function(*arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 (its report is written; the process ends)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_spawn = util.spawnv_passfds  # type: ignore[attr-defined]


def fork_servers() -> None:
    """From now on, the fork server that this process starts is a fork of it. For a process that has imported all."""
    util.spawnv_passfds = _forked_server  # type: ignore[attr-defined]


def _forked_server(path: str, args: Sequence[Any], passed: Sequence[int]) -> int:
    """In place of multiprocessing's start of a process: of its fork server, a fork. Returns its id."""
    server = re.match(r"from multiprocessing\.forkserver import main; main\((\d+), (\d+), ", str(args[-1]))
    if server is None:
        return _spawn(path, args, passed)  # type: ignore[no-any-return]
    if (pid := os.fork()) != 0:
        return pid
    try:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in passed:
                with contextlib.suppress(OSError):  # the one that listed them
                    os.close(descriptor)
        # The rank's own streams are among the closed ones.
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        forkserver._forkserver.__init__()  # type: ignore[misc]  # its lock is held by the call that brought us here
        forkserver.main(int(server[1]), int(server[2]), [])
    finally:
        os._exit(0)
