"""Masks of whole time steps. How many steps they take is drawn per step, so no list has to be cut:

    future         |c c c c T T T T|  the first part predicts the rest
    frame_dropout  |c T T c c T c T|  steps drawn per clip are predicted from the others
    multi_rate     |c c c T T . T .|  steps_ahead 1, 2, 4 of the last context step; the dots are neither

A time step is ``model.tubelet`` frames. In multi_rate all distances of a clip are predicted in one pass and weigh
the same, so far steps weigh more than in ``future``, which has more near ones; what is neither seen nor predicted
costs the encoder and the predictor nothing.
"""

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.masking.blocks import Grid
from vjepa_scale.masking.subset import Mask, random_ranks, subset
from vjepa_scale.recipe.mask_sections import FrameDropoutMasksConfig, FrameMasksConfig, MultiRateMasksConfig


def frame_masks(
    generator: FrameMasksConfig, grid: Grid, *, seed: int, step: int, number: int, slots: range
) -> tuple[Mask, Mask]:
    """Context and target tokens of each slot: bool [slots, t·h·w] each.

    Every row has the same number of True, which is the same on all ranks. Raises as ``check_frames``.
    """
    check_frames(generator, grid, number=number)
    t, h, w = grid
    u = KeyedRng(seed, "mask.frames", step, number).uniform()
    if isinstance(generator, FrameDropoutMasksConfig):
        steps = _steps(generator.dropped_share, u, t, most=t - 1)
        everything = np.ones((len(slots), t), np.bool_)
        target_BT = subset(everything, steps, random_ranks(seed, step, number, slots, t))
        context_BT = ~target_BT
    else:
        steps = _steps(generator.context_share, u, t, most=t - _reach(generator))
        context_BT = np.broadcast_to(np.arange(t) < steps, (len(slots), t))
        target_BT = ~context_BT
        if isinstance(generator, MultiRateMasksConfig):
            ahead = np.isin(np.arange(t) - (steps - 1), generator.steps_ahead)
            target_BT = np.broadcast_to(ahead, (len(slots), t))
    return np.repeat(context_BT, h * w, axis=1), np.repeat(target_BT, h * w, axis=1)


def check_frames(generator: FrameMasksConfig, grid: Grid, *, number: int) -> None:
    """Raise UserError naming ``masks.generators.N`` where a clip has too few time steps for context and target."""
    reach = _reach(generator)
    if grid[0] <= reach:
        raise UserError(
            f"a {generator.kind} mask takes {reach + 1} time steps at least, a clip has {grid[0]} "
            f"(grid {'×'.join(map(str, grid))}: time × height × width)",
            where=f"masks.generators.{number}",
            fix="longer clips" + (", or smaller steps_ahead" if reach > 1 else ", or kind: blocks"),
        )


def _reach(generator: FrameMasksConfig) -> int:
    """Time steps that the context has to leave free."""
    return max(generator.steps_ahead) if isinstance(generator, MultiRateMasksConfig) else 1


def _steps(share: tuple[float, float], u: float, t: int, *, most: int) -> int:
    """Time steps that the share takes where the draw u in [0, 1) falls: the nearest number between 1 and ``most``."""
    drawn = share[0] + (share[1] - share[0]) * u
    return min(max(1, int(drawn * t + 0.5)), most)
