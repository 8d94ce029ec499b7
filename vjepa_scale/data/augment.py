"""Pictures of any size -> pictures of the size that is trained on: one crop per clip, resized; and a flip.

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

from vjepa_scale.core.keyed import Draws
from vjepa_scale.recipe.schema import AugmentConfig

_TRIES = 10


class Box(NamedTuple):
    """A crop, in pixels of the decoded picture."""

    top: int
    left: int
    height: int
    width: int


def random_box(cfg: AugmentConfig, draws: Draws, height: int, width: int) -> Box:
    """A random resized crop's box: area uniform, aspect (width/height) log-uniform.

    Ten tries to fit it into the picture; then the largest centred box with the nearest allowed aspect.
    """
    low, high = (math.log(a) for a in cfg.aspect)
    for u_area, u_aspect, u_top, u_left in draws.uniforms(4 * _TRIES).reshape(_TRIES, 4).tolist():
        area = height * width * (cfg.area[0] + (cfg.area[1] - cfg.area[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
    return center_box(min(max(width / height, cfg.aspect[0]), cfg.aspect[1]), height, width)


def center_box(aspect: float, height: int, width: int) -> Box:
    """The largest centred box of an aspect (width/height)."""
    h = min(height, max(1, round(width / aspect)))
    w = min(width, max(1, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


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
    """Random resized crop and horizontal flip of a clip: uint8 [3, T, *size]. One draw for all its pictures.

    pictures: T of uint8 [H, W, 3], all of one size
    out:      where to put the result
    """
    box = random_box(cfg, Draws(seed, "crop", step, slot), *pictures[0].shape[:2])
    clip = _resized(pictures, box, size, out)
    if Draws(seed, "flip", step, slot).uniform() < cfg.flip:
        clip.copy_(clip.flip(-1))
    return clip


def center_crop(
    pictures: Sequence[npt.NDArray[np.uint8]], size: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """The largest centred crop of the wanted aspect, resized: uint8 [3, T, *size].

    pictures: T of uint8 [H, W, 3], all of one size
    out:      where to put the result
    Same pixels as resizing the short side and then cropping the centre, but only what is kept is resized.
    """
    return _resized(pictures, center_box(size[1] / size[0], *pictures[0].shape[:2]), size, out)


def _resized(pictures: Sequence[npt.NDArray[np.uint8]], box: Box, size: tuple[int, int], out: Tensor | None) -> Tensor:
    top, left, height, width = box
    clip = torch.empty(3, len(pictures), *size, dtype=torch.uint8) if out is None else out
    for k, picture in enumerate(pictures):
        if k and picture is pictures[k - 1]:
            clip[:, k] = clip[:, k - 1]
            continue
        # torch's uint8 kernel is fast on channels-last pictures without gaps; numpy is faster at closing the gaps.
        crop_HWC = np.ascontiguousarray(picture[top : top + height, left : left + width])
        crop_BCHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None]
        (clip[:, k],) = functional.interpolate(
            crop_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    return clip
