"""Data that several tests share, and the rule that nothing is skipped where it could have been installed."""

import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.chain import launch, make_data, make_four_stage_data, write_four_stages, write_recipe
from tests.processes import preload_once
from tests.report import browser
from tests.shared import made_once
from tests.videos import VARIABLE_MS, audio_only, encoded, quiet
from vjepa_scale.core import log
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.video.torchcodec import import_torchcodec

preload_once()
os.environ.pop(log.VARIABLE, None)
log.set_up()  # as a command: pytest has handlers of its own, which a program's import would give way to

# Of these fixtures, every worker of pytest-xdist gets the same folders: tests only read them.


@pytest.fixture(scope="session")
def two_data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = made_once(tmp_path_factory, "data", make_data)
    return {name: folder / f"{name}-shards" for name in ("left", "right")}


@pytest.fixture(scope="session")
def four_stage_data(two_data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = made_once(tmp_path_factory, "more data", lambda folder: make_four_stage_data(folder, two_data_sets))
    return {"held_out": folder / "held-out-shards", "robot": folder / "robot-shards"}


@pytest.fixture(scope="session")
def finished(two_data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain and cooldown on two processes; recipe.yaml beside the run."""

    def make(folder: Path) -> None:
        launch(write_recipe(folder / "recipe.yaml", folder / "run", two_data_sets, launch={"tasks_per_node": 2}))

    return made_once(tmp_path_factory, "finished run", make) / "run"  # a path with a space


@pytest.fixture(scope="session")
def four_stages(
    finished: Path,
    two_data_sets: dict[str, Path],
    four_stage_data: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The finished run, with an action and a probe stage after it."""

    def make(folder: Path) -> None:
        shutil.copytree(finished, folder / "run")
        launch(write_four_stages(folder / "recipe.yaml", folder / "run", two_data_sets, four_stage_data))

    return made_once(tmp_path_factory, "four stages", make) / "run"


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good videos in two classes, and five bad files."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "up").mkdir()
    (folder / "down" / "deep").mkdir(parents=True)
    for i in range(5):
        (folder / "up" / f"clip {i}.mp4").write_bytes(encoded(30 + 7 * i, rate=20, gop=8))
    for i in range(3):
        (folder / "down" / "deep" / f"{i}.MKV").write_bytes(
            encoded(14, pts_ms=[ms + 10 * i for ms in VARIABLE_MS], gop=5, container="matroska")
        )
    (folder / "no.class.avi").write_bytes(encoded(50, rate=25, container="avi", codec="mpeg4"))
    (folder / "up" / "empty.mp4").write_bytes(b"")
    (folder / "up" / "notes.txt").write_text("not a video\n")
    (folder / "up" / "sound.wav").write_bytes(audio_only())
    (folder / "cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    return folder


@pytest.fixture(scope="session")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("made") / "shards"
    make_shards(videos, out, Settings(seed=3, shard_records=4), workers=2, progress=quiet)
    return Manifest.open(out)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Some tests run in this process what a rank or a job runs, which sets up logging."""
    level = logging.getLogger().level
    yield
    if log.current() != log.Process():
        log.apply(log.Process())
        logging.captureWarnings(False)
        logging.getLogger().setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take long first (``--no-loadscope-reorder``): so that all workers end together.

    Slurm's take longest, and wait most.
    """
    slurm, long = ({item.path for item in items if item.get_closest_marker(name)} for name in ("slurm", "distributed"))
    items.sort(key=lambda item: (item.path not in slurm, item.path not in long))


def _no_torchcodec() -> str:
    try:
        import_torchcodec()
    except UserError:
        return "FFmpeg's shared libraries, for torchcodec: apt-get install ffmpeg"
    return ""


def _no_compiler() -> str:
    """Why Inductor cannot compile for a CPU here."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "a C++ compiler: apt-get install g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"Python's headers: apt-get install python3-dev, or those of {sys.base_prefix}"
    if " " in sys.prefix:  # Inductor's linker line does not quote the path of PyTorch's libraries
        return "an environment in a folder without a space, for PyTorch's CPU compiler"
    return ""


# What ``@pytest.mark.system("…")`` may name: a test for it that says what is missing. Other needs (Slurm, a package of
# Debian's with videos) are the test's own to find missing: ``@pytest.mark.system``.
_NEEDS: dict[str, Callable[[], str]] = {
    "torchcodec": cache(_no_torchcodec),
    "compiler": cache(_no_compiler),
    "chromium": browser.missing,
    "ffmpeg": lambda: "" if shutil.which("ffmpeg") else "the command ffmpeg: apt-get install ffmpeg",
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for marker in item.iter_markers("system"):
        for need in marker.args:
            if missing := _NEEDS[need]():
                pytest.skip(f"needs {missing}")


def forbidden_skip(*, ci: bool, bare: bool, gpu: bool, system: bool) -> str:
    """Why a test of these marks may not be skipped; empty where it may.

    ci:   everything is installed that can be: so a GPU alone may be missing
    bare: system packages are hidden (.ci/bare): so what needs none must run. The tests that may skip there are those
          that CI runs again when they are installed (make test-full)
    """
    if gpu or not (ci or bare):
        return ""
    if bare:
        return "" if system else "skipped on a bare machine, without the marker system"
    return "skipped on CI, where everything can be installed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On CI a skip is a failure, but for tests that need what cannot be had there."""
    report = yield
    marks = {name: item.get_closest_marker(name) is not None for name in ("gpu", "system")}
    switches = {name: bool(os.environ.get(variable)) for name, variable in (("ci", "CI"), ("bare", "VJEPA_BARE"))}
    if report.skipped and (why := forbidden_skip(**switches, **marks)):
        report.outcome = "failed"
        report.longrepr = f"{why}: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured on their way (``record_property("measured", …)``), in one table at the end."""
    measured = [
        f"{report.nodeid.rpartition('::')[2]}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "measured"
    ]
    if measured:
        terminalreporter.section("measured")
        for line in measured:
            terminalreporter.write_line(line)
