"""A run that is killed at random moments ends as one that was left alone: benchmarks/kills.py, with cheaper starts."""

import multiprocessing
import os
import re
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any
from unittest import mock

import psutil
import pytest

from tests.benchmarks.running import load
from tests.chain import launch
from tests.chain import tool as run_tool
from tests.forked import fork_servers
from vjepa_scale.core.worker_pool import process_tree

KILLS, STEPS, SEED = 6, 48, 3  # this seed has victims of all kinds


class ForkedLauncher:
    """As much of subprocess.Popen as the script uses. Its ranks are forks, too (tests/forked.py)."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _launch(recipe: Path, log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    fork_servers()
    with mock.patch("vjepa_scale.run.lock.PATIENCE_S", 0.5):
        done = launch(recipe, check=False)
    os.write(1, (done.stdout + done.stderr).encode())
    os._exit(done.returncode)


def start(recipe: Path, log: IO[str]) -> ForkedLauncher:
    process = multiprocessing.get_context("forkserver").Process(target=_launch, args=(recipe, log.name))
    process.start()
    return ForkedLauncher(process)


def tool(*words: object) -> None:
    """``cancel`` knows the parent of a dead launcher's ranks by submitit's name in its command, which a fork lacks."""

    def parent(started: dict[str, Any]) -> psutil.Process | None:
        return next(iter(process_tree(int(started["job_id"]))), None)

    with mock.patch("vjepa_scale.monitor.jobs.rank_starter", parent):
        run_tool(*map(str, words))


@pytest.mark.fault(
    "processes",
    "launcher, launcher with all ranks, single ranks and loader workers are killed at random moments, again and again",
    "the launcher starts the ranks again, or the same command resumes (while a dead launcher's ranks still train it "
    "is refused, and `cancel` ends them); weights and metrics are those of an undisturbed run, to the bit; no clip is "
    "blamed for a killed worker",
)
@pytest.mark.slow
@pytest.mark.distributed
def test_random_kills(
    two_data_sets: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--kills", KILLS, "--seed", SEED, "--steps", STEPS, "--out", tmp_path, "--shards", two_data_sets["left"]]
    code = load("kills").main(list(map(str, words)), start=start, tool=tool)
    said = capsys.readouterr().out
    assert code == 0, said + (tmp_path / "killed.log").read_text()
    assert "equal to the bit" in said
    assert re.search(r"^[1-9]\d* rollbacks", said, re.MULTILINE), said
