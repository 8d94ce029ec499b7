"""A script of benchmarks/ run in this process, and a stand-in for the published code."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.benchmarks.peer import write_peer
from tests.benchmarks.running import BENCHMARKS, SCRIPTS, Run, load
from vjepa_scale.core.errors import exit_code


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What scripts change in a process that is theirs is as before after each test."""
    modules, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    # Of the scripts, of the checkout they were given, and what stands in for a package that is not installed.
    own = {*SCRIPTS, *(f"benchmark_{script}" for script in SCRIPTS), "src", "timm"}
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in own:
            del sys.modules[name]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_here(script: str, *words: object) -> tuple[int, str, str]:
        main = load(script).main
        capsys.readouterr()
        code = exit_code(lambda: main([str(word) for word in words]))
        return code, *capsys.readouterr()

    return run_here


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    return write_peer(tmp_path / "vjepa2")
