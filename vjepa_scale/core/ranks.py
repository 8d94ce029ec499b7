"""The rank of this process in its job, read from the environment and checked, never guessed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import as_called


@dataclass(frozen=True)
class Ranks:
    """The rank of this process.

    rank, world_size:             among all processes of the job
    local_rank, local_world_size: among the processes of this node
    job:                          a name for this start of the job, shared by its processes; a restart has another
    job_id:                       the job's id of the cluster manager and in the names of log files
    source:                       the environment that was read: torchrun, slurm, submitit-local or single
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    job: str
    source: str
    job_id: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def count_replicas(asked: int | Literal["auto", "all"], *, world_size: int, per_node: int) -> int:
    """Returns the number of replicas that ``engine.replicate`` means. Raises UserError if it does not divide the ranks.

    per_node: processes of a node
    """
    if asked == "all":
        return world_size
    replicas = max(1, world_size // per_node) if asked == "auto" else asked
    if world_size % replicas or (asked == "auto" and world_size % per_node and world_size > per_node):
        raise UserError(
            f"{world_size} processes do not divide into {replicas} replicas",
            where="engine.replicate",
            fix="auto (one per node) or another divisor of launch.nodes × launch.tasks_per_node: "
            f"{', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}",
        )
    return replicas


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SUBMITIT_LOCAL = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_JOB_ID",
)
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
_NOT_A_STEP = ("", "4294967290", "4294967291", "4294967292")  # no step; an interactive, a batch, an external one
# The number of processes, in environments that do not suffice to build a process group.
_ONLY_A_SIZE = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def detect_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Reads the rank environment of this process: submitit's local executor, torchrun, Slurm's srun, or none.

    Raises UserError if an environment of several processes is incomplete: a silent fallback to
    world size 1 would train that many independent models into the same folder.
    """
    if env.get("SUBMITIT_EXECUTOR") == "local":
        rank, world, local, job = _require(env, _SUBMITIT_LOCAL, "submitit's local executor")
        return _checked(int(rank), int(world), int(local), int(world), job, "submitit-local", job_id=job)
    # RANK or WORLD_SIZE alone may be left over from another tool: each of them requires the whole set.
    if "RANK" in env or "WORLD_SIZE" in env or "LOCAL_RANK" in env:
        rank, world, local, node_tasks, addr, port = _require(env, _TORCHRUN, "torchrun")
        job = f"{addr}:{port}-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return _checked(int(rank), int(world), int(local), int(node_tasks), job, "torchrun", job_id=job)
    # A login, salloc or batch shell has only the job's variables; tasks of srun also have a step id.
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "") not in _NOT_A_STEP:
        rank, world, local, node, job_id, step_id = _require(env, _SLURM, "Slurm")
        per_node = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1"))
        local_world = per_node[int(node)] if int(node) < len(per_node) else 0
        job = f"{job_id}.{step_id}-{env.get('SLURM_RESTART_COUNT', '0')}"
        return _checked(int(rank), int(world), int(local), local_world, job, "slurm", job_id=job_id)
    for name in _ONLY_A_SIZE:
        if env.get(name, "1") != "1":
            raise UserError(
                f"{name} is {env[name]}, but nothing says which of them this process is",
                where="environment",
                fix="start the processes with srun or torchrun, or unset it to train in this process alone",
            )
    job = f"single-{os.getpid()}"
    return Ranks(0, 1, 0, 1, job, "single", job)


def _tasks_per_node(text: str) -> list[int]:
    """Parses Slurm's ``2(x3),1``: three nodes with two tasks, one with one."""
    counts: list[int] = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts


def _require(env: Mapping[str, str], names: tuple[str, ...], source: str) -> list[str]:
    missing = [name for name in names if name not in env]
    if missing:
        raise UserError(
            f"started by {source}, but {', '.join(missing)} is not set",
            where="environment",
            fix=as_called("start every process through tools/launch.py, torchrun or srun, or unset the others"),
        )
    return [env[name] for name in names]


def _checked(rank: int, world: int, local: int, local_world: int, job: str, source: str, *, job_id: str) -> Ranks:
    if not (0 <= rank < world and 0 <= local < local_world <= world):
        raise UserError(
            f"rank {rank} of {world}, local rank {local} of {local_world}: impossible",
            where=f"environment of {source}",
        )
    return Ranks(rank, world, local, local_world, job, source, job_id)


def usable_cores() -> int:
    """Returns the number of cores that this process may use (Slurm may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
