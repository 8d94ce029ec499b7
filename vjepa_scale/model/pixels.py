"""Pixels as networks take them: (pixel / 255 − mean) / std, channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PixelNormaliser:
    """Normalises pictures and clips, to the same bits in training, inference, evaluation and planning.

    mean, std: of the three channels, of pixels in 0 … 1
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._mean, self._std = (torch.tensor(list(value), dtype=torch.float32, device=device) for value in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, …] in any memory layout → float32 [B, 3, …] on the normaliser's device, a tensor of its own."""
        per_channel = (3, *(1 for _ in pixels.shape[2:]))
        # Moved as bytes, then in place: a micro-batch in float32 is gigabytes.
        values = pixels.to(self._device).to(torch.float32, copy=True).div_(255.0)
        return values.sub_(self._mean.view(per_channel)).div_(self._std.view(per_channel))
