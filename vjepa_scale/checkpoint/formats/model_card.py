"""README.md of an exported model: its facts, how to use it, and its recipe."""

from dataclasses import dataclass
from typing import Any

import yaml

from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig
from vjepa_scale.masking.generator import generator_class
from vjepa_scale.recipe.registry import MASK_GENERATORS

_CARD = """---
library_name: transformers
pipeline_tag: video-classification
tags:
- video
- v-jepa-2
---

# {title}

Exported by vjepa_scale. {parameters} parameters, {mask_tokens} mask tokens.

| | width | depth | heads | MLP hidden |
|---|---|---|---|---|
{rows}
{classifier}
Clips: {clip}. One token is {tubelet} frames × {patch}×{patch} pixels. Rotary positions of the `tiled` layout.

```python
import torch
from torch.nn.functional import interpolate
from transformers import {architecture}

model = {architecture}.from_pretrained(".").eval()  # this folder
mean, std = torch.tensor({mean}), torch.tensor({std})

video = torch.randint(0, 256, ({frames}, 3, 240, 320), dtype=torch.uint8)  # your clip: uint8 [T, 3, H, W], RGB
height, width = video.shape[-2:]
side = min(height, width)
top, left = (height - side) // 2, (width - side) // 2
square = video[:, :, top : top + side, left : left + side].float()
resized = interpolate(square, size=({crop}, {crop}), mode="bilinear", antialias=True)
clip = (resized / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
with torch.no_grad():
{use}
```

That is what the training's evaluation does: the largest central square, resized to {crop}×{crop}. `AutoVideoProcessor`,
which needs torchvision, resizes the shorter side to {resize} pixels and crops the central {crop}×{crop}. Positions are
computed for {crop}×{crop} pixels: give the model no other size.

## The predictor
`VJEPA2Model` predicts with mask token {mask_token}, always. {generators}

## Recipe
{recipe}
{probe_recipe}"""


_FEATURES = """\
    tokens = model(pixel_values_videos=clip[None], skip_predictor=True).last_hidden_state
print(tokens.shape)  # [1, {tokens}, {width}]"""

_CLASSES = """\
    logits = model(pixel_values_videos=clip[None]).logits  # [1, {classes}]
print(model.config.id2label[int(logits.argmax())])"""


@dataclass(frozen=True)
class ClassifierCard:
    """What the card of a classifier says about its probe; None: not known.

    name:     of the best probe of its stage
    accuracy: on the evaluation clips, 0 to 1
    clips:    the number of those clips
    recipe:   of the run with the probe stage
    """

    name: str | None = None
    accuracy: float | None = None
    clips: int | None = None
    recipe: dict[str, Any] | None = None


def model_card(
    config: ConsolidatedConfig, *, parameters: int, mask_token: int, classifier: ClassifierCard | None = None
) -> str:
    """Returns Markdown with Hugging Face's front matter.

    parameters: number of parameters in the files
    mask_token: index of the mask token that their predictor uses
    classifier: the probe of a VJEPA2ForVideoClassification; None: a VJEPA2Model
    """
    model = config.model
    crop = config.size[0]
    rows = [
        f"| {name} | {part.width} | {part.depth} | {part.heads} | {part.mlp_hidden} |"
        for name, part in (("encoder", model.encoder), ("predictor", model.predictor))
    ]
    tokens = config.frames // model.tubelet * (crop // model.patch) ** 2
    if classifier is not None:
        use = _CLASSES.format(classes=len(config.classes))
    else:
        use = _FEATURES.format(tokens=tokens, width=model.encoder.width)
    return _CARD.format(
        architecture="VJEPA2ForVideoClassification" if classifier is not None else "VJEPA2Model",
        use=use,
        frames=config.frames,
        mean=list(config.mean),
        std=list(config.std),
        title=f"V-JEPA 2 video encoder: {config.title()}"
        if classifier is None
        else f"V-JEPA 2 video classifier: {len(config.classes)} classes, on {config.title()}",
        classifier="" if classifier is None else _classifier(config, classifier),
        probe_recipe="" if classifier is None else f"\n## Recipe of the probe\n{_yaml(classifier.recipe)}\n",
        parameters=f"{parameters:,}",
        mask_tokens=model.predictor.mask_tokens,
        rows="\n".join(rows),
        clip=f"{config.frames} frames of {crop}×{crop} pixels, {config.fps:g} frames per second",
        tubelet=model.tubelet,
        patch=model.patch,
        resize=int(crop * 256 / 224),
        crop=crop,
        mask_token=mask_token,
        generators=predicts_as(config, mask_token),
        recipe=_recipe(config),
    )


def _classifier(config: ConsolidatedConfig, card: ClassifierCard) -> str:
    name = f"the probe `{card.name}`" if card.name else "an attentive probe"
    clips = f" of {card.clips} clips" if card.clips is not None else ""
    accuracy = "not known" if card.accuracy is None else f"{card.accuracy:.2%}{clips}, in the evaluation of its stage"
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(config.classes))
    return f"\nThe head is {name} on the frozen encoder. Accuracy: {accuracy}.\n\nClasses: {classes}.\n"


def predicts_as(config: ConsolidatedConfig, mask_token: int) -> str:
    """Returns a sentence on the masks that a mask token was trained with, from the recipe and ``jepa.mask_token``."""
    count = config.model.predictor.mask_tokens
    generators = _generators(config.recipe)
    if generators is None:
        return "Which masks that token was trained for is not known."
    first = (config.recipe or {}).get("jepa", {}).get("mask_token") == "first"
    trained_by = [j for j in range(len(generators)) if (0 if first else j % count) == mask_token]
    if not trained_by:
        return (
            "No mask generator of the recipe trained that token: it is as it was at the "
            "start, so use this predictor only where that does not matter."
        )
    described = " and ".join(f"generator {j} ({_described(generators[j])})" for j in trained_by)
    return f"It was trained by mask {described} of the recipe: ask for such targets."


def _described(entry: dict[str, Any]) -> str:
    kind = entry.get("kind", "blocks")
    return generator_class(kind).describe(entry) if kind in MASK_GENERATORS else f"kind {kind}"


def _generators(recipe: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    masks = (recipe or {}).get("masks", {})
    generators = masks.get("generators") if isinstance(masks, dict) else None
    return list(generators) if generators else None


def _recipe(config: ConsolidatedConfig) -> str:
    if not config.recipe:
        return f"Not known: converted from {config.provenance()}."
    return _yaml(config.recipe)


def _yaml(recipe: dict[str, Any] | None) -> str:
    if not recipe:
        return "Not known."
    return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)}```"
