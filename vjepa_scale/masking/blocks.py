"""Multi-block masks over a token grid: targets are the union of blocks, context is the rest (docs/method.md 4).

All clips of a step share the size of a block. The positions of blocks are drawn for each clip, so clips have different
numbers of tokens: every list is truncated to the minimum of its mask group.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng, key64, words
from vjepa_scale.masking.generator import Grid, Mask, MaskGenerator, Ranks, random_ranks, subset
from vjepa_scale.recipe.mask_sections import MasksConfig, MaskSection
from vjepa_scale.recipe.sections import Fraction, PositiveInt, PositiveRange, ShareRange

REDRAWS = 256


class BlockMasksConfig(MaskSection):
    """Multi-block masking (docs/method.md 4): targets are the union of blocks, context is the rest."""

    kind: Literal["blocks"] = Field(
        "blocks",
        description="blocks: blocks of tokens are predicted. Or whole time steps (of model.tubelet frames): future: "
        "the rest of the clip from its first part; frame_dropout: steps anywhere from the others; multi_rate: the "
        "steps 1, 2, 4 … after the first part from it. A kind has the keys that name it below, blocks all others",
    )
    blocks: PositiveInt = Field(description="how many blocks; targets are their union")
    spatial_scale: ShareRange = Field(description="share of the h×w grid that one block covers")
    temporal_scale: ShareRange = Field((1.0, 1.0), description="share of time that one block covers")
    aspect_ratio: PositiveRange = Field((0.75, 1.5), description="height over width of a block")
    max_context_frames: Fraction = Field(1.0, description="share of time the context may come from, from the start")
    max_keep: PositiveInt | None = Field(None, description="at most this many context tokens")
    full_complement: bool = Field(False, description="targets are all tokens outside the (truncated) context")
    pred_full_complement: bool = Field(False, description="context is all tokens outside the (truncated) targets")
    invert: bool = Field(False, description="swap context and targets")

    @model_validator(mode="after")
    def _one_complement(self) -> "BlockMasksConfig":
        if self.pred_full_complement and (self.full_complement or self.max_keep is not None):
            raise ValueError("pred_full_complement sets the context: leave out full_complement and max_keep")
        return self


class BlockMasks(MaskGenerator[BlockMasksConfig]):
    """kind: blocks"""

    section = BlockMasksConfig

    def draw(self, grid: Grid, *, seed: int, step: int, slots: range, group: range) -> tuple[Mask, Mask]:
        size = self.drawn_block_size(grid, seed=seed, step=step)
        target_BN = self.union_of_blocks(grid, size, seed=seed, step=step, slots=group).reshape(len(group), -1)
        rows = slice(slots.start - group.start, slots.stop - group.start)
        random = self.masks.truncate == "random"
        ranks_BN = random_ranks(seed, step, self.number, slots, target_BN.shape[1]) if random else None
        return self._truncated(target_BN, rows, ranks_BN)

    def check(self, grid: Grid) -> None:
        """Checks the largest blocks at seventeen aspect ratios over the configured range."""
        for i in range(17):
            size = self.block_size(grid, temporal=1.0, spatial=1.0, aspect=i / 16)
            self.union_of_blocks(grid, size, seed=0, step=i, slots=range(self.masks.group))

    @classmethod
    def check_recipe(cls, config: BlockMasksConfig, masks: MasksConfig, number: int) -> None:
        if masks.multiple_of > 1 and (config.full_complement or config.pred_full_complement):
            raise ValueError(f"multiple_of: the length of a complement (generators.{number}) cannot be a set multiple")

    @classmethod
    def hides_future(cls, entry: Mapping[str, Any]) -> bool:
        return bool(entry.get("max_context_frames", 1.0) < 1)

    @classmethod
    def describe(cls, entry: Mapping[str, Any]) -> str:
        return f"{entry['blocks']} blocks of scale {entry['spatial_scale'][0]:g}"

    def drawn_block_size(self, grid: Grid, *, seed: int, step: int) -> tuple[int, int, int]:
        """Draws the block size that all clips of a step share, on all ranks."""
        temporal, spatial, aspect = KeyedRng(seed, "mask.size", step, self.number).uniforms(3).tolist()
        return self.block_size(grid, temporal=temporal, spatial=spatial, aspect=aspect)

    def block_size(self, grid: Grid, *, temporal: float, spatial: float, aspect: float) -> tuple[int, int, int]:
        """Returns tokens (tb, hb, wb) of one block, each between 1 and the grid's.

        n = int(spatial·h·w), hb = round(√(n·ar)), wb = round(√(n/ar)), tb = int(temporal·t);
        temporal, spatial, aspect: in [0, 1], the draw's position in the configured ranges.
        """

        def between(limits: tuple[float, float], u: float) -> float:
            return limits[0] + (limits[1] - limits[0]) * u

        t, h, w = grid
        tokens = int(between(self.config.spatial_scale, spatial) * h * w)
        ratio = between(self.config.aspect_ratio, aspect)
        size = (
            int(between(self.config.temporal_scale, temporal) * t),
            round(math.sqrt(tokens * ratio)),
            round(math.sqrt(tokens / ratio)),
        )
        tb, hb, wb = (min(max(1, n), limit) for n, limit in zip(size, grid, strict=True))
        return tb, hb, wb

    def union_of_blocks(self, grid: Grid, size: tuple[int, int, int], *, seed: int, step: int, slots: range) -> Mask:
        """Draws the target tokens of each slot, before truncation: bool [slots, t, h, w], never all True.

        Positions are drawn per slot, and redrawn where a clip's context would be empty. A slot's positions depend only
        on (seed, step, slot, number). Raises UserError where blocks of this size cover the whole grid in 256 draws.
        """
        target_BTHW = np.ones((len(slots), *grid), np.bool_)
        missing = np.arange(len(slots))
        for attempt in range(REDRAWS):
            key = key64(seed, "mask.place", step, self.number, attempt)
            drawn = _placed(self.config, grid, size, key, slots.start + missing)
            target_BTHW[missing] = drawn
            missing = missing[drawn.reshape(len(missing), -1).all(axis=1)]
            if len(missing) == 0:
                return target_BTHW
        raise UserError(
            f"{self.config.blocks} blocks of {'×'.join(map(str, size))} tokens leave no context on a grid of "
            f"{'×'.join(map(str, grid))} tokens (time × height × width), in {REDRAWS} draws",
            where=f"masks.generators.{self.number}",
            fix="fewer blocks, a smaller spatial_scale, or a larger clip",
        )

    def _truncated(self, target_BN: Mask, rows: slice, ranks_BN: Ranks | None) -> tuple[Mask, Mask]:
        """Returns context and target of some rows, at the lengths of the whole group, rounded down to a multiple.

        max_keep bounds the context before the complement; ``invert`` swaps last (both as published).
        """
        config, multiple = self.config, self.masks.multiple_of
        tokens = target_BN.shape[1]
        target_counts = target_BN.sum(axis=1)
        keep_target = int(target_counts.min())
        keep_context = tokens - int(target_counts.max())
        if config.max_keep is not None:
            keep_context = min(keep_context, config.max_keep)
        keep_target, keep_context = (n - n % multiple if n > multiple else n for n in (keep_target, keep_context))
        target = target_BN[rows]
        context = ~target
        if not config.pred_full_complement or config.full_complement:
            context = subset(context, keep_context, ranks_BN)
        if config.full_complement:
            target = ~context
        else:
            target = subset(target, keep_target, ranks_BN)
            if config.pred_full_complement:
                context = ~target
        return (target, context) if config.invert else (context, target)


def _placed(
    config: BlockMasksConfig, grid: Grid, size: tuple[int, int, int], key: int, slots: npt.NDArray[np.int64]
) -> Mask:
    """Draws positions for some slots: bool [slots, t, h, w], True inside a block or after the last context frame."""
    per_slot = 3 * config.blocks
    first = int(slots[0])
    stream = words(key, (int(slots[-1]) - first + 1) * per_slot, first * per_slot)
    uniform = (stream >> np.uint64(11)).astype(np.float64) * 2.0**-53
    uniform_BM3 = uniform.reshape(-1, config.blocks, 3)[slots - first]
    room = np.array(grid) - np.array(size) + 1
    corner_BM3 = (uniform_BM3 * room).astype(np.int64)
    # A block is the product of three intervals, one per axis.
    inside = [
        (axis >= corner_BM3[..., i, None]) & (axis < corner_BM3[..., i, None] + size[i])
        for i, axis in enumerate(np.arange(n) for n in grid)
    ]
    mask_BTHW = np.zeros((len(slots), *grid), np.bool_)
    for j in range(config.blocks):
        t_BT, h_BH, w_BW = (axis[:, j] for axis in inside)
        plane_BHW = h_BH[:, :, None] & w_BW[:, None, :]
        mask_BTHW |= t_BT[:, :, None, None] & plane_BHW[:, None]
    mask_BTHW[:, max(1, int(config.max_context_frames * grid[0])) :] = True
    return mask_BTHW
