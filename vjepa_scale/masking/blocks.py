"""Multi-block masks over a token grid: the block size of a step, and the union of blocks of each clip."""

import math

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng, key64, words
from vjepa_scale.masking.subset import Mask
from vjepa_scale.recipe.mask_sections import BlockMasksConfig

Grid = tuple[int, int, int]

REDRAWS = 256


def block_size(
    generator: BlockMasksConfig, grid: Grid, *, temporal: float, spatial: float, aspect: float
) -> tuple[int, int, int]:
    """Tokens (tb, hb, wb) of one block, each between 1 and the grid's.

    n = int(spatial·h·w), hb = round(√(n·ar)), wb = round(√(n/ar)), tb = int(temporal·t);
    temporal, spatial, aspect: in [0, 1], where in the generator's ranges the draw falls.
    """

    def between(limits: tuple[float, float], u: float) -> float:
        return limits[0] + (limits[1] - limits[0]) * u

    t, h, w = grid
    tokens = int(between(generator.spatial_scale, spatial) * h * w)
    ratio = between(generator.aspect_ratio, aspect)
    size = (
        int(between(generator.temporal_scale, temporal) * t),
        round(math.sqrt(tokens * ratio)),
        round(math.sqrt(tokens / ratio)),
    )
    tb, hb, wb = (min(max(1, n), limit) for n, limit in zip(size, grid, strict=True))
    return tb, hb, wb


def drawn_block_size(
    generator: BlockMasksConfig, grid: Grid, *, seed: int, step: int, number: int
) -> tuple[int, int, int]:
    """The block size that every clip of a step shares, on all ranks."""
    temporal, spatial, aspect = KeyedRng(seed, "mask.size", step, number).uniforms(3).tolist()
    return block_size(generator, grid, temporal=temporal, spatial=spatial, aspect=aspect)


def union_of_blocks(
    generator: BlockMasksConfig,
    grid: Grid,
    size: tuple[int, int, int],
    *,
    seed: int,
    step: int,
    number: int,
    slots: range,
) -> Mask:
    """The target tokens of each slot, before truncation: bool [slots, t, h, w], never all True.

    Places are drawn per slot, and again where a clip's context would be empty; a slot's places depend
    on nothing but (seed, step, slot, number). Raises UserError where blocks of this size always (as far
    as 256 draws can tell) cover the whole grid.
    """
    target_BTHW = np.ones((len(slots), *grid), np.bool_)
    missing = np.arange(len(slots))
    for attempt in range(REDRAWS):
        key = key64(seed, "mask.place", step, number, attempt)
        drawn = _placed(generator, grid, size, key, slots.start + missing)
        target_BTHW[missing] = drawn
        missing = missing[drawn.reshape(len(missing), -1).all(axis=1)]
        if len(missing) == 0:
            return target_BTHW
    raise UserError(
        f"{generator.blocks} blocks of {'×'.join(map(str, size))} tokens leave no context on a grid of "
        f"{'×'.join(map(str, grid))} tokens (time × height × width), in {REDRAWS} draws",
        where=f"masks.generators.{number}",
        fix="fewer blocks, a smaller spatial_scale, or a larger clip",
    )


def _placed(
    generator: BlockMasksConfig, grid: Grid, size: tuple[int, int, int], key: int, slots: npt.NDArray[np.int64]
) -> Mask:
    """One draw of places for some slots: bool [slots, t, h, w], True inside a block or after the last context frame."""
    per_slot = 3 * generator.blocks
    first = int(slots[0])
    stream = words(key, (int(slots[-1]) - first + 1) * per_slot, first * per_slot)
    uniform = (stream >> np.uint64(11)).astype(np.float64) * 2.0**-53
    uniform_BM3 = uniform.reshape(-1, generator.blocks, 3)[slots - first]
    room = np.array(grid) - np.array(size) + 1
    corner_BM3 = (uniform_BM3 * room).astype(np.int64)
    # A block is the product of three intervals, one per axis.
    inside = [
        (axis >= corner_BM3[..., i, None]) & (axis < corner_BM3[..., i, None] + size[i])
        for i, axis in enumerate(np.arange(n) for n in grid)
    ]
    mask_BTHW = np.zeros((len(slots), *grid), np.bool_)
    for j in range(generator.blocks):
        t_BT, h_BH, w_BW = (axis[:, j] for axis in inside)
        plane_BHW = h_BH[:, :, None] & w_BW[:, None, :]
        mask_BTHW |= t_BT[:, :, None, None] & plane_BHW[:, None]
    mask_BTHW[:, max(1, int(generator.max_context_frames * grid[0])) :] = True
    return mask_BTHW
