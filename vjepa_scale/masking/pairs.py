"""The masks of some slots as the networks take them: sorted index tensors of equal length within a mask group."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.masking.generator import Grid, Mask, drawn_masks
from vjepa_scale.recipe.mask_sections import MasksConfig


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
    """One MaskPair per generator for consecutive slots of one mask group: ``drawn_masks`` as indices."""
    drawn = drawn_masks(cfg, seed=seed, step=step, slots=slots, grid=grid)
    return tuple(MaskPair(_indices(context_BN), _indices(target_BN)) for context_BN, target_BN in drawn)


def _indices(mask_BN: Mask) -> Tensor:
    return torch.from_numpy(np.nonzero(mask_BN)[1].reshape(len(mask_BN), -1))
