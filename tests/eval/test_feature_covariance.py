"""The effective rank that training reports, against NumPy's singular values of the centred features."""

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from vjepa_scale.eval.effective_rank import FeatureCovariance


def judged(rows: np.ndarray) -> float:
    """exp of the entropy of the singular values of the centred rows [n, D]."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    shares = values[values > 1e-9 * values.max()] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_it_is_of_the_centred_rows_of_all_parts(parts: int, offset: float) -> None:
    """An offset that all rows share is no direction: without centring it would be the largest."""
    rows = np.random.default_rng(0).standard_normal((70, 6)) * [8.0, 4.0, 2.0, 1.0, 1.0, 0.5] + offset
    covariance = FeatureCovariance()
    for part in np.array_split(rows, parts):
        covariance.add(torch.from_numpy(part))
    found = covariance.effective_rank()
    assert isinstance(found, Future)
    assert found.result() == pytest.approx(judged(rows), rel=1e-6)
    assert found.result() < 5.9


def test_equal_rows_have_none() -> None:
    covariance = FeatureCovariance()
    covariance.add(torch.full((8, 4), 3.0))
    found = covariance.effective_rank()
    assert found is not None
    assert found.result() == 0.0
