"""The masks of some slots of the global batch: sorted index tensors of equal length within a mask group.

The method wants lists of equal length in a batch, and the shortest list gets shorter as clips are added.
So the global batch is cut into mask groups of consecutive slots, and every list is cut to the minimum of
its own group: lengths depend neither on the micro-batch nor on the number of ranks (method.md 4).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.core.keyed import key64, mix64, words
from vjepa_scale.masking.blocks import Grid, Mask, block_size, drawn_block_size, union_of_blocks
from vjepa_scale.recipe.schema import MaskGeneratorConfig, MasksConfig


@dataclass(frozen=True)
class MaskPair:
    """What one generator gives for b clips: token indices, ascending in each row.

    context: int64 [b, Nc], the tokens that the encoder sees
    target:  int64 [b, Nt], the tokens that the predictor predicts
    """

    context: Tensor
    target: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MaskPair":
        return MaskPair(
            self.context.to(device, non_blocking=non_blocking), self.target.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> "MaskPair":
        return MaskPair(self.context.pin_memory(), self.target.pin_memory())


def draw_masks(cfg: MasksConfig, *, seed: int, step: int, slots: range, grid: Grid) -> tuple[MaskPair, ...]:
    """One MaskPair per generator for consecutive slots of one mask group.

    step:  the global step
    slots: of the step's global batch, all inside one group of ``cfg.group``
    grid:  tokens (t, h, w) of a clip
    Raises UserError naming ``masks.generators.N`` where blocks leave no context on this grid.
    """
    first = slots.start // cfg.group * cfg.group
    assert first <= slots.start < slots.stop <= first + cfg.group, (
        f"{slots} is not inside one mask group of {cfg.group}"
    )
    group, rows = range(first, first + cfg.group), slice(slots.start - first, slots.stop - first)
    pairs = []
    for number, generator in enumerate(cfg.generators):
        size = drawn_block_size(generator, grid, seed=seed, step=step, number=number)
        target_BN = union_of_blocks(generator, grid, size, seed=seed, step=step, number=number, slots=group)
        target_BN = target_BN.reshape(cfg.group, -1)
        order_BN = None
        if cfg.truncate == "random":
            order_BN = _token_order(seed, step, number, slots, target_BN.shape[1])
        context, target = _truncated(generator, target_BN, rows, order_BN)
        pairs.append(MaskPair(_indices(context), _indices(target)))
    return tuple(pairs)


def check_masks(cfg: MasksConfig, *, grid: Grid) -> None:
    """Refuse, before the first step, generators whose blocks can come out too large for a grid.

    Tries the largest blocks at seventeen aspect ratios over the configured range.
    """
    for number, generator in enumerate(cfg.generators):
        for i in range(17):
            size = block_size(generator, grid, temporal=1.0, spatial=1.0, aspect=i / 16)
            union_of_blocks(generator, grid, size, seed=0, step=i, number=number, slots=range(cfg.group))


def _token_order(seed: int, step: int, number: int, slots: range, tokens: int) -> np.ndarray:
    """A random 64-bit rank for every token of every slot: uint64 [slots, tokens]."""
    row_keys = words(key64(seed, "mask.subset", step, number), len(slots), slots.start)
    return mix64(row_keys[:, None] ^ np.arange(tokens, dtype=np.uint64))


def _truncated(
    generator: MaskGeneratorConfig, target_BN: Mask, rows: slice, order_BN: np.ndarray | None
) -> tuple[Mask, Mask]:
    """Context and target of the wanted rows, with the lengths of the whole group.

    max_keep bounds the context before a complement is taken; ``invert`` swaps last (both as published).
    """
    tokens = target_BN.shape[1]
    target_counts = target_BN.sum(axis=1)
    keep_target = int(target_counts.min())
    keep_context = tokens - int(target_counts.max())
    if generator.max_keep is not None:
        keep_context = min(keep_context, generator.max_keep)
    target = target_BN[rows]
    context = ~target
    if not generator.pred_full_complement or generator.full_complement:
        context = _subset(context, keep_context, order_BN)
    if generator.full_complement:
        target = ~context
    else:
        target = _subset(target, keep_target, order_BN)
        if generator.pred_full_complement:
            context = ~target
    return (target, context) if generator.invert else (context, target)


def _subset(mask_BN: Mask, keep: int, order_BN: np.ndarray | None) -> Mask:
    """Each row with ``keep`` of its True tokens: those of lowest rank, or the earliest where there is no order."""
    if order_BN is None:
        return mask_BN & (np.cumsum(mask_BN, axis=1, dtype=np.int32) <= keep)
    ranked_BN = np.where(mask_BN, order_BN, np.uint64(0xFFFFFFFFFFFFFFFF))
    return mask_BN & (ranked_BN <= np.partition(ranked_BN, keep - 1, axis=1)[:, keep - 1 : keep])


def _indices(mask_BN: Mask) -> Tensor:
    return torch.from_numpy(np.nonzero(mask_BN)[1].reshape(len(mask_BN), -1))
