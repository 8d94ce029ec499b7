"""Where a token is: what encoder and predictor do about it, by the recipe's ``model.positions``.

rope:   queries and keys are rotated (rope.py)
sincos: a fixed sine-cosine table is added to the tokens (V-JEPA 1, I-JEPA). The table belongs to one geometry, that of
        the pretraining; a clip of another size takes it interpolated.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa_scale.model.rope import BASE, Grid, RopeTables, rescale_to, rope_tables
from vjepa_scale.recipe.schema import ModelConfig


class Positions:
    """Of one network: tables that rotate queries and keys, or a table that is added to the tokens, never both.

    A plain class without parameters: both are computed once per forward, in float32.
    """

    def __init__(self, config: ModelConfig, *, width: int, heads: int) -> None:
        self._config, self._width, self._head_dim = config, width, width // heads

    def add(self, x_BKD: Tensor, index: Tensor | None, grid: Grid) -> Tensor:
        """Tokens at the places ``index`` [B, K] (None: all) of the grid, with what is added to them there."""
        if self._config.positions == "rope":
            return x_BKD
        table = sincos_positions(index, grid=grid, width=self._width, config=self._config, device=x_BKD.device)
        return (x_BKD.float() + table).to(x_BKD.dtype)

    def rotation(self, index: Tensor | None, grid: Grid, device: torch.device) -> RopeTables | None:
        """What rotates the queries and keys of tokens at these places."""
        if self._config.positions == "sincos":
            return None
        rope = self._config.rope
        return rope_tables(
            index,
            grid=grid,
            head_dim=self._head_dim,
            layout=rope.layout,
            device=device,
            scale=rescale_to(rope.grid, grid),
        )


def sincos_positions(
    index: Tensor | None, *, grid: Grid, width: int, config: ModelConfig, device: torch.device | None = None
) -> Tensor:
    """What is added to the tokens that are present: float32 [K, D] or [B, K, D].

    index: int64 token numbers [K] or [B, K] in ``grid`` (t, h, w); None: all in order

    A clip that is only shorter than the table's takes its first time steps; any other geometry takes the table
    interpolated (trilinear).
    """
    sincos = config.sincos
    own: Grid = (
        max(sincos.frames // config.tubelet, 1),
        sincos.size[0] // config.patch,
        sincos.size[1] // config.patch,
    )
    if sincos.frames == 1:
        shares = (0, width // 2, width // 2)
    elif sincos.uniform_power:
        shares = (2 * -(-width // 6),) * 3
    else:
        shares = (width // 2, width // 4, width // 4)
    device = device if index is None else index.device
    table_thwD = _table(own, shares, device)[..., :width]
    if grid[1:] == own[1:] and grid[0] <= own[0]:
        table_thwD = table_thwD[: grid[0]]
    else:
        moved = F.interpolate(table_thwD.movedim(-1, 0)[None], size=grid, mode="trilinear", align_corners=False)
        table_thwD = moved[0].movedim(0, -1)
    table_ND = table_thwD.flatten(0, 2)
    return table_ND if index is None else table_ND[index]


def _table(grid: Grid, shares: tuple[int, int, int], device: torch.device | None) -> Tensor:
    """[t, h, w, sum of shares] float32: of each axis that has a share, sin then cos of p·10000^(−k/(n/2))."""
    parts = []
    for axis, (length, channels) in enumerate(zip(grid, shares, strict=True)):
        half = channels // 2
        frequencies = BASE ** -(torch.arange(half, dtype=torch.float64, device=device) / max(half, 1))
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
        values = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
        view = [1, 1, 1, channels]
        view[axis] = length
        parts.append(values.view(view).expand(*grid, channels))
    return torch.cat(parts, dim=-1)
