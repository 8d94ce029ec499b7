"""Weights that tests of formats share."""

import pytest
from torch import Tensor

from tests.checkpoint.formats_material import (
    SMALL,
    model,
    random_tensors,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_tensors(model(SMALL), 7)
