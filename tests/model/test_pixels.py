"""Pixels are normalised to the same bits whatever their shape and memory layout, and are left as they were."""

import numpy as np
import pytest
import torch

from vjepa_scale.model.encoder import PixelNormaliser

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def of_every_byte() -> torch.Tensor:
    """uint8 [2, 3, 4, 16, 16]: each channel has each value."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    return torch.cat([values, values.flip(-1)]).expand(2, 3, 4, 16, 16).contiguous()


def by_numpy(pixels: torch.Tensor) -> np.ndarray:
    """In float32, one operation after the other."""
    shape = (1, 3, *(1 for _ in pixels.shape[2:]))
    mean, std = (np.array(value, np.float32).reshape(shape) for value in (MEAN, STD))
    return (pixels.numpy().astype(np.float32) / np.float32(255) - mean) / std


@pytest.mark.parametrize("shape", ["clips", "clips, frame by frame in memory", "pictures"])
def test_every_value_of_every_channel(shape: str) -> None:
    clips = of_every_byte()
    if "memory" in shape:
        clips = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    pixels = clips[:, :, 0] if shape == "pictures" else clips
    before = pixels.clone()
    found = PixelNormaliser(MEAN, STD)(pixels)
    assert found.dtype == torch.float32
    assert found.stride() == pixels.stride() or shape == "pictures"
    np.testing.assert_array_equal(found.numpy(), by_numpy(pixels))
    assert torch.equal(pixels, before)


def test_what_is_float_already_is_not_written_over() -> None:
    pixels = of_every_byte().float()
    before = pixels.clone()
    np.testing.assert_array_equal(PixelNormaliser(np.array(MEAN), np.array(STD))(pixels).numpy(), by_numpy(pixels))
    assert torch.equal(pixels, before)
