"""What the tests of this room compare with: PyAV and NumPy for clips, Hugging Face's model for features."""

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from transformers import VJEPA2Model

from tests.inference.checkpoint import FPS, MEAN, SIZE, STD


def frames_of(path: Path) -> list[np.ndarray]:
    """Every frame's pixels, decoded in order."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def sampled(path: Path, rate: int, *, fps: float = FPS, start_s: float = 0.0) -> list[np.ndarray]:
    """Of a constant rate: the frames on screen at start_s, start_s + 1/fps, … before the end."""
    frames = frames_of(path)
    times = start_s + np.arange(10_000) / fps
    return [frames[int(t * rate + 1e-6)] for t in times if t < len(frames) / rate - 1e-6]


def shrunk(picture: np.ndarray, size: int = SIZE) -> np.ndarray:
    """The centre square, each side by a triangle filter: float [size, size, 3]."""
    height, width, _ = picture.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side].astype(float)
    scale = side / size
    center = (np.arange(size)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(np.arange(side) + 0.5 - center) / max(scale, 1))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("ys,sxc,zx->yzc", weight, square, weight)


def clip_of(pictures: list[np.ndarray], size: int = SIZE) -> Tensor:
    """Normalised [1, 3, T, size, size]."""
    clip = np.stack([(shrunk(p, size) / 255 - MEAN) / STD for p in pictures])
    return torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float()


@torch.no_grad()
def tokens_of(published: VJEPA2Model, clip: Tensor) -> Tensor:
    """[B, N, D] of the encoder, of a clip of its own size and any length."""
    return published.encoder(clip.transpose(1, 2)).last_hidden_state


# A picture is rounded to uint8 once for each axis of its resize: at most 1.1/255 off, in units of the smallest std.
PIXEL = 1.1 / 255 / min(STD) + 1e-6


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """1e-5 of the largest value: float32 in another order."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance
