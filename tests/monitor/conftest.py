"""A run that is written by hand, and a process that may be its launcher."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.monitor.run_by_hand import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "a run")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
