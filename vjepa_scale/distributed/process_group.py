"""Starts and ends the process group of a job, with collectives on objects, and builds the device mesh.

A single process is a group of one and runs the same code. Under torchrun the group comes from its
environment. Otherwise rank 0 opens a store on a free port and publishes ``host:port`` in a file that the
others wait for. The file is named after this start of the job, and removed once all ranks have joined, so a
rank never reads the address of an earlier start.
"""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vjepa_scale.core import log
from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.core.files import write_atomic
from vjepa_scale.core.ranks import Ranks, count_replicas
from vjepa_scale.core.worker_pool import remove_socket_folder
from vjepa_scale.recipe.schema import EngineConfig

POLL_S = 0.05

_log = logging.getLogger(__name__)

T = TypeVar("T")


def start(ranks: Ranks, cfg: EngineConfig, *, rendezvous: Path) -> None:
    """Sets threads and device, and joins the process group.

    rendezvous: a folder that all processes see (not used under torchrun)
    Raises UserError for an impossible device or mesh, before any rank waits for another; RuntimeError naming the
    file or the ranks if some processes have not joined within ``cfg.timeout_s`` seconds.
    """
    count_replicas(cfg.replicate, world_size=ranks.world_size, per_node=ranks.local_world_size)
    device = pick_device(cfg, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(cfg.threads)
    if cfg.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        # Filling costs time, and no code here reads uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    timeout = timedelta(seconds=cfg.timeout_s)
    join = partial(
        dist.init_process_group,
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        # With a device id NCCL connects here, where a failure has a clear message, and not in the first step. Groups of
        # fewer ranks are split from its communicator.
        device_id=device if device.type == "cuda" else None,
    )
    log.adopt()  # PyTorch has added its handlers by now
    laps = log.Laps()
    if ranks.source == "torchrun":
        join(init_method="env://")
    else:
        file = rendezvous / ranks.job
        store = _open_store(ranks, file, timeout)
        laps.lap("store")
        join(store=dist.PrefixStore("vjepa_scale", store))
        barrier()
        if ranks.is_main:
            file.unlink()
    laps.lap("group")
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("joined %s on %s by %s: %s; %s", ranks, device, dist.get_backend_config(), ranks.source, laps)


def barrier() -> None:
    """Waits until every process has called it."""
    # An object collective uses the CPU backend: it needs no device and synchronises no GPU stream.
    from_all(None)


def from_rank_0(value: T) -> T:
    """Returns rank 0's value on every rank. Without a group the only process is rank 0."""
    holder = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def read_on_rank_0(read: Callable[[], T]) -> T:
    """Returns what ``read`` returns on rank 0, or raises its UserError, on every rank."""
    found: list[T] = []
    failed: UserError | None = None
    if is_main():
        try:
            found.append(read())
        except UserError as error:
            failed = error
    found, failed = from_rank_0((found, failed))
    if failed is not None:
        raise failed
    return found[0]


def from_all(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns every rank's value, in the order of ranks, on every rank; also a barrier. Too slow for every step.

    group: another group of all processes, for a thread whose messages must not mix with training's
    """
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def to_rank_0(value: T) -> list[T] | None:
    """Returns every rank's value, in the order of ranks, on rank 0; None on the others. For large values."""
    if not dist.is_initialized():
        return [value]
    values = [value] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def rank() -> int:
    """Returns this process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Returns whether this is rank 0; True without a group."""
    return rank() == 0


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_cleanly(code: int = 0) -> NoReturn:
    """Ends a process after finished work by ``os._exit``.

    Threads of gloo sometimes abort an interpreter during its shutdown. Never call this on an error path: it
    skips everything that would report the error.
    """
    stop()
    gc.collect()  # unlinks the semaphores of the loaders' queues
    remove_socket_folder()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pick_device(cfg: EngineConfig, ranks: Ranks) -> torch.device:
    """Returns this process's device: the recipe's, or with ``auto`` a GPU if there is one."""
    found = torch.cuda.device_count()
    if cfg.device == "cpu" or (cfg.device == "auto" and found == 0):
        return torch.device("cpu")
    if ranks.local_rank >= found:
        # Slurm has given the requested GPUs, so one is broken; another node may work.
        raise (PassingError if ranks.source == "slurm" else UserError)(
            f"process {ranks.local_rank} of this node has no GPU: {found} found",
            where="engine.device",
            fix="cpu, or launch.tasks_per_node no larger than the number of GPUs",
        )
    return torch.device("cuda", ranks.local_rank)


def _open_store(ranks: Ranks, file: Path, timeout: timedelta) -> dist.TCPStore:
    """Returns the key-value store, which rank 0 serves. On rank 0, all ranks have joined when it returns."""
    deadline = time.monotonic() + timeout.total_seconds()
    if ranks.is_main:
        host = _own_address(ranks, os.environ)
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        write_atomic(file, f"{host}:{store.port}\n")
        _wait_for_everyone(store, ranks, deadline)
        return store
    while not file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {ranks.rank} of {ranks.world_size}: rank 0 did not write {file} "
                f"within {timeout.total_seconds():g} s (engine.timeout_s)"
            )
        time.sleep(POLL_S)
    host, _, port = file.read_text().strip().rpartition(":")
    store = dist.TCPStore(host, int(port), wait_for_workers=False, timeout=timeout)
    store.set(f"here/{ranks.rank}", "")
    return store


def _own_address(ranks: Ranks, environment: Mapping[str, str]) -> str:
    """Returns the address by which the other processes of the job reach this one."""
    return environment["SLURMD_NODENAME"] if ranks.source == "slurm" else "127.0.0.1"


def _wait_for_everyone(store: dist.TCPStore, ranks: Ranks, deadline: float) -> None:
    missing = list(range(1, ranks.world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            named = ", ".join(map(str, missing[:16])) + (" …" if len(missing) > 16 else "")
            raise RuntimeError(
                f"{len(missing)} of {ranks.world_size} processes did not come within engine.timeout_s: rank {named}"
            )
        time.sleep(POLL_S)


# -- the mesh --------------------------------------------------------------------------------------


def build_mesh(device_type: str, *, world_size: int, replicate: int, timeout_s: float) -> DeviceMesh:
    """Returns a mesh over all processes of the started group, with this timeout for its collectives.

    Its dimensions: ``shard`` only, or ``replicate`` × ``shard`` for hybrid sharding. Neighbouring ranks shard
    together, so that with one replica per node the all-gathers stay inside the node.
    """
    if replicate == 1:  # uses the group of all processes, which has that timeout
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    ranks = torch.arange(world_size).view(replicate, world_size // replicate)
    groups = [_own_group(lists, timeout_s) for lists in (ranks.T.tolist(), ranks.tolist())]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks.int(), mesh_dim_names=("replicate", "shard"))


def _own_group(lists: list[list[int]], timeout_s: float) -> dist.ProcessGroup:
    """Creates groups and returns this rank's. (Groups that a mesh creates itself have PyTorch's default timeout.)"""
    own, _ = dist.new_subgroups_by_enumeration(lists, timeout=timedelta(seconds=timeout_s))
    assert own is not None, "each rank is in one"
    return own
