"""The encoder: a video ViT that computes only the requested tokens (V-JEPA 2 paper, section 2.1).

The context encoder, its EMA copy (the target encoder) and the encoder that users load are all this class.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vjepa_scale.core.errors import UserError
from vjepa_scale.model.blocks import LAYER_NORM_EPS, Block, LayerNorm
from vjepa_scale.model.positions import Grid, Positions
from vjepa_scale.recipe.schema import CHANNELS, ModelConfig


class PatchEmbed(nn.Module):
    """Cuts a clip into tubelets and maps each to a token.

    The weight has the published convolution's name and shape [D, 3, tubelet, patch, patch]. It is applied as a matrix
    to the kept tubelets only, so dropped ones cost nothing.
    """

    def __init__(self, width: int, *, tubelet: int, patch: int) -> None:
        super().__init__()
        self.tubelet, self.patch = tubelet, patch
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(CHANNELS, width, kernel_size=size, stride=size)

    def grid(self, clips_BCTHW: Tensor) -> Grid:
        """Returns the grid (t, h, w) of clips. Raises UserError where they do not divide into tubelets."""
        if clips_BCTHW.ndim != 5 or clips_BCTHW.shape[1] != CHANNELS:
            raise UserError(
                f"clips of shape {list(clips_BCTHW.shape)}", where="clip", fix=f"give [B, {CHANNELS}, T, H, W]"
            )
        frames, height, width = clips_BCTHW.shape[2:]
        if frames % self.tubelet or height % self.patch or width % self.patch:
            raise UserError(
                f"a clip of {frames} frames of {height}×{width} pixels does not divide into tubelets of "
                f"{self.tubelet}×{self.patch}×{self.patch}",
                where="clip",
                fix="pad, crop or resize it to multiples of these",
            )
        return frames // self.tubelet, height // self.patch, width // self.patch

    def forward(self, clips_BCTHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        tubelets = rearrange(
            clips_BCTHW,
            "b c (t f) (h p) (w q) -> b (t h w) (c f p q)",
            f=self.tubelet,
            p=self.patch,
            q=self.patch,
        )
        if keep_BK is not None:
            tubelets = tubelets.gather(1, keep_BK[..., None].expand(-1, -1, tubelets.shape[-1]))
        return F.linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Clips to tokens.

    >>> tokens_BND = encoder(clips)             # every token
    >>> tokens_BKD = encoder(clips, keep_BK)    # only these; attention does not see the others
    >>> middle, last = encoder(clips, layers=[11, -1])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        encoder = config.encoder
        self.width = encoder.width
        self.positions = Positions(config, width=encoder.width, heads=encoder.heads)
        self.patch_embed = PatchEmbed(encoder.width, tubelet=config.tubelet, patch=config.patch)
        self.blocks = nn.ModuleList(
            Block(encoder.width, encoder.heads, encoder.mlp_hidden) for _ in range(encoder.depth)
        )
        self.norm = LayerNorm(encoder.width, eps=LAYER_NORM_EPS)

    def forward(
        self, clips_BCTHW: Tensor, keep_BK: Tensor | None = None, *, layers: Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Returns tokens [B, N, D], or [B, K, D] in the order of ``keep_BK``: float32, whatever the weights' type.

        clips_BCTHW:  float, normalised, of any length and size that divides into tubelets
        keep_BK:      int64 token numbers n = τ·h·w + y·w + x; None: all
        layers:       return a list of the tokens after these blocks instead: see ``layers``
        """
        if layers is not None:
            return self.layers(clips_BCTHW, layers, keep_BK)
        for x_BKD in self._block_outputs(clips_BCTHW, keep_BK):  # noqa: B007 (the last one; none is kept before it)
            pass
        return self.norm(x_BKD.float())

    def layers(self, clips_BCTHW: Tensor, layers: Sequence[int], keep_BK: Tensor | None = None) -> list[Tensor]:
        """Returns tokens after several blocks, each [B, N, D] through the final norm, as the published probes use them.

        layers: block numbers from 0; negative ones count from the end. Raises UserError for a missing block.
        """
        depth = len(self.blocks)
        for layer in layers:
            if not -depth <= layer < depth:
                raise UserError(f"no block {layer}", where="layers", fix=f"0 to {depth - 1}, or -1 for the last")
        wanted = {layer % depth for layer in layers}
        outputs = enumerate(self._block_outputs(clips_BCTHW, keep_BK))
        needed = islice(outputs, max(wanted, default=-1) + 1)  # later blocks are not computed
        kept = {number: self.norm(x_BKD.float()) for number, x_BKD in needed if number in wanted}
        return [kept[layer % depth] for layer in layers]

    def _block_outputs(self, clips_BCTHW: Tensor, keep_BK: Tensor | None) -> Iterator[Tensor]:
        grid = self.patch_embed.grid(clips_BCTHW)
        tables = self.positions.rotation(keep_BK, grid, clips_BCTHW.device)
        x_BKD = self.positions.add(self.patch_embed(clips_BCTHW, keep_BK), keep_BK, grid)
        for block in self.blocks:
            x_BKD = block(x_BKD, tables)
            yield x_BKD


def pooled(tokens_BND: Tensor, times: int) -> Tensor:
    """Averages tokens of ``times`` time steps over space: [B, times · D]."""
    B, _, D = tokens_BND.shape
    return tokens_BND.view(B, times, -1, D).mean(2).flatten(1)


class PixelNormaliser:
    """Normalises pictures and clips: (pixel / 255 − mean) / std, channel by channel.

    Training, inference, evaluation and planning get identical bits.

    mean, std: of the three channels, for pixels in 0 … 1
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._mean, self._std = (torch.tensor(list(value), dtype=torch.float32, device=device) for value in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Converts uint8 [B, 3, …] in any memory layout to a new float32 [B, 3, …] on the normaliser's device."""
        per_channel = (3, *(1 for _ in pixels.shape[2:]))
        # Copies bytes to the device, then works in place, because a micro-batch in float32 takes gigabytes.
        values = pixels.to(self._device).to(torch.float32, copy=True).div_(255.0)
        return values.sub_(self._mean.view(per_channel)).div_(self._std.view(per_channel))
