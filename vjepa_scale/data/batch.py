"""What the loader hands to the trainer: micro-batches, typed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa_scale.masking import MaskPair


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive slots of one geometry inside one mask group: what one forward pass takes.

    clips:    uint8 [b, 3, T, H, W], not normalised
    masks:    one pair per mask generator, rows as in clips
    step:     the global step
    slots:    of the step's global batch
    datasets: name of each clip's data set
    """

    clips: Tensor
    masks: tuple[MaskPair, ...]
    step: int
    slots: range
    datasets: tuple[str, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        return MicroBatch(
            self.clips.to(device, non_blocking=non_blocking),
            tuple(pair.to(device, non_blocking) for pair in self.masks),
            self.step,
            self.slots,
            self.datasets,
        )

    def pin_memory(self) -> "MicroBatch":
        """In page-locked memory, from which a copy to a GPU does not block (DataLoader calls this)."""
        masks = tuple(pair.pin_memory() for pair in self.masks)
        return MicroBatch(self.clips.pin_memory(), masks, self.step, self.slots, self.datasets)


# This rank's micro-batches of one step.
StepBatch = list[MicroBatch]
