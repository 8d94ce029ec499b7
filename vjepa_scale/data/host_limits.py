"""Checks that a node has enough shared memory and file handles for the loaders of its ranks, before they start.

Workers pass micro-batches through shared memory, one file handle per tensor. With too little of either, a run would
fail at its first large phase: with SIGBUS, or with a message about ancillary data.
"""

import os
import resource
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import PREFETCH
from vjepa_scale.recipe import Recipe, Stage

SHM = Path("/dev/shm")
# File handles of a rank besides its loader and its sockets to peers: logs, libraries, GPU, checkpoint files; and
# those of each worker.
_OTHER_HANDLES, _HANDLES_PER_WORKER = 256, 16
# Gloo groups of all ranks, each with a socket between every two ranks: training's and the saver's. The groups of a
# hybrid mesh together have at most as many sockets as one of these.
_GROUPS = 3


def shared_memory_needed(stage: Stage) -> int:
    """Returns the most bytes of shared memory that one rank's loader holds, in the largest phase of a stage.

    Also counts the batches of another size that follow the last step (``Stage.finish_batch``).
    """
    recipe = stage.recipe
    held = _held(recipe, recipe.data.prefetch)
    training = max(
        held * phase.micro_batch * _clip_bytes(stage, max(phase.geometries), phase.size) for phase in stage.phases
    )
    needed = training if stage.decodes_clips else 0
    if (last := stage.finish_batch()) is None:
        return needed
    clips, frames, size = last
    return max(needed, _held(recipe, PREFETCH) * clips * _clip_bytes(stage, frames, size))


def handles_needed(stage: Stage, *, world_size: int) -> int:
    """Returns the most files that one rank has open."""
    recipe, phase = stage.recipe, stage.phases[0]
    beside, _ = stage.beside_clips(phase.frames, phase.size)
    tensors = 1 + beside  # 1 for the clips
    loader = _HANDLES_PER_WORKER * recipe.data.workers + _held(recipe, recipe.data.prefetch) * tensors
    return _OTHER_HANDLES + _GROUPS * (world_size - 1) + (loader if recipe.data.workers else 0)


def raise_open_files(stage: Stage, *, world_size: int) -> None:
    """Raises this process's limit of open files to what it needs. Call it before the process joins its group, which
    opens most of them.

    Raises UserError where its hard limit is lower.
    """
    needed = handles_needed(stage, world_size=world_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise UserError(
            f"a rank needs {needed} open files ({world_size} ranks, {_loader(stage.recipe)}), its limit is {hard}",
            where="data.workers",
            fix="fewer data.workers or a smaller data.prefetch; or a higher hard limit (ulimit -Hn)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_limits(stage: Stage, *, ranks_on_node: int) -> None:
    """Raises UserError with the memory needed, the memory free, and the key to lower."""
    recipe = stage.recipe
    if recipe.data.workers == 0:
        return
    needed = ranks_on_node * shared_memory_needed(stage)
    if SHM.is_dir():
        found = os.statvfs(SHM)
        free = found.f_bavail * found.f_frsize
        if needed > free:
            raise UserError(
                f"the loaders of {ranks_on_node} ranks need {needed / 1e6:.0f} MB of shared memory "
                f"({_loader(recipe)}), {free / 1e6:.0f} MB of {SHM} are free",
                where=f"{stage.name}: data.workers",
                fix="fewer data.workers, a smaller data.prefetch or micro_batch; or a larger "
                f"{SHM} (of a container: --shm-size)",
            )


def _loader(recipe: Recipe) -> str:
    return f"data.workers {recipe.data.workers}, data.prefetch {recipe.data.prefetch}"


def _held(recipe: Recipe, prefetch: int) -> int:
    """Returns how many micro-batches exist at once: those prefetched, one in each worker, and two of the step."""
    return recipe.data.workers * (prefetch + 1) + 2


def _clip_bytes(stage: Stage, frames: int, size: tuple[int, int]) -> int:
    """Returns the bytes of a clip: uint8 RGB, and what the stage's kind adds."""
    _, beside = stage.beside_clips(frames, size)
    return 3 * frames * size[0] * size[1] + beside
