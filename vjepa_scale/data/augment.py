"""Pictures of any size -> pictures of the size that is trained on: one crop per clip, resized; and a flip.

Normalisation is not here: batches travel as uint8 and are normalised on the device.
"""

import math
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
    pictures_THWC: npt.NDArray[np.uint8], size: tuple[int, int], cfg: AugmentConfig, *, seed: int, step: int, slot: int
) -> Tensor:
    """Random resized crop and horizontal flip of a clip: uint8 [3, T, *size]. One draw for all its pictures."""
    box = random_box(cfg, Draws(seed, "crop", step, slot), *pictures_THWC.shape[1:3])
    clip = _resized(pictures_THWC, box, size)
    if Draws(seed, "flip", step, slot).uniform() < cfg.flip:
        clip = clip.flip(-1)
    return clip


def center_crop(pictures_THWC: npt.NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """The largest centred crop of the wanted aspect, resized: uint8 [3, T, *size].

    Same pixels as resizing the short side and then cropping the centre, but only what is kept is resized.
    """
    return _resized(pictures_THWC, center_box(size[1] / size[0], *pictures_THWC.shape[1:3]), size)


def _resized(pictures_THWC: npt.NDArray[np.uint8], box: Box, size: tuple[int, int]) -> Tensor:
    top, left, height, width = box
    # A decoded picture is channels-last in memory, which the uint8 kernel is fast on: no copy before it.
    crop_TCHW = torch.from_numpy(pictures_THWC[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    resized = functional.interpolate(crop_TCHW, size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.transpose(0, 1)
