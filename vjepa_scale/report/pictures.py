"""Pictures of a page: clips of a recipe's data with their masks, and patch features as colours beside frames."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.masking.generator import Mask
from vjepa_scale.model import flops
from vjepa_scale.recipe import Phase, Recipe, Stage
from vjepa_scale.report.blocks import Picture, Pictures, Strip, Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vjepa_scale.data.batch import MicroBatch


U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Frames of a row, and their height in pixels: smaller frames keep their pixels, which the browser enlarges.
COLUMNS, HEIGHT, SMALL = 8, 144, 72

_HIDDEN = 0.2  # brightness of places that the encoder does not see
_TARGET = np.array([1.0, 0.55, 0.1])  # colour over the targets
_GAP = 0.04  # between frames, of their width


def strip(label: str, frames_tHW3: U8) -> Strip:
    """Returns frames side by side. Large ones are reduced to ``HEIGHT`` and compressed; small ones keep every pixel."""
    from PIL import Image  # slow to import, and only pictures need it

    small = frames_tHW3.shape[1] <= SMALL
    height = frames_tHW3.shape[1] if small else min(HEIGHT, frames_tHW3.shape[1])
    width = max(1, round(height * frames_tHW3.shape[2] / frames_tHW3.shape[1]))
    gap = max(1, round(_GAP * width))
    row = Image.new("RGBA", (len(frames_tHW3) * (width + gap) - gap, height))  # the gaps are transparent
    for number, frame in enumerate(frames_tHW3):
        image = Image.fromarray(frame)
        row.paste(
            image if small else image.resize((width, height), Image.Resampling.LANCZOS), (number * (width + gap), 0)
        )
    file = io.BytesIO()
    row.save(file, "PNG", optimize=True) if small else row.save(file, "WEBP", quality=84)
    kind = "png" if small else "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Strip(label, uri, row.width, row.height, small)


def columns_of(steps: int) -> list[int]:
    """Returns at most ``COLUMNS`` of the token steps of a clip, evenly spaced, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(steps, COLUMNS))})


def masked_frames(frames_tHW3: U8, context_thw: Mask, target_thw: Mask) -> U8:
    """Returns frames with hidden places dark and targets in orange. Frames: one per token step"""
    size = frames_tHW3.shape[1:3]
    seen, wanted = (_over_pixels(mask, size)[..., None] for mask in (context_thw, target_thw))
    frames = frames_tHW3 / 255
    picture = np.where(seen, frames, _HIDDEN * frames)
    return (255 * np.where(wanted, 0.45 * frames + 0.55 * _TARGET, picture)).round().astype(np.uint8)


def _over_pixels(tokens_thw: Mask, size: tuple[int, ...]) -> Mask:
    """Upsamples a mask of tokens, [t, h, w], to the pixels of one frame per token step: [t, H, W]."""
    return tokens_thw.repeat(size[0] // tokens_thw.shape[1], 1).repeat(size[1] // tokens_thw.shape[2], 2)


def principal_colours(tokens_BND: "Tensor") -> F32:
    """Returns projections on the first three principal components over all tokens, each scaled to [0, 1]: [B, N, 3].

    The middle 98 % of a component's values cover the whole range, because outliers would leave the rest grey.
    """
    import torch

    flat = tokens_BND.detach().flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    values = (centred @ vectors[:, -3:].flip(1)).numpy()
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    spread = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return spread.astype(np.float32).reshape(*tokens_BND.shape[:2], 3)


def with_signs_of(colours_BN3: F32, before_BN3: F32) -> F32:
    """Returns colours with each component's sign chosen as in ``before``: the sign of a component is arbitrary."""
    both = (colours.reshape(-1, 3) - colours.reshape(-1, 3).mean(0) for colours in (colours_BN3, before_BN3))
    now, then = both
    return np.where((now * then).sum(0) < 0, 1 - colours_BN3, colours_BN3).astype(np.float32)


# -- clips with masks --------------------------------------------------------------------------------


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
    except (UserError, OSError, RuntimeError) as error:  # also a GPU that is full of training
        return [Text(f"No features: {str(error).partition(chr(10))[0]}", remark=True)]


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
