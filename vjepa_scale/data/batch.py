"""Micro-batches, which the loader builds from shards and the trainer consumes; and the masks of their clips."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.data.augment import empty_clips, random_crop, squashed_crop
from vjepa_scale.data.clips import ClipRef, Timed, clip_refs
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.substitution import DecodeFailure, Known, clip_or_substitute
from vjepa_scale.masking.generator import Grid, Mask, drawn_masks
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.mask_sections import MasksConfig


@dataclass(frozen=True)
class MaskPair:
    """The masks of one generator for b clips: token indices, ascending in each row.

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
    """Returns one MaskPair per generator for consecutive slots of one mask group: ``drawn_masks`` as indices."""
    drawn = drawn_masks(cfg, seed=seed, step=step, slots=slots, grid=grid)
    return tuple(MaskPair(_indices(context_BN), _indices(target_BN)) for context_BN, target_BN in drawn)


def _indices(mask_BN: Mask) -> Tensor:
    return torch.from_numpy(np.nonzero(mask_BN)[1].reshape(len(mask_BN), -1))


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass: consecutive slots of one geometry inside one mask group.

    clips:    uint8 [b, 3, T, H, W], not normalised; micro-batches of a step may differ in T
    masks:    one pair per mask generator, rows as in clips; only in pretraining
    step:     the global step
    slots:    slots of the step's global batch
    datasets: name of each clip's data set
    records:  index of each clip's record in that data set
    failures: clips that were replaced because they do not decode, known ones included
    extras:   further inputs of a kind of training, tensors [b, …] by name
    load_s, load_cpu_s: seconds that reading, decoding and cropping took, and CPU seconds of that
    """

    clips: Tensor
    masks: tuple[MaskPair, ...]
    step: int
    slots: range
    datasets: tuple[str, ...]
    failures: tuple[DecodeFailure, ...] = ()
    records: tuple[int, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    load_s: float = 0.0
    load_cpu_s: float = 0.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        masks = tuple(pair.to(device, non_blocking) for pair in self.masks)
        return self._with(masks, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        """Returns a copy in page-locked memory, from which a copy to a GPU does not block (DataLoader calls this)."""
        return self._with(tuple(pair.pin_memory() for pair in self.masks), Tensor.pin_memory)

    def _with(self, masks: tuple[MaskPair, ...], change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Returns a copy with these masks and with ``change`` applied to all other tensors."""
        return replace(
            self,
            masks=masks,
            clips=change(self.clips),
            extras={name: change(tensor) for name, tensor in self.extras.items()},
        )


# This rank's micro-batches of one step.
StepBatch = list[MicroBatch]


def load_micro_batch(
    stage: Stage,
    phase: Phase,
    order: DataOrder,
    manifests: Mapping[str, Manifest],
    index: tuple[int, int],
    *,
    known: Known,
    timed: Timed | None = None,
    records: Mapping[str, Ints] | None = None,
    prepared: Any = None,
) -> MicroBatch:
    """Loads micro-batch m of a step, by index (step, m): decodes and crops its clips, and adds masks and extras.

    records, prepared: from the stage, for its data sets and for the phase
    Decodes nothing where the stage's steps use no videos: clips then have no frames.
    """
    step, number = index
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    slots = range(number * phase.micro_batch, (number + 1) * phase.micro_batch)
    data = stage.data
    refs = clip_refs(data, phase, order, manifests, step=step, slots=slots)
    names = tuple(ref.dataset for ref in refs)
    if not stage.decodes_clips:
        unseen = MicroBatch(empty_clips(len(refs), 0, phase.size), (), step, slots, names)
        return stage.complete(unseen, refs, phase, manifests, prepared)
    frames = phase.frames_of(refs[0].dataset)
    assert all(len(ref.times_s) == frames for ref in refs), "a micro-batch has one geometry"
    clips = empty_clips(len(refs), frames, phase.size)
    failures: list[DecodeFailure] = []
    shown: list[ClipRef] = []
    for row, ref in zip(clips, refs, strict=True):
        ref, pictures, met = clip_or_substitute(
            manifests[ref.dataset],
            ref,
            data=data,
            known=known,
            timed=timed,
            records=(records or {}).get(ref.dataset),
        )
        failures += met
        shown.append(ref)
        if (aspect := stage.squashed_aspect) is not None:
            squashed_crop(pictures, phase.size, aspect=aspect, out=row)
        else:
            cfg, seed = stage.recipe.data.augment, stage.recipe.run.seed
            random_crop(pictures, phase.size, cfg=cfg, seed=seed, step=step, slot=ref.slot, out=row)
    # Extras belong to the clips that are shown; a replaced clip is another one than was drawn.
    batch = MicroBatch(clips, (), step, slots, names, tuple(failures), tuple(ref.record for ref in shown))
    batch = stage.complete(batch, shown, phase, manifests, prepared)
    return replace(batch, load_s=time.perf_counter() - began_s, load_cpu_s=time.process_time() - began_cpu_s)
