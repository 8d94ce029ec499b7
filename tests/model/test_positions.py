"""Sine-cosine positions against their formula, and interpolation against matrices (docs/method.md 13)."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.positions import sincos_positions
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig, SincosConfig

Floats = npt.NDArray[np.float64]
# float32 results of values in -1 … 1
ROUNDING = 2e-7


def config(frames: int, size: tuple[int, int], *, uniform: bool, tubelet: int = 2) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(width=64, depth=2, heads=2),
        predictor=PredictorConfig(width=48, depth=1, heads=2, mlp_hidden=64),
        patch=8,
        tubelet=tubelet,
        positions="sincos",
        sincos=SincosConfig(frames=frames, size=size, uniform_power=uniform),
    )


def reference(grid: tuple[int, int, int], width: int, *, uniform: bool) -> Floats:
    """[t, h, w, D], one number at a time."""
    shares = [math.ceil(width / 6) * 2] * 3 if uniform else [width // 2, width // 4, width // 4]
    if grid[0] == 0:  # an image: height and width only
        grid, shares = (1, *grid[1:]), [0, width // 2, width // 2]
    out = np.zeros((*grid, sum(shares)))
    for place in np.ndindex(*grid):
        channel = 0
        for axis, share in enumerate(shares):
            for function in (math.sin, math.cos):
                for k in range(share // 2):
                    out[(*place, channel)] = function(place[axis] * 10000.0 ** (-k / (share / 2)))
                    channel += 1
    return out[..., :width]


def linear(before: int, after: int) -> Floats:
    """The matrix of linear interpolation between samples at the centres of equal cells, edges held."""
    matrix = np.zeros((after, before))
    for i in range(after):
        place = min(max((i + 0.5) * before / after - 0.5, 0), before - 1)
        low = min(int(place), max(before - 2, 0))
        matrix[i, low] += 1 - (place - low)
        if before > 1:
            matrix[i, low + 1] += place - low
    return matrix


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("width", [64, 48, 104])
def test_the_table(uniform: bool, width: int) -> None:
    cfg = config(6, (24, 40), uniform=uniform)
    table = sincos_positions(None, grid=(3, 3, 5), width=width, config=cfg)
    assert table.dtype == torch.float32
    expected = reference((3, 3, 5), width, uniform=uniform).reshape(-1, width)
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=ROUNDING)
    index = torch.tensor([[44, 0, 7], [3, 3, 20]])
    some = sincos_positions(index, grid=(3, 3, 5), width=width, config=cfg)
    np.testing.assert_allclose(some.numpy(), expected[index], rtol=0, atol=ROUNDING)


def test_a_table_of_images_has_no_time() -> None:
    cfg = config(1, (24, 40), uniform=True, tubelet=1)
    table = sincos_positions(None, grid=(1, 3, 5), width=64, config=cfg)
    np.testing.assert_allclose(
        table.numpy(), reference((0, 3, 5), 64, uniform=False).reshape(-1, 64), rtol=0, atol=ROUNDING
    )


def test_a_shorter_clip_takes_the_first_times() -> None:
    cfg = config(8, (24, 40), uniform=True)
    whole = sincos_positions(None, grid=(4, 3, 5), width=64, config=cfg)
    assert torch.equal(sincos_positions(None, grid=(2, 3, 5), width=64, config=cfg), whole[:30])


@pytest.mark.parametrize("grid", [(2, 6, 5), (5, 3, 5), (3, 2, 9), (1, 4, 4)])
def test_another_geometry_is_interpolated(grid: tuple[int, int, int]) -> None:
    cfg = config(6, (24, 40), uniform=True)
    table = reference((3, 3, 5), 64, uniform=True)
    for axis, (before, after) in enumerate(zip((3, 3, 5), grid, strict=True)):
        table = np.moveaxis(np.tensordot(linear(before, after), table, axes=(1, axis)), 0, axis)
    ours = sincos_positions(None, grid=grid, width=64, config=cfg)
    np.testing.assert_allclose(ours.numpy(), table.reshape(-1, 64), rtol=0, atol=1e-6)


@torch.no_grad()
def test_tokens_know_their_place_only_by_the_table() -> None:
    """The same picture everywhere: with positions every token differs, without them (a table of zeros) none does."""
    cfg = config(6, (24, 40), uniform=True)
    encoder, predictor = Encoder(cfg), Predictor(cfg)
    clips = torch.ones(1, 3, 6, 24, 40)
    tokens = encoder(clips)[0]
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 1e-3
    index = torch.arange(45)[None]
    predicted = predictor(torch.ones(1, 5, 64), index[:, :5], index[:, 5:], (3, 3, 5))[0]
    assert torch.cdist(predicted, predicted).fill_diagonal_(1).min() > 1e-3
    assert not [name for name, _ in encoder.named_parameters() if "pos" in name]
    encoder.positions.add = lambda x, index, grid: x  # type: ignore[method-assign]
    tokens = encoder(clips)[0]
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens), rtol=0, atol=1e-5)


def test_a_table_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="sincos: 6 frames of 20×40 pixels do not divide into tubelets of 2×8×8"):
        config(6, (20, 40), uniform=True)
    with pytest.raises(ValueError, match=r"encoder\.width 60 is not a multiple of 8"):
        ModelConfig(encoder=EncoderConfig(width=60, depth=1, heads=2), positions="sincos")
