"""Pictures as data URIs: rows of frames, masks over frames, features as colours."""

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vjepa_scale.masking.generator import Mask

if TYPE_CHECKING:
    from torch import Tensor

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Frames of a row, and their height in pixels: smaller frames keep their pixels, which the browser enlarges.
COLUMNS, HEIGHT, SMALL = 8, 144, 72

_HIDDEN = 0.2  # brightness of places that the encoder does not see
_TARGET = np.array([1.0, 0.55, 0.1])  # colour over the targets
_GAP = 0.04  # between frames, of their width


@dataclass(frozen=True)
class Strip:
    """A row of frames as one picture. pixelated: to be enlarged without smoothing"""

    label: str
    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Picture:
    """Rows that belong together, with a Markdown caption."""

    caption: str
    strips: tuple[Strip, ...]


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
