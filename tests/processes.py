"""Start real processes for a test: a function on N ranks of a gloo group, with a deadline."""

import os
import pickle
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.core.worker_pool import worker_context
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.schema import EngineConfig

# Children import the test's module by its name, so they need the folder above tests/.
ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# All waits of tests are limits that only end what hangs: below pytest's own (pyproject.toml), far above what a busy
# machine takes.
LIMIT_S = 240

ENGINE = EngineConfig(device="cpu", precision="float32", threads=1, timeout_s=LIMIT_S)

# Imported once by the fork server, for all ranks and workers of all tests: what a test's module and an engine import.
PRELOAD = [
    "av",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.debug",
    "vjepa_scale.distributed.engine",
    "vjepa_scale.distributed.fsdp",
    "vjepa_scale.data.loader",
    "vjepa_scale.launch.worker",
    "vjepa_scale.training.trainer",
]


# Once one rank has failed, its peers get this long to fail too and say how.
GRACE_S = 20.0


def preload_once() -> None:
    """There is one fork server, whoever starts it first: let it import PRELOAD whatever that asks for."""
    forkserver.set_forkserver_preload(PRELOAD)
    forkserver.set_forkserver_preload = lambda names: None  # type: ignore[assignment]


def run_processes(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    cfg: EngineConfig = ENGINE,
    timeout_s: float = LIMIT_S,
) -> list[Any]:
    """``function(ranks, *args)`` on every rank of a new group; returns what each rank returned.

    The function must be importable (a module's top level), arguments and results must pickle. Raises
    AssertionError with the traceback of every rank that failed, or naming the ranks that did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = _start(function, world_size, args, cfg, folder)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(GRACE_S)
            _kill(processes)


def killed_when(
    condition: Callable[[], bool], function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = LIMIT_S
) -> None:
    """Run ``function`` as run_processes does, and kill -9 all its ranks as soon as ``condition`` holds."""
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = _start(function, world_size, args, ENGINE, folder)
        deadline = time.monotonic() + timeout_s
        try:
            while not condition():
                assert time.monotonic() < deadline, "the moment to kill did not come"
                for pipe in wait(pipes, timeout=0.001):
                    raise AssertionError(f"ended before it was killed: {pickle.loads(pipe.recv_bytes())}")  # type: ignore[union-attr]  # noqa: S301
        finally:
            _kill(processes)


def _start(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], cfg: EngineConfig, folder: str
) -> tuple[list[BaseProcess], list[Connection]]:
    context = worker_context()  # a fork server: torch is imported once, then forked
    processes: list[BaseProcess] = []
    pipes = []
    job = f"test-{uuid.uuid4().hex}"
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        ranks = Ranks(rank, world_size, rank, world_size, job, "submitit-local", job)
        process = context.Process(target=_worker, args=(function, ranks, cfg, folder, args, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _worker(
    function: Callable[..., Any], ranks: Ranks, cfg: EngineConfig, folder: str, args: tuple[Any, ...], pipe: Connection
) -> None:
    try:
        process_group.start(ranks, cfg, rendezvous=Path(folder))
        # Pickled by value: torch's own pickler would hand over memory that dies with this process.
        answer = pickle.dumps((True, function(ranks, *args)))
    except BaseException:  # noqa: BLE001 (reported, and the process ends)
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sys.stderr.flush()
        os._exit(1)
    pipe.send_bytes(answer)
    process_group.exit_cleanly(0)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes), timeout=left):
            rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
            try:
                good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]  # noqa: S301 (from our own child)
            except EOFError:
                good, value = False, "died without a word"
            if good:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in open_pipes.values():
        failures[rank] = "did not end in time"
    assert not failures, "\n".join(f"-- rank {rank}: {what}" for rank, what in sorted(failures.items()))
    return [results[rank] for rank in range(len(pipes))]
