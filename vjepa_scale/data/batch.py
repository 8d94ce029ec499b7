"""What the loader hands to the trainer: micro-batches, typed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vjepa_scale.data.substitution import DecodeFailure
from vjepa_scale.masking import MaskPair


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive slots of one geometry inside one mask group: what one forward pass takes.

    clips:    uint8 [b, 3, T, H, W], not normalised; micro-batches of a step may differ in T
    masks:    one pair per mask generator, rows as in clips; of pretraining only
    step:     the global step
    slots:    of the step's global batch
    datasets: name of each clip's data set
    records:  the number of each clip's record in it
    failures: clips that had to be replaced because they do not decode; known ones too
    extras:   what a kind of training learns from beside clips and masks, tensors [b, …] by name
    """

    clips: Tensor
    masks: tuple[MaskPair, ...]
    step: int
    slots: range
    datasets: tuple[str, ...]
    failures: tuple[DecodeFailure, ...] = ()
    records: tuple[int, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        masks = tuple(pair.to(device, non_blocking) for pair in self.masks)
        return self._with(masks, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        """In page-locked memory, from which a copy to a GPU does not block (DataLoader calls this)."""
        return self._with(tuple(pair.pin_memory() for pair in self.masks), Tensor.pin_memory)

    def _with(self, masks: tuple[MaskPair, ...], change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """These masks, and all other tensors changed."""
        return replace(
            self,
            masks=masks,
            clips=change(self.clips),
            extras={name: change(tensor) for name, tensor in self.extras.items()},
        )


# This rank's micro-batches of one step.
StepBatch = list[MicroBatch]
