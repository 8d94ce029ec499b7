"""README.md of an exported model: its facts, how to use it, and its recipe."""

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

# V-JEPA 2 video encoder: {title}

Exported by vjepa_scale. {parameters} parameters, {mask_tokens} mask tokens.

| | width | depth | heads | MLP hidden |
|---|---|---|---|---|
{rows}

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
"""


_FEATURES = """\
    tokens = model(pixel_values_videos=clip[None], skip_predictor=True).last_hidden_state
print(tokens.shape)  # [1, {tokens}, {width}]"""

_CLASSES = """\
    logits = model(pixel_values_videos=clip[None]).logits  # [1, {classes}]
print(model.config.id2label[int(logits.argmax())])"""


def model_card(config: ConsolidatedConfig, *, parameters: int, mask_token: int, classifier: bool = False) -> str:
    """Returns Markdown with Hugging Face's front matter.

    parameters: number of parameters in the files
    mask_token: index of the mask token that their predictor uses
    classifier: a VJEPA2ForVideoClassification, not a VJEPA2Model
    """
    model = config.model
    crop = config.size[0]
    rows = [
        f"| {name} | {part.width} | {part.depth} | {part.heads} | {part.mlp_hidden} |"
        for name, part in (("encoder", model.encoder), ("predictor", model.predictor))
    ]
    tokens = config.frames // model.tubelet * (crop // model.patch) ** 2
    if classifier:
        use = _CLASSES.format(classes=len(config.classes))
    else:
        use = _FEATURES.format(tokens=tokens, width=model.encoder.width)
    return _CARD.format(
        architecture="VJEPA2ForVideoClassification" if classifier else "VJEPA2Model",
        use=use,
        frames=config.frames,
        mean=list(config.mean),
        std=list(config.std),
        title=config.title(),
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
    return f"```yaml\n{yaml.safe_dump(config.recipe, sort_keys=False, default_flow_style=None, width=110)}```"
