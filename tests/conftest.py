"""Data that several tests share, and the rule that nothing is skipped where it could have been installed."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.chain import make_data


@pytest.fixture(scope="session")
def two_data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On CI a skip is a failure, but for tests that need a GPU: those cannot be installed."""
    report = yield
    if report.skipped and os.environ.get("CI") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where everything can be installed: {report.longrepr}"
    return report
