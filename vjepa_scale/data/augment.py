"""Augmentation: crops each clip once, resizes it to the training size, and may flip it.

Normalisation is not here: batches travel as uint8 and are normalised on the device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.recipe.schema import AugmentConfig

_TRIES = 10
_AT_ONCE = 4  # pictures resized in one call


class Box(NamedTuple):
    """A crop, in pixels of the decoded picture."""

    top: int
    left: int
    height: int
    width: int


def random_box(cfg: AugmentConfig, draws: KeyedRng, height: int, width: int) -> Box:
    """Draws the box of a random resized crop: area uniform, aspect (width/height) log-uniform.

    Returns the largest centred box of the nearest allowed aspect where ten draws do not fit into the picture.
    """
    low, high = (math.log(a) for a in cfg.aspect)
    for u_area, u_aspect, u_top, u_left in draws.uniforms(4 * _TRIES).reshape(_TRIES, 4).tolist():
        area = height * width * (cfg.area[0] + (cfg.area[1] - cfg.area[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
    return nearest_box(cfg.aspect, height, width)


def center_box(aspect: float, height: int, width: int) -> Box:
    """The largest centred box of an aspect (width/height)."""
    h = min(height, max(1, round(width / aspect)))
    w = min(width, max(1, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def nearest_box(aspects: tuple[float, float], height: int, width: int) -> Box:
    """The largest centred box of the allowed aspect (width/height) that is nearest to the picture's."""
    return center_box(min(max(width / height, aspects[0]), aspects[1]), height, width)


def view_boxes(aspect: float, height: int, width: int, *, crops: int) -> list[Box]:
    """Returns the largest boxes of an aspect (width/height): 1 in the centre; 3: at both ends of the longer side too.

    In a picture of exactly this aspect the 3 boxes are equal.
    """
    centre = center_box(aspect, height, width)
    if crops == 1:
        return [centre]
    first = centre._replace(top=0, left=0)
    return [first, centre, first._replace(top=height - centre.height, left=width - centre.width)]


def random_crop(
    pictures: Sequence[npt.NDArray[np.uint8]],
    size: tuple[int, int],
    cfg: AugmentConfig,
    *,
    seed: int,
    step: int,
    slot: int,
    out: Tensor | None = None,
) -> Tensor:
    """Random resized crop and horizontal flip of a clip: uint8 [3, T, *size]. All its pictures share one draw.

    pictures: T of uint8 [H, W, 3], all of one size
    out:      where to put the result
    """
    box = random_box(cfg, KeyedRng(seed, "crop", step, slot), *pictures[0].shape[:2])
    clip = _resized(pictures, box, size, out)
    if KeyedRng(seed, "flip", step, slot).uniform() < cfg.flip:
        clip.copy_(clip.flip(-1))
    return clip


def center_crop(
    pictures: Sequence[npt.NDArray[np.uint8]], size: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """Returns the largest centred crop of the aspect of ``size``, resized: uint8 [3, T, *size].

    pictures: T of uint8 [H, W, 3], all of one size
    out:      where to put the result
    The pixels equal those of resizing the short side and then cropping the centre, but only the crop is resized.
    """
    return _resized(pictures, center_box(size[1] / size[0], *pictures[0].shape[:2]), size, out)


def view_crops(pictures: Sequence[npt.NDArray[np.uint8]], size: tuple[int, int], *, out: Tensor) -> None:
    """Writes a clip's resized evaluation crops (view_boxes) to the rows of ``out``: uint8 [crops, 3, T, *size]."""
    boxes = view_boxes(size[1] / size[0], *pictures[0].shape[:2], crops=len(out))
    for box, row in zip(boxes, out, strict=True):
        _resized(pictures, box, size, row)


def squashed_crop(
    pictures: Sequence[npt.NDArray[np.uint8]],
    size: tuple[int, int],
    *,
    aspect: tuple[float, float],
    out: Tensor | None = None,
) -> Tensor:
    """The largest centred crop whose aspect (width/height) is in a range, squashed to a size: uint8 [3, T, *size]."""
    return _resized(pictures, nearest_box(aspect, *pictures[0].shape[:2]), size, out)


def empty_clips(number: int, frames: int, size: tuple[int, int]) -> Tensor:
    """Returns an empty tensor for clips, uint8 [number, 3, frames, *size], channels last in memory."""
    return torch.empty(number, frames, *size, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)


def _resized(pictures: Sequence[npt.NDArray[np.uint8]], box: Box, size: tuple[int, int], out: Tensor | None) -> Tensor:
    top, left, height, width = box
    clip = empty_clips(1, len(pictures), size)[0] if out is None else out
    shown = [k for k, picture in enumerate(pictures) if k == 0 or picture is not pictures[k - 1]]
    ends = [*shown[1:], len(pictures)]
    # torch's uint8 kernel is fast on contiguous channels-last pictures, and twice as fast on several at once. Its
    # result stays channels last. A larger number of pictures would no longer fit into the cache.
    crops_KHWC = np.empty((min(len(shown), _AT_ONCE), height, width, 3), np.uint8)
    for first in range(0, len(shown), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        for crop, k in zip(crops_KHWC, shown[some], strict=False):
            crop[...] = pictures[k][top : top + height, left : left + width]
        crops_KCHW = torch.from_numpy(crops_KHWC[: len(shown[some])]).permute(0, 3, 1, 2)
        resized_KCHW = functional.interpolate(
            crops_KCHW, size=size, mode="bilinear", antialias=True, align_corners=False
        )
        for resized, k, end in zip(resized_KCHW, shown[some], ends[some], strict=True):
            clip[:, k:end] = resized[:, None]
    return clip
