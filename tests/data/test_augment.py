"""Crops: their distribution, their pixels against the formula in NumPy, and that one draw serves a whole clip."""

import numpy as np
import pytest
import torch

from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.augment import Box, center_box, center_crop, random_box, random_crop, view_boxes
from vjepa_scale.recipe.schema import AugmentConfig

PLAIN = AugmentConfig()
NO_FLIP, FLIP = AugmentConfig(flip=0.0), AugmentConfig(flip=1.0)


def noise(frames: int, height: int, width: int) -> list[np.ndarray]:
    small = np.random.default_rng(0).integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return list(small.repeat(8, axis=1).repeat(8, axis=2))


def test_boxes_have_the_area_and_aspect_of_the_recipe_and_lie_in_the_picture() -> None:
    boxes = [random_box(PLAIN, KeyedRng(0, "crop", i, 0), 360, 640) for i in range(4000)]
    area = np.array([b.height * b.width / (360 * 640) for b in boxes])
    aspect = np.array([b.width / b.height for b in boxes])
    assert all(b.top >= 0 and b.left >= 0 and b.top + b.height <= 360 and b.left + b.width <= 640 for b in boxes)
    assert area.min() > 0.29
    assert area.max() < 1.01
    assert aspect.min() > 0.74
    assert aspect.max() < 1.36
    small = [
        random_box(AugmentConfig(area=0.3), KeyedRng(1, "crop", i, 0), 360, 640) for i in range(4000)
    ]  # always fit
    assert abs(np.mean([np.log(b.width / b.height) for b in small]) - np.log([0.75, 1.35]).mean()) < 0.01
    # Every corner is reached.
    assert min(b.left for b in boxes) == 0
    assert max(b.left + b.width for b in boxes) == 640
    assert min(b.top for b in boxes) == 0
    assert max(b.top + b.height for b in boxes) == 360


def test_a_picture_too_narrow_for_any_crop_gets_the_centred_one() -> None:
    assert random_box(AugmentConfig(area=(0.9, 1.0)), KeyedRng(0, "crop", 0, 0), 100, 1000) == Box(0, 432, 100, 135)
    assert random_box(AugmentConfig(area=(0.9, 1.0)), KeyedRng(0, "crop", 0, 0), 1000, 75) == Box(450, 0, 100, 75)


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
    square = np.stack(pictures)[:, :, 32:128].astype(float)
    expected = np.einsum("yh,thwc,xw->ctyx", triangle(96, size[0]), square, triangle(96, size[1]), optimize=True)
    assert np.abs(clip.numpy() - expected).max() <= 1.1  # rounded twice, once for each axis


def test_pixels_are_to_the_bit_those_of_torch_on_the_stacked_pictures() -> None:
    """Boxes and sizes of all kinds: shrunk, enlarged, kept, of one pixel."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        frames, height, width = int(rng.integers(1, 5)), *rng.integers(1, 120, 2).tolist()
        pictures = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(frames)]
        pictures.insert(1, pictures[0])  # stays on screen
        size = tuple(rng.integers(1, 90, 2).tolist())
        for slot in range(3):
            box = random_box(PLAIN, KeyedRng(4, "crop", 2, slot), height, width)
            found = random_crop(pictures, size, NO_FLIP, seed=4, step=2, slot=slot)
            assert torch.equal(found, resized_by_torch(pictures, box, size))
            turned = random_crop(pictures, size, FLIP, seed=4, step=2, slot=slot)
            assert torch.equal(turned, found.flip(-1))
        box = center_box(size[1] / size[0], height, width)
        assert torch.equal(center_crop(pictures, size), resized_by_torch(pictures, box, size))
    upside_down = [pictures[0][::-1]]  # as FFmpeg gives some uncompressed pictures
    assert torch.equal(center_crop(upside_down, size), resized_by_torch([pictures[0][::-1].copy()], box, size))


def resized_by_torch(pictures: list[np.ndarray], box: Box, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, T, *size]."""
    crop = np.stack(pictures)[:, box.top : box.top + box.height, box.left : box.left + box.width]
    crop_TCHW = torch.from_numpy(crop).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(crop_TCHW, size=size, mode="bilinear", antialias=True)
    return resized.transpose(0, 1)


def test_the_row_of_a_batch_is_written_in_place() -> None:
    pictures = noise(3, 96, 160)
    batch = torch.zeros(3, 3, 3, 32, 48, dtype=torch.uint8)
    for slot in range(3):
        row = random_crop(pictures, (32, 48), PLAIN, seed=0, step=1, slot=slot, out=batch[slot])
        assert row.data_ptr() == batch[slot].data_ptr()
        assert torch.equal(batch[slot], random_crop(pictures, (32, 48), PLAIN, seed=0, step=1, slot=slot))
    assert center_crop(pictures, (32, 48), out=batch[1]).data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], center_crop(pictures, (32, 48)))


def test_all_pictures_of_a_clip_get_the_same_crop() -> None:
    (picture,) = noise(1, 96, 160)
    still = [picture, picture, picture.copy(), picture, picture.copy()]
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


def test_crops_of_a_view_are_the_published_ones() -> None:
    """Published: the short side resized to ``side``, then squares at 0, step and 2·step along the longer side, with
    step = (longer − side) // 2. Ours are boxes of the picture itself: the same to a pixel of either."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(30, 400, 2).tolist()
        side = int(rng.integers(16, 256))
        scale = min(height, width) / side
        step = (max(height, width) / scale - side) // 2
        boxes = view_boxes(1.0, height, width, crops=3)
        assert boxes[1] == center_box(1.0, height, width) == view_boxes(1.0, height, width, crops=1)[0]
        for k, box in enumerate(boxes):
            assert (box.height, box.width) == (min(height, width),) * 2
            along, across = (box.top, box.left) if height > width else (box.left, box.top)
            assert across == 0
            assert abs(along - k * step * scale) <= 1 + 2 * scale
        assert boxes[2].top + boxes[2].height == height
        assert boxes[2].left + boxes[2].width == width
    assert view_boxes(0.5, 100, 80, crops=3) == [Box(0, 0, 100, 50), Box(0, 15, 100, 50), Box(0, 30, 100, 50)]
