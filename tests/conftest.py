"""Data that several tests share: rendered and sharded once per session."""

from pathlib import Path

import pytest

from tests.chain import make_data


@pytest.fixture(scope="session")
def two_data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))
