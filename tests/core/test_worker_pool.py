"""Workers go on when a cluster manager signals every process of a job: the rank wants to finish its step."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from tests.chain import ROOT
from tests.processes import LIMIT_S
from tests.videos import encoded
from vjepa_scale.core import worker_pool
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.worker_pool import worker_context

SIGNALLED = """
import signal
import psutil
from vjepa_scale.data.loader import Prefetched
from vjepa_scale.training.signals import SIGNALS, Interrupt

def main():
    interrupt = Interrupt()
    interrupt.listen(loader_workers=2)
    loader = Prefetched(abs, range(100), workers=2, prefetch=2)
    seen = 0
    for item in loader:
        if item == 10:
            others = psutil.Process().children(recursive=True)
            assert len(others) >= 4, others  # two workers, the fork server, Python's resource tracker
            for number in SIGNALS:
                for process in others:
                    process.send_signal(number)
                signal.raise_signal(number)
        seen += 1
    loader.close()
    print(seen, interrupt.signal)

if __name__ == "__main__":
    main()
"""


@pytest.mark.distributed
def test_only_the_rank_hears_a_signal_to_all(tmp_path: Path) -> None:
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == "100 SIGUSR2\n", done.stderr


ALONE = """
import signal
import psutil
from vjepa_scale.training.signals import Interrupt

interrupt = Interrupt()
interrupt.listen(loader_workers=0)
signal.raise_signal(signal.SIGTERM)
print(psutil.Process().children(recursive=True), interrupt.signal)
"""


def test_a_rank_without_loader_workers_starts_no_process_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == "[] SIGTERM\n", done.stderr


# -- a current folder with modules that are named as the standard library's ---------------------------------


SHADOWED = """
import os
import signal
from vjepa_scale.core.worker_pool import map_in_workers, start_fork_server

if __name__ == "__main__":
    os.chdir("shadows")
    if {early}:
        start_fork_server("concurrent.futures.thread", deaf_to=[signal.SIGUSR2])
    print(list(map_in_workers(abs, [-3], workers=1)), os.environ.get("PYTHONSAFEPATH"))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("early", [False, True])
def test_workers_do_not_import_from_the_current_folder(tmp_path: Path, early: bool) -> None:
    (tmp_path / "shadows").mkdir()
    for name in ("queue", "signal", "concurrent"):  # what workers, the resource tracker and the fork server import
        (tmp_path / f"shadows/{name}.py").write_text("raise AttributeError('not the standard library')")
    script = tmp_path / "shadowed.py"
    script.write_text(SHADOWED.format(early=early))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.stdout, done.stderr) == ("[(0, 3)] None\n", "")


# -- folders of many letters: a Unix socket's path has at most 107 bytes -----------------------------------


def _folder_of(length: int, parent: Path) -> Path:
    """A new folder whose path has so many bytes."""
    folder = parent / ("x" * (length - len(str(parent)) - 1))
    folder.mkdir(parents=True)
    assert len(str(folder)) == length
    return folder


@pytest.fixture
def first_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has started no worker yet."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.delitem(config, "tempdir", raising=False)
    monkeypatch.setattr(util, "Finalize", lambda *_, **__: None)  # it would wait for the end of pytest
    yield
    shutil.rmtree(config.pop("tempdir", ""), ignore_errors=True)


@pytest.mark.usefixtures("first_socket")
@pytest.mark.parametrize(("length", "there"), [(75, True), (76, False), (200, False)])
def test_sockets_lie_in_the_temporary_folder_if_they_fit(
    length: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        usual = _folder_of(length, Path(parent))
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        worker_context()
        listener = Listener(family="AF_UNIX")
        assert str(listener.address).startswith(str(usual)) == there
        listener.close()
        assert tempfile.gettempdir() == str(usual)  # of anybody else


@pytest.mark.fault(
    "disks",
    "no temporary folder can hold the workers' sockets",
    "one error that names TMPDIR",
)
@pytest.mark.usefixtures("first_socket")
def test_no_folder_for_sockets_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        usual = _folder_of(120, Path(parent))
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        monkeypatch.setattr(worker_pool, "_SHORT_FOLDERS", (str(tmp_path / "absent"),))
        with pytest.raises(UserError, match=rf"^TMPDIR {usual}: no folder for .* 107 bytes.* at most 75 bytes"):
            worker_context()


LOADED = """
import sys
import torch
from tools.make_shards import main
from vjepa_scale.core.errors import run_command
from vjepa_scale.data.loader import Prefetched

if __name__ == "__main__":
    assert main() in (0, None)
    loader = Prefetched(torch.arange, range(8), workers=2, prefetch=2)  # tensors: passed on by a socket of the worker
    print(sum(len(item) for item in loader))
    loader.close()
"""


@pytest.mark.distributed
def test_shards_are_made_and_loaded_under_a_temporary_folder_of_100_bytes(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/one.mp4").write_bytes(encoded(20))
    script = tmp_path / "loaded.py"
    script.write_text(LOADED)
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        done = subprocess.run(
            [sys.executable, script, tmp_path / "videos", tmp_path / "shards", "--workers", "2"],
            env={**os.environ, "TMPDIR": str(_folder_of(100, Path(parent))), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "28"
    assert (tmp_path / "shards/manifest.json").exists()


def _end(folder: str, how: str) -> None:
    """A rank that has had workers, and ends as ranks do."""
    from vjepa_scale.distributed.process_group import exit_cleanly
    from vjepa_scale.launch.worker import _leave

    tempfile.tempdir = folder
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    worker_context()
    if how == "forked":  # the folder is another process's
        if (pid := os.fork()) == 0:
            _leave(0)
        os.waitpid(pid, 0)
        os._exit(len(os.listdir(folder)))
    (exit_cleanly if how == "well" else _leave)(7)


@pytest.mark.parametrize(("how", "code", "left"), [("well", 7, 0), ("failed", 7, 0), ("forked", 1, 1)])
def test_a_rank_leaves_no_folder_of_sockets(how: str, code: int, left: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short enough for sockets, whatever TMPDIR is
        rank = worker_context().Process(target=_end, args=(folder, how))
        rank.start()
        rank.join(LIMIT_S)
        assert rank.exitcode == code
        assert len(os.listdir(folder)) == left
