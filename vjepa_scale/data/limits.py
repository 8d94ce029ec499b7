"""What a node must offer to the loaders of its ranks, asked before they start.

Workers hand micro-batches over in shared memory, each tensor by a file handle. With too little of either, a run
would die at its first large phase: of SIGBUS, or of a message about ancillary data.
"""

import os
import resource
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import PREFETCH
from vjepa_scale.recipe import Recipe, resolve_phases

SHM = Path("/dev/shm")
# Handles of a rank beside its loader: sockets to its peers, logs, libraries, a checkpoint's files; and of each worker.
_OTHER_HANDLES, _HANDLES_PER_WORKER = 256, 16


def shared_memory_needed(recipe: Recipe, stage_name: str) -> int:
    """Bytes in shared memory that one rank's loader holds at most, in the largest phase of a stage.

    Or in the evaluation that a probe stage ends with, whose batches hold all views of a record.
    """
    held, phases = _held(recipe, recipe.data.prefetch), resolve_phases(recipe, stage_name)
    training = max(
        held * phase.micro_batch * _clip_bytes(recipe, max(phase.geometries), phase.size) for phase in phases
    )
    if phases[-1].kind != "probe" or recipe.probe is None:
        return training
    views, last = recipe.probe.views.segments * recipe.probe.views.crops, phases[-1]
    frames = recipe.data.sets[recipe.probe.evaluate_on].frames or last.frames
    shown = _held(recipe, PREFETCH) * max(views, last.micro_batch) * _clip_bytes(recipe, frames, last.size)
    return max(training, shown)


def handles_needed(recipe: Recipe) -> int:
    """Open files that one rank has at most."""
    # Clips; context and target of each generator, or states and extrinsics, or labels.
    tensors = 1 + 2 * len(recipe.masks.generators)
    return _OTHER_HANDLES + _HANDLES_PER_WORKER * recipe.data.workers + _held(recipe, recipe.data.prefetch) * tensors


def check_limits(recipe: Recipe, stage_name: str, *, ranks_on_node: int) -> None:
    """Raises UserError with what is needed, what is there, and the key that needs less."""
    if recipe.data.workers == 0:
        return
    loader = f"data.workers {recipe.data.workers}, data.prefetch {recipe.data.prefetch}"
    fewer = "fewer data.workers, a smaller data.prefetch or micro_batch"
    needed = ranks_on_node * shared_memory_needed(recipe, stage_name)
    if SHM.is_dir():
        found = os.statvfs(SHM)
        free = found.f_bavail * found.f_frsize
        if needed > free:
            raise UserError(
                f"the loaders of {ranks_on_node} ranks need {needed / 1e6:.0f} MB of shared memory ({loader}), "
                f"{free / 1e6:.0f} MB of {SHM} are free",
                where=f"{stage_name}: data.workers",
                fix=f"{fewer}; or a larger {SHM} (of a container: --shm-size)",
            )
    handles, (limit, _) = handles_needed(recipe), resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and handles > limit:
        raise UserError(
            f"a rank needs {handles} open files ({loader}), its limit is {limit}",
            where="data.workers",
            fix="fewer data.workers or a smaller data.prefetch; or a higher limit (ulimit -n)",
        )


def _held(recipe: Recipe, prefetch: int) -> int:
    """Micro-batches that exist at once: those prepared ahead, one in each worker's hands, and a step's own two."""
    return recipe.data.workers * (prefetch + 1) + 2


def _clip_bytes(recipe: Recipe, frames: int, size: tuple[int, int]) -> int:
    """uint8 RGB, and for each mask generator at most all tokens once, in int64."""
    tokens = max(1, frames // recipe.model.tubelet) * (size[0] // recipe.model.patch) * (size[1] // recipe.model.patch)
    return 3 * frames * size[0] * size[1] + len(recipe.masks.generators) * tokens * 8
