"""What the loader hands to the trainer: micro-batches, typed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vjepa_scale.data.accidents import Accident
from vjepa_scale.masking import MaskPair


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive slots of one geometry inside one mask group: what one forward pass takes.

    clips:    uint8 [b, 3, T, H, W], not normalised; micro-batches of a step may differ in T
    masks:    one pair per mask generator, rows as in clips
    step:     the global step
    slots:    of the step's global batch
    datasets: name of each clip's data set
    accidents: clips that had to be replaced, as ledger rows; known ones too
    """

    clips: Tensor
    masks: tuple[MaskPair, ...]
    step: int
    slots: range
    datasets: tuple[str, ...]
    accidents: tuple[Accident, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        return replace(
            self,
            clips=self.clips.to(device, non_blocking=non_blocking),
            masks=tuple(pair.to(device, non_blocking) for pair in self.masks),
        )

    def pin_memory(self) -> "MicroBatch":
        """In page-locked memory, from which a copy to a GPU does not block (DataLoader calls this)."""
        masks = tuple(pair.pin_memory() for pair in self.masks)
        return replace(self, clips=self.clips.pin_memory(), masks=masks)


# This rank's micro-batches of one step.
StepBatch = list[MicroBatch]
