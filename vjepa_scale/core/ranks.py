"""Who am I among the processes of this job? Read from the environment once, checked, never guessed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vjepa_scale.core.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    rank, world_size:             among all processes of the job
    local_rank, local_world_size: among those of this node
    job:                          a name that is new for each start of the job, shared by its processes
    source:                       which environment said so: torchrun, slurm, submitit-local or single
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    job: str
    source: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SUBMITIT_LOCAL = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_JOB_ID",
)
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")


def detect_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """The rank environment of this process: submitit's local executor, torchrun, Slurm's srun, or none.

    Raises UserError where an environment of several processes is incomplete: a silent fallback to
    world size 1 would train that many independent models into the same folder.
    """
    if env.get("SUBMITIT_EXECUTOR") == "local":
        rank, world, local, job = _require(env, _SUBMITIT_LOCAL, "submitit's local executor")
        return _checked(int(rank), int(world), int(local), int(world), job, "submitit-local")
    # RANK or WORLD_SIZE alone may be left over from another tool: either one demands the whole set.
    if "RANK" in env or "WORLD_SIZE" in env or "LOCAL_RANK" in env:
        rank, world, local, node_tasks, addr, port = _require(env, _TORCHRUN, "torchrun")
        job = f"{addr}:{port}-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return _checked(int(rank), int(world), int(local), int(node_tasks), job, "torchrun")
    # SLURM_PROCID exists only inside an srun step; a login or salloc shell has just the job's variables.
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "") not in ("", "4294967291", "4294967290"):
        rank, world, local, job_id, step_id = _require(env, _SLURM, "Slurm")
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
        local_world = int(per_node.split(",")[0].split("(")[0])
        restart = env.get("SLURM_RESTART_COUNT", "0")
        return _checked(int(rank), int(world), int(local), local_world, f"{job_id}.{step_id}-{restart}", "slurm")
    return Ranks(0, 1, 0, 1, f"single-{os.getpid()}", "single")


def _require(env: Mapping[str, str], names: tuple[str, ...], source: str) -> list[str]:
    missing = [name for name in names if name not in env]
    if missing:
        raise UserError(
            f"started by {source}, but {', '.join(missing)} is not set",
            where="environment",
            fix="start every process through tools/launch.py, torchrun or srun, or unset the others",
        )
    return [env[name] for name in names]


def _checked(rank: int, world: int, local: int, local_world: int, job: str, source: str) -> Ranks:
    if not (0 <= rank < world and 0 <= local < local_world <= world):
        raise UserError(
            f"rank {rank} of {world}, local rank {local} of {local_world}: impossible",
            where=f"environment of {source}",
        )
    return Ranks(rank, world, local, local_world, job, source)
