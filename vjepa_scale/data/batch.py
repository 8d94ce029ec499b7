"""What the loader hands to the trainer: micro-batches, typed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    records:  the number of each clip's record in it; of labelled clips
    accidents: clips that had to be replaced, as ledger rows; known ones too
    states, extrinsics: of trajectories, float32 [b, T, 7] and, where the model asks for them, [b, T, 6]
    labels:   of labelled clips, int64 [b]
    label_draws: of labelled clips, where there are several draws of labels: the number of each clip's, int64 [b]
    """

    clips: Tensor
    masks: tuple[MaskPair, ...]
    step: int
    slots: range
    datasets: tuple[str, ...]
    accidents: tuple[DecodeFailure, ...] = ()
    records: tuple[int, ...] = ()
    states: Tensor | None = None
    extrinsics: Tensor | None = None
    labels: Tensor | None = None
    label_draws: Tensor | None = None

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
            states=None if self.states is None else change(self.states),
            extrinsics=None if self.extrinsics is None else change(self.extrinsics),
            labels=None if self.labels is None else change(self.labels),
            label_draws=None if self.label_draws is None else change(self.label_draws),
        )


# This rank's micro-batches of one step.
StepBatch = list[MicroBatch]
