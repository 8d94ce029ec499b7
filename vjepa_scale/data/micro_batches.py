"""One micro-batch from the shards: clips decoded and cropped, and beside them what their stage learns from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.data.augment import empty_clips, random_crop, squashed_crop
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.clips import ClipRef, Timed, clip_refs, data_of
from vjepa_scale.data.labels import label_of
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.selection import keeps_tokens, task_of
from vjepa_scale.data.substitution import DecodeFailure, Known, clip_or_substitute
from vjepa_scale.data.trajectory_clips import trajectory_clip
from vjepa_scale.masking import draw_masks
from vjepa_scale.recipe import Phase, Recipe, resolve_phases


def load_micro_batch(
    recipe: Recipe,
    phase: Phase,
    order: DataOrder,
    manifests: Mapping[str, Manifest],
    index: tuple[int, int],
    *,
    known: Known,
    timed: Timed | None = None,
    kept: Mapping[str, Ints] | None = None,
    draws: Mapping[str, Ints] | None = None,
) -> MicroBatch:
    """Micro-batch number m of a step, by index (step, m): decoded, cropped, with what its stage learns from.

    draws: of a probe stage with several draws of labels, each record's by data set (``label_draws``)
    Where a probe stage keeps its clips' tokens, nothing is decoded: clips have no frames.
    """
    step, number = index
    slots = range(number * phase.micro_batch, (number + 1) * phase.micro_batch)
    refs = clip_refs(recipe, phase, order, manifests, step=step, slots=slots)
    names = tuple(ref.dataset for ref in refs)
    if keeps_tokens(recipe, phase):
        unseen = MicroBatch(empty_clips(len(refs), 0, phase.size), (), step, slots, names)
        return _labelled(unseen, recipe, phase, refs, manifests, draws)
    frames = phase.frames_of(refs[0].dataset)
    assert all(len(ref.times_s) == frames for ref in refs), "a micro-batch has one geometry"
    clips = empty_clips(len(refs), frames, phase.size)
    data, crop = data_of(recipe, phase), crop_of(recipe, phase)
    accidents: list[DecodeFailure] = []
    shown: list[ClipRef] = []
    for row, ref in zip(clips, refs, strict=True):
        ref, pictures, met = clip_or_substitute(
            manifests[ref.dataset], ref, data=data, known=known, timed=timed, kept=(kept or {}).get(ref.dataset)
        )
        accidents += met
        shown.append(ref)
        crop(pictures, phase.size, step=step, slot=ref.slot, out=row)
    batch = MicroBatch(clips, (), step, slots, names, tuple(accidents))
    # Of the clips that are shown, which are not always those that were drawn.
    if phase.kind == "action":
        states, extrinsics = states_of(shown, manifests, extrinsics=recipe.model.action_predictor.extrinsics)
        return replace(batch, states=states, extrinsics=extrinsics)
    if phase.kind == "probe":
        return _labelled(batch, recipe, phase, shown, manifests, draws)
    grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=frames)
    return replace(batch, masks=draw_masks(recipe.masks, seed=recipe.run.seed, step=step, slots=slots, grid=grid))


def crop_of(recipe: Recipe, phase: Phase) -> Callable[..., Tensor]:
    """How a phase makes pictures of its size: (pictures, size, *, step, slot, out)."""
    if recipe.action is not None and phase.kind == "action":
        aspect = recipe.action.crop_aspect
        return lambda pictures, size, *, step, slot, out: squashed_crop(pictures, size, aspect=aspect, out=out)
    return partial(random_crop, cfg=recipe.data.augment, seed=recipe.run.seed)


def _labelled(
    batch: MicroBatch,
    recipe: Recipe,
    phase: Phase,
    shown: Sequence[ClipRef],
    manifests: Mapping[str, Manifest],
    draws: Mapping[str, Ints] | None,
) -> MicroBatch:
    """A batch with what a probe stage learns from."""
    classes = task_of(resolve_phases(recipe, phase.stage), manifests).classes
    numbers = [label_of(manifests[ref.dataset], ref.record, classes) for ref in shown]
    batch = replace(batch, records=tuple(ref.record for ref in shown), labels=torch.tensor(numbers))
    if draws is None:
        return batch
    return replace(batch, label_draws=torch.tensor([int(draws[ref.dataset][ref.record]) for ref in shown]))


def states_of(
    refs: Sequence[ClipRef], manifests: Mapping[str, Manifest], *, extrinsics: bool
) -> tuple[Tensor, Tensor | None]:
    """What the robots of some clips did at their frames' times: states [b, T, 7], and the cameras' poses [b, T, 6]."""
    clips = [trajectory_clip(manifests[ref.dataset], ref) for ref in refs]
    states = torch.from_numpy(np.stack([clip.states for clip in clips]))
    if not extrinsics:
        return states, None
    cameras = [clip.extrinsics for clip in clips if clip.extrinsics is not None]
    assert len(cameras) == len(clips), "kept_records saw them"
    return states, torch.from_numpy(np.stack(cameras))
