"""Position encodings of encoder and predictor, by the recipe's ``model.positions``.

rope:   queries and keys are rotated, in three axes: time, height, width (V-JEPA 2 paper, section 2.1)
sincos: a fixed sine-cosine table is added to the tokens (V-JEPA 1, I-JEPA). The table belongs to the pretraining
        geometry; it is interpolated for a clip of another size.

RoPE: a head's d channels are cut into three axis groups of a = 2·((d//3)//2) channels and a rest that is
not rotated. Inside a group channels go in pairs (2j, 2j+1); a pair (x, x') becomes
(x·cos − x'·sin, x'·cos + x·sin), each of the two with its own angle from the table:

    tiled        θ0 … θ(a/2−1), θ0 … θ(a/2−1)    every released V-JEPA 2 weight; the two angles of a pair differ
    interleaved  θ0, θ0, θ1, θ1, …               a true rotation; V-JEPA 2.1

with θk = p · 10000^(−k/(a/2)) for a token at position p of the axis: its integer grid index, unless positions are
rescaled to the pretraining grid.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa_scale.recipe.schema import ModelConfig

BASE = 10000.0

Grid = tuple[int, int, int]
Scale = tuple[float, float, float]
UNSCALED: Scale = (1.0, 1.0, 1.0)
Layout = Literal["tiled", "interleaved"]


class RopeTables:
    """Tables that rotate the queries and keys of all blocks in one forward: float32, [K, d] or [B, K, d].

    cos:         1 in channels that are not rotated
    signed_sin:  factor of the pair's other channel: −sin in even channels, +sin in odd ones, 0 in channels that are
                 not rotated

    A plain class, because FSDP2 casts all floating-point tensors in a module's arguments, also inside tuples,
    dictionaries and dataclasses; cos and sin rounded to bfloat16 distinguish neighbouring positions only in the highest
    frequencies.
    """

    def __init__(self, cos: Tensor, signed_sin: Tensor) -> None:
        self.cos, self.signed_sin = cos, signed_sin


def rope_tables(
    index: Tensor | None,
    *,
    grid: Grid,
    head_dim: int,
    layout: Layout,
    device: torch.device | None = None,
    scale: Scale = UNSCALED,
) -> RopeTables:
    """Returns the tables for the tokens that are present. Called once per forward.

    index:   token numbers n = τ·h·w + y·w + x, int64 [K] or [B, K]; None: all t·h·w in order
    grid:    (t, h, w) in tokens
    device:  where to build them if ``index`` is None
    scale:   a token's position on each axis is its grid index times this
    """
    index, places = token_places(index, grid, device)
    channels = axis_channels(head_dim)
    cos, signed_sin = [], []
    for place, length, factor in zip(places, grid, scale, strict=True):
        axis_cos, axis_signed_sin = _axis_tables(length, factor, channels, layout, index.device)
        cos.append(axis_cos[place])
        signed_sin.append(axis_signed_sin[place])
    rest = index.new_zeros((), dtype=torch.float32).expand(*index.shape, head_dim - 3 * channels)
    return RopeTables(torch.cat([*cos, rest + 1], dim=-1), torch.cat([*signed_sin, rest], dim=-1))


def time_tables(steps: int, *, tokens: int, head_dim: int, layout: Layout, device: torch.device) -> RopeTables:
    """Returns tables for tokens with a time but no place, such as a robot's action: only the time group is rotated.

    tokens: number of consecutive tokens with the same time; the tables are [steps · tokens, d]
    """
    channels = axis_channels(head_dim)
    both = _axis_tables(steps, 1.0, channels, layout, device)
    cos, signed_sin = (table.repeat_interleave(tokens, dim=0) for table in both)
    rest = cos.new_zeros(len(cos), head_dim - channels)
    return RopeTables(torch.cat([cos, rest + 1], dim=-1), torch.cat([signed_sin, rest], dim=-1))


def rescale_to(pretraining: tuple[int, int] | None, grid: Grid) -> Scale:
    """Returns the ``scale`` that spreads a grid's rows and columns over those of the pretraining grid (V-JEPA 2.1).

    Row y of h becomes y·(h₀−1)/(h−1), so first and last rows stay first and last. None: no rescaling.
    """
    if pretraining is None:
        return UNSCALED
    height, width = ((of - 1) / max(here - 1, 1) for of, here in zip(pretraining, grid[1:], strict=True))
    return 1.0, height, width


def token_places(
    index: Tensor | None, grid: Grid, device: torch.device | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Returns token numbers (all for None) and their (τ, y, x), each in the shape of ``index``."""
    _, height, width = grid
    if index is None:
        index = torch.arange(grid[0] * height * width, device=device)
    rows = index // width
    return index, (rows // height, rows % height, index - rows * width)


def axis_channels(head_dim: int) -> int:
    """Returns a, the number of channels of a head that one axis rotates."""
    return 2 * ((head_dim // 3) // 2)


_kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def _axis_tables(
    length: int, scale: float, channels: int, layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cos and signed sin of every position of one axis, [length, a], cached.

    Computing them takes blocking copies to a GPU, 15 in the loss of a micro-batch. They are small and never change.
    """
    key = (length, scale, channels, layout, device)
    if key in _kept:
        return _kept[key]
    with torch.inference_mode(False):  # inference tensors could not be used in training
        made = _compute_axis_tables(length, scale, channels, layout, device)
    if type(made[0]) is Tensor:  # not a subclass, which FLOP counters and tracers use
        _kept[key] = made
    return made


def _compute_axis_tables(
    length: int, scale: float, channels: int, layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Computes angles in float64: they are few, and float32 angles would lose more digits than rounding the result."""
    frequencies = BASE ** -(torch.arange(channels // 2, dtype=torch.float64, device=device) / (channels // 2))
    positions = torch.arange(length, dtype=torch.float64, device=device) * scale
    angles = positions[:, None] * frequencies
    angles = angles.repeat(1, 2) if layout == "tiled" else angles.repeat_interleave(2, dim=1)
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=device).repeat(channels // 2)
    return angles.cos().float(), (angles.sin() * sign).float()


def rotate(x_BhKd: Tensor, tables: RopeTables) -> Tensor:
    """Rotates queries or keys. Computes in float32, and returns the type of the input."""
    cos, signed_sin = tables.cos, tables.signed_sin
    if cos.ndim == 3:
        cos, signed_sin = cos[:, None], signed_sin[:, None]
    x = x_BhKd.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x_BhKd.dtype)


# -- either kind of positions ----------------------------------------------------------------------


class Positions:
    """Positions of one network: tables that rotate queries and keys, or a table added to the tokens, never both.

    A plain class without parameters: both are computed once per forward, in float32.
    """

    def __init__(self, config: ModelConfig, *, width: int, heads: int) -> None:
        self._config, self._width, self._head_dim = config, width, width // heads

    def add(self, x_BKD: Tensor, index: Tensor | None, grid: Grid) -> Tensor:
        """Adds the sincos table, if any, to tokens at the places ``index`` [B, K] (None: all) of the grid."""
        if self._config.positions == "rope":
            return x_BKD
        table = sincos_positions(index, grid=grid, width=self._width, config=self._config, device=x_BKD.device)
        return (x_BKD.float() + table).to(x_BKD.dtype)

    def rotation(self, index: Tensor | None, grid: Grid, device: torch.device) -> RopeTables | None:
        """Returns the tables that rotate the queries and keys of tokens at these places; None for sincos."""
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
    """Returns the table entries of the tokens that are present: float32 [K, D] or [B, K, D].

    index: int64 token numbers [K] or [B, K] in ``grid`` (t, h, w); None: all in order

    A clip that is only shorter than the table uses its first time steps; for any other geometry the table is
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
    """Returns float32 [t, h, w, sum of shares]: for each axis with a share n, sin then cos of p·10000^(−k/(n/2))."""
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
