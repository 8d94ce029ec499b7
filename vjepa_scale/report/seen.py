"""Clips of a recipe's data with their masks, and patch features of several checkpoints as colours beside frames."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.model import flops
from vjepa_scale.recipe import Phase, Recipe, Stage
from vjepa_scale.report.blocks import Pictures, Text
from vjepa_scale.report.pictures import (
    F32,
    U8,
    Picture,
    Strip,
    columns_of,
    masked_frames,
    principal_colours,
    strip,
    with_signs_of,
)

if TYPE_CHECKING:
    import torch

    from vjepa_scale.data.batch import MicroBatch

# Clips of each geometry, geometries, checkpoints, and clips of the features: bounds of the page's size.
CLIPS, GEOMETRIES, CHECKPOINTS, FEATURE_CLIPS = 3, 4, 4, 3
# A larger encoder takes minutes on a login node's CPU.
LARGE = 100e6


def mask_pictures(stages: Sequence[Stage]) -> list[Pictures | Text]:
    """Returns a few clips of each geometry of the stages with masks, augmented as training augments them.

    A stage whose data cannot be read becomes a remark.
    """
    out: list[Pictures | Text] = []
    shown: set[tuple[int, tuple[int, int]]] = set()
    for stage in stages:
        if not stage.has_target_encoder:
            continue
        try:
            for phase, batches in _clips(stage, shown, CLIPS):
                out.append(Pictures([_masked(stage, phase, batch) for batch in batches]))
        except (UserError, OSError) as error:
            out.append(Text(f"No clips of {stage.name}: {error}", remark=True))
    return out


def _clips(stage: Stage, shown: set[tuple[int, tuple[int, int]]], clips: int) -> "list[tuple[Phase, list[MicroBatch]]]":
    """Loads clips of the first step of each phase whose geometry is not in ``shown``, and adds it there.

    One clip of each data set comes first.
    """
    from vjepa_scale.data.batch import load_micro_batch
    from vjepa_scale.training.planned_start import planned_order

    phases, order, manifests = planned_order(stage)
    out = []
    for phase in phases:
        for frames, part in phase.geometries.items():
            if (frames, phase.size) in shown or len(shown) >= GEOMETRIES:
                continue
            shown.add((frames, phase.size))
            sets = [order.names[number] for number in order.batch(phase.first).dataset]
            first = [sets.index(name) for name in part if name in sets]
            others = [slot for slot, name in enumerate(sets) if name in part and slot not in first]
            chosen = [*first, *others][:clips]
            single = replace(phase, micro_batch=1)  # slots are drawn alike in micro-batches of any size
            prepared = stage.prepared(phase, manifests)
            out.append(
                (phase, [load_micro_batch(stage, single, order, manifests, (phase.first, slot), known={},
                                          records=stage.records(manifests), prepared=prepared) for slot in chosen])
            )  # fmt: skip
    return out


def _masked(stage: Stage, phase: Phase, batch: "MicroBatch") -> Picture:
    model, frames = stage.recipe.model, _frames(batch)
    grid = phase.grid(patch=model.patch, tubelet=model.tubelet, frames=len(frames))
    tokens = int(np.prod(grid))
    columns = columns_of(grid[0])
    pictures = frames[:: model.tubelet][columns]
    strips = [strip("clip", pictures)]
    for number, pair in enumerate(batch.masks):
        context, target = (np.zeros(tokens, np.bool_) for _ in range(2))
        context[pair.context[0].numpy()] = target[pair.target[0].numpy()] = True
        drawn = masked_frames(pictures, context.reshape(grid)[columns], target.reshape(grid)[columns])
        label = f"masks {number}: sees {context.sum() / tokens:.0%}, predicts {target.sum() / tokens:.0%} of {tokens}"
        strips.append(strip(f"{label} tokens", drawn))
    caption = (
        f"`{stage.name}/{phase.name}`, step {batch.step}, slot {batch.slots.start}: record {batch.records[0]} of "
        f"`{batch.datasets[0]}`, {len(frames)} frames of {phase.size[0]}×{phase.size[1]} pixels"
    )
    return Picture(caption, tuple(strips))


def _frames(batch: "MicroBatch") -> U8:
    """Returns the clip of a micro-batch of one: [T, H, W, 3]."""
    frames: U8 = batch.clips[0].movedim(0, -1).contiguous().numpy()
    return frames


# -- features ---------------------------------------------------------------------------------------


def feature_pictures(
    recipe: Recipe, stages: Sequence[Stage], checkpoints: Sequence[Path], *, forced: bool
) -> list[Pictures | Text]:
    """Returns frames, and below them the patch features of up to ``CHECKPOINTS`` checkpoints as colours.

    stages:      of the checkpoints; the clips are of the last geometry that one of them has trained
    checkpoints: oldest first
    forced:      also for an encoder that is large for a CPU
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = flops.encoder_parameters(recipe.model)
    if not checkpoints:
        return [Text("No checkpoint yet.", remark=True)]
    if size > LARGE and device.type == "cpu" and not forced:
        what = f"An encoder of {size / 1e6:,.0f} M parameters takes minutes on a CPU"
        return [Text(f"{what}: `--features` draws its features all the same.", remark=True)]
    try:
        phase, batches = _clips(stages[-1], set(), FEATURE_CLIPS)[-1]
        return [_features(recipe, phase, batches, _spread(checkpoints), device)]
    except (UserError, OSError) as error:
        return [Text(f"No features: {error}", remark=True)]


def _spread(checkpoints: Sequence[Path]) -> list[Path]:
    """Returns the first checkpoint, the last one of each stage, and some between them: at most ``CHECKPOINTS``."""
    last = {path.parent: place for place, path in enumerate(checkpoints)}
    chosen = sorted({0, *last.values()})[-CHECKPOINTS:]
    others = [place for place in range(len(checkpoints)) if place not in chosen]
    free = min(CHECKPOINTS - len(chosen), len(others))
    chosen += [others[(2 * number + 1) * len(others) // (2 * free)] for number in range(free)]
    return [checkpoints[place] for place in sorted(chosen)]


def _features(
    recipe: Recipe, phase: Phase, batches: "Sequence[MicroBatch]", checkpoints: list[Path], device: "torch.device"
) -> Pictures:
    import torch

    from vjepa_scale.inference.model import load_model

    clips = torch.cat([batch.clips for batch in batches])
    grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=clips.shape[2])
    colours: list[F32] = []
    for checkpoint in checkpoints:
        model = load_model(checkpoint, device)
        tokens = torch.cat([model.encode_clips(model.normalise(clip[None])) for clip in clips]).cpu()
        found = principal_colours(tokens)
        colours.append(with_signs_of(found, colours[-1]) if colours else found)
    columns = columns_of(grid[0])
    pictures = []
    for number, batch in enumerate(batches):
        frames = _frames(batch)[:: recipe.model.tubelet][columns]
        strips: list[Strip] = [strip("clip", frames)]
        for checkpoint, found in zip(checkpoints, colours, strict=True):
            patches = (255 * found[number].reshape(*grid, 3)[columns]).round().astype(np.uint8)
            enlarged = patches.repeat(frames.shape[1] // grid[1], 1).repeat(frames.shape[2] // grid[2], 2)
            stage = checkpoint.parent.parent.name
            strips.append(strip(f"{stage}, step {int(checkpoint.name.removeprefix('step_')):,}", enlarged))
        pictures.append(Picture(f"record {batch.records[0]} of `{batch.datasets[0]}`", tuple(strips)))
    return Pictures(pictures)
