"""Where a token is: what encoder and predictor do about it, by the recipe's ``model.positions``."""

import torch
from torch import Tensor

from vjepa_scale.model.rope import Grid, RopeTables, rescale_to, rope_tables
from vjepa_scale.model.sincos import sincos_positions
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
