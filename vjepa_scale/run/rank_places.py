"""ranks.json of a stage: on which node and GPU each rank of the last attempt ran, and as which process.

Does not import PyTorch.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, write_json
from vjepa_scale.core.ranks import Ranks

FILE = "ranks.json"

Place = dict[str, Any]


def node_name(env: Mapping[str, str] = os.environ) -> str:
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def place_of(ranks: Ranks, *, pid: int, on_gpu: bool, env: Mapping[str, str] = os.environ) -> Place:
    """Returns rank, node, pid, and the GPU by its number or name on the node (None: none)."""
    visible = [name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpu = visible[ranks.local_rank] if ranks.local_rank < len(visible) else str(ranks.local_rank)
    return {"rank": ranks.rank, "node": node_name(env), "pid": pid, "gpu": gpu if on_gpu else None}


def write_places(stage_folder: Path, job: str, places: Sequence[Place]) -> None:
    """Writes the places of all ranks of this start of a job."""
    write_json(stage_folder / FILE, {"job": job, "ranks": list(places)})


def places_of(stage_folder: Path, job: str) -> list[Place]:
    """Returns the places of a job's ranks; empty if the file is of another start, or there is none.

    job: Ranks.job, or a pattern for it
    """
    try:
        content = read_json(stage_folder / FILE)
        if not fnmatchcase(content["job"], pattern_of(job)):
            return []
        return [place for place in content["ranks"] if place.keys() >= {"rank", "node", "pid", "gpu"}]
    except (UserError, TypeError, KeyError, AttributeError):
        return []


def pattern_of(job: str) -> str:
    """Returns the pattern of a job's name, or of a pattern with ``*``. Names of torchrun's jobs may have brackets."""
    return job.replace("[", "[[]")


def in_words(place: Place) -> str:
    """``rank 1 (node c1, pid 123, GPU 3)``"""
    gpu = f", GPU {place['gpu']}" if place["gpu"] is not None else ""
    return f"rank {place['rank']} (node {place['node']}, pid {place['pid']}{gpu})"
