"""Crops: their distribution, their pixels against the formula in NumPy, and that one draw serves a whole clip."""

import numpy as np
import pytest
import torch

from vjepa_scale.core.keyed import Draws
from vjepa_scale.data.augment import Box, center_box, center_crop, random_box, random_crop
from vjepa_scale.recipe.schema import AugmentConfig

PLAIN = AugmentConfig()
NO_FLIP = AugmentConfig(flip=0.0)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return np.ascontiguousarray(small.repeat(8, axis=1).repeat(8, axis=2))


def test_boxes_have_the_area_and_aspect_of_the_recipe_and_lie_in_the_picture() -> None:
    boxes = [random_box(PLAIN, Draws(0, "crop", i, 0), 360, 640) for i in range(4000)]
    area = np.array([b.height * b.width / (360 * 640) for b in boxes])
    aspect = np.array([b.width / b.height for b in boxes])
    assert all(b.top >= 0 and b.left >= 0 and b.top + b.height <= 360 and b.left + b.width <= 640 for b in boxes)
    assert area.min() > 0.29
    assert area.max() < 1.01
    assert aspect.min() > 0.74
    assert aspect.max() < 1.36
    small = [random_box(AugmentConfig(area=0.3), Draws(1, "crop", i, 0), 360, 640) for i in range(4000)]  # always fit
    assert abs(np.mean([np.log(b.width / b.height) for b in small]) - np.log([0.75, 1.35]).mean()) < 0.01
    # Every corner is reached.
    assert min(b.left for b in boxes) == 0
    assert max(b.left + b.width for b in boxes) == 640
    assert min(b.top for b in boxes) == 0
    assert max(b.top + b.height for b in boxes) == 360


def test_a_picture_too_narrow_for_any_crop_gets_the_centred_one() -> None:
    assert random_box(AugmentConfig(area=(0.9, 1.0)), Draws(0, "crop", 0, 0), 100, 1000) == Box(0, 432, 100, 135)
    assert random_box(AugmentConfig(area=(0.9, 1.0)), Draws(0, "crop", 0, 0), 1000, 75) == Box(450, 0, 100, 75)


def test_center_boxes() -> None:
    assert center_box(1.0, 360, 640) == Box(0, 140, 360, 360)
    assert center_box(2.0, 300, 400) == Box(50, 0, 200, 400)
    assert center_box(1.0, 1, 7) == Box(0, 3, 1, 1)


def triangle(source: int, target: int) -> np.ndarray:
    """The matrix [target, source] of a bilinear resize that averages when it shrinks (a triangle filter)."""
    scale = source / target
    center = (np.arange(target)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - center) / max(scale, 1))
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(32, 32), (17, 17), (120, 120)])
def test_pixels_are_those_of_an_antialiased_bilinear_resize(size: tuple[int, int]) -> None:
    pictures = noise(2, 96, 160)
    clip = center_crop(pictures, size)
    assert clip.shape == (3, 2, *size)
    assert clip.dtype == torch.uint8
    square = pictures[:, :, 32:128].astype(float)
    expected = np.einsum("yh,thwc,xw->ctyx", triangle(96, size[0]), square, triangle(96, size[1]), optimize=True)
    assert np.abs(clip.numpy() - expected).max() <= 1.1  # rounded twice, once for each axis


def test_all_pictures_of_a_clip_get_the_same_crop() -> None:
    still = noise(1, 96, 160).repeat(5, axis=0)
    clip = random_crop(still, (32, 48), PLAIN, seed=0, step=3, slot=1)
    assert clip.shape == (3, 5, 32, 48)
    assert (clip == clip[:, :1]).all()


def test_a_crop_belongs_to_its_step_and_slot() -> None:
    pictures = noise(1, 96, 160)

    def crop(seed: int, step: int, slot: int) -> bytes:
        return random_crop(pictures, (16, 16), PLAIN, seed=seed, step=step, slot=slot).contiguous().numpy().tobytes()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert [crop(*key) for key in keys] == [crop(*key) for key in keys]
    assert len({crop(*key) for key in keys}) == 4


def test_half_of_the_clips_are_flipped_and_nothing_else_about_them() -> None:
    pictures = noise(1, 96, 160)
    flipped = 0
    for slot in range(400):
        plain = random_crop(pictures, (16, 16), NO_FLIP, seed=0, step=0, slot=slot)
        clip = random_crop(pictures, (16, 16), PLAIN, seed=0, step=0, slot=slot)
        turned = torch.equal(clip, plain.flip(-1))
        assert turned or torch.equal(clip, plain)
        flipped += turned
    assert 160 < flipped < 240
