"""The figures that training measures at an interval, against NumPy; limits that tell collapsed features from others."""

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vjepa_scale.eval.observation import Observation
from vjepa_scale.recipe.guard_sections import LIMITS
from vjepa_scale.run.columns import column_of

Floats = npt.NDArray[np.float64]
CPU = torch.device("cpu")
GRID = (4, 3, 5)
CLIPS, WIDTH = 6, 16


def features(seed: int, scale: float = 3.0, offset: float = 0.5) -> Floats:
    """Isotropic features of clips [B, N, D] with a mean."""
    return np.random.default_rng(seed).standard_normal((CLIPS, int(np.prod(GRID)), WIDTH)) * scale + offset


def measured(observe: Observation) -> dict[str, float]:
    found = observe.measured(CPU)
    assert isinstance(found, Future)
    return found.result()


def of_target(values: Floats, parts: int = 1) -> dict[str, float]:
    observe = Observation()
    for part in np.array_split(values, parts):
        observe.add_target(torch.from_numpy(part.copy()), GRID)
    return measured(observe)


def rank_by_numpy(rows: Floats) -> float:
    """exp of the entropy of the singular values of the centred rows [n, D]."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    shares = values[values > 1e-9 * values.max()] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_rank_and_deviation_are_of_the_centred_tokens_of_all_parts(parts: int, offset: float) -> None:
    """An offset that all tokens share is no direction: without centring it would be the largest."""
    values = features(0, offset=offset) * np.linspace(0.1, 3, WIDTH)
    found, rows = of_target(values, parts), values.reshape(-1, WIDTH)
    assert found["effective_rank"] == pytest.approx(rank_by_numpy(rows), rel=1e-6)
    scale = np.sqrt((rows**2).mean())
    assert found["collapse/target_std"] == pytest.approx((rows.std(0) / scale).mean(), rel=1e-6)


def test_variance_over_time_is_that_at_fixed_positions() -> None:
    values = features(1).reshape(CLIPS, GRID[0], -1, WIDTH)
    values[:, :, :, :4] *= np.linspace(0.2, 2, GRID[0])[None, :, None, None]
    over_time = ((values - values.mean(1, keepdims=True)) ** 2).sum()
    whole = ((values - values.mean((1, 2), keepdims=True)) ** 2).sum()
    found = of_target(values.reshape(CLIPS, -1, WIDTH))
    assert found["collapse/over_time"] == pytest.approx(over_time / whole, rel=1e-6)


@pytest.mark.parametrize(("mixed", "expected"), [(0.0, 1.0), (1.0, 0.0), (0.5, None)])
def test_cosine_is_of_features_without_their_means(mixed: float, expected: float | None) -> None:
    """Both have a large common mean, which alone would make any two of them similar."""
    ours = features(2, offset=20)
    theirs = (1 - mixed) * ours + mixed * features(3, offset=20)
    observe = Observation()
    observe.add_context(torch.from_numpy(ours), torch.from_numpy(theirs))
    found = measured(observe)["collapse/cosine"]
    a, b = ((each - each.mean((0, 1))).ravel() for each in (ours, theirs))
    assert found == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    if expected is not None:
        assert found == pytest.approx(expected, abs=0.05)


def l1(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.l1_loss(predicted, wanted)


def test_losses_by_data_set_and_against_the_mean_token() -> None:
    predicted, wanted = features(4), features(5)
    names = ["a", "b", "a", "c", "b", "a"]
    observe = Observation(["a", "b", "c", "unused"])
    for half in (slice(0, 2), slice(2, 6)):
        observe.add_losses(torch.from_numpy(predicted[half]), torch.from_numpy(wanted[half]), names[half], l1)
    found = measured(observe)
    of_clips = np.abs(predicted - wanted).mean((1, 2))
    for name in "abc":
        own = [loss for loss, other in zip(of_clips, names, strict=True) if other == name]
        assert found[f"data_loss/{name}"] == pytest.approx(np.mean(own), rel=1e-9)
    assert "data_loss/unused" not in found
    halves = (wanted[:2], wanted[2:])
    of_mean = np.concatenate([np.abs(half.mean((0, 1)) - half).mean((1, 2)) for half in halves])
    assert found["collapse/to_mean"] == pytest.approx(of_clips.sum() / of_mean.sum(), rel=1e-9)


def test_the_update_is_weighted_by_what_a_sample_stands_for() -> None:
    observe = Observation()
    before, after = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.5])
    observe.add_update(before, after, torch.tensor([1.0, 10.0]))
    assert measured(observe)["update_ratio"] == pytest.approx(np.sqrt(10 * 0.25) / np.sqrt(9 + 10))


def constant_in_time(values: Floats) -> Floats:
    values = values.reshape(CLIPS, GRID[0], -1, WIDTH)
    return np.broadcast_to(values[:, :1], values.shape).reshape(CLIPS, -1, WIDTH)


def rank_one(values: Floats) -> Floats:
    return values[..., :1] * np.linspace(-1, 1, WIDTH) + 1


def equal(values: Floats) -> Floats:
    return np.broadcast_to(values[:1, :1], values.shape)


@pytest.mark.parametrize(
    ("collapse", "flagged"),
    [
        (lambda values: values, set()),
        (lambda values: values * np.linspace(0.5, 2, WIDTH) + 1, set()),
        (rank_one, {"effective_rank"}),
        (constant_in_time, {"collapse/over_time"}),
        (equal, {"effective_rank", "collapse/target_std"}),
        (lambda values: equal(values) + 1e-3 * values, {"collapse/target_std"}),
    ],
)
def test_limits_tell_collapsed_features_from_others(collapse: Callable[[Floats], Floats], flagged: set[str]) -> None:
    found = of_target(collapse(features(6)))
    beyond = set()
    for name, value in found.items():
        assert column_of(name) is not None
        if name in LIMITS and LIMITS[name].is_passed(value, LIMITS[name].value):
            beyond.add(name)
    assert beyond == flagged


def test_a_clip_of_one_time_step_has_no_variance_over_time() -> None:
    observe = Observation()
    observe.add_target(torch.from_numpy(features(7)), (1, 12, 5))
    found = measured(observe)
    assert "collapse/over_time" not in found
    assert found["effective_rank"] > 15


def test_observed_tokens_of_a_large_clip_are_in_different_rows_and_columns() -> None:
    """With an even stride all of them could lie in one column of the raster."""
    T, h, w = 32, 24, 24
    tokens = torch.arange(T * h * w)
    for place in (tokens // w % h, tokens % w):
        observe = Observation()
        observe.add_target(torch.nn.functional.one_hot(place, h)[None].float(), (T, h, w))
        assert measured(observe)["effective_rank"] > 2  # n different places have rank n - 1
