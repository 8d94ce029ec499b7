"""What `make env` refuses, and which tests may be skipped where."""

import ast
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.chain import ROOT
from tests.conftest import forbidden_skip

CHECK = ROOT / ".ci" / "check_python.py"
HERE = platform.python_version()


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_python", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(folder: Path, version: str, *, ready: bool = True, python: str = sys.executable) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(python)
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    if ready:
        (folder / ".ready").touch()
    return folder


def test_old_pythons_can_read_the_check() -> None:
    ast.parse(CHECK.read_text(), feature_version=(3, 4))


def test_a_python_that_is_too_old(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.problem(str(tmp_path / "none"), "") is None
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert "too old: 3.11 or newer is needed" in check.problem(str(tmp_path / "none"), "")
    assert check.problem(str(environment(tmp_path / "venv", "3.11.2")), "") is None  # it is not used


@pytest.mark.parametrize("absent", ["venv", "ensurepip"])
def test_a_python_without_venv(check: ModuleType, absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3 has these in another package."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    assert f"apt-get install python3.{sys.version_info[1]}-venv" in check.problem(str(tmp_path / "none"), "")


def test_an_environment_that_is_there(check: ModuleType, tmp_path: Path) -> None:
    other = str(environment(tmp_path / "other", "3.1.4"))
    assert check.problem(other, "") is None  # nobody has asked for another Python
    assert check.problem(other, "python3") == (
        f"{other} has Python 3.1.4, and PYTHON=python3 is {HERE}: run make clean first, or leave PYTHON out"
    )
    assert check.problem(str(environment(tmp_path / "same", HERE)), "python3") is None
    gone = str(environment(tmp_path / "gone", HERE, python="/nowhere/python"))
    assert "is gone: run make clean" in check.problem(gone, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["PYTHON=/nowhere/python"], "make env: no /nowhere/python here: Python 3.11 or newer is needed"),
        ([f"PYTHON={sys.executable}"], f"has Python 3.1.4, and PYTHON={sys.executable} is {HERE}: run make clean"),
    ],
)
def test_make_says_what_does_not_work(words: list[str], expected: str, tmp_path: Path) -> None:
    environment(tmp_path / "venv", "3.1.4")
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "env", f"VENV={tmp_path / 'venv'}", *words],
        cwd=ROOT,
        env=quiet,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("where", "marks", "may"),
    [
        ({}, {}, True),
        ({"ci"}, {}, False),
        ({"ci"}, {"system"}, False),
        ({"ci"}, {"gpu"}, True),
        ({"ci", "bare"}, {}, False),
        ({"bare"}, {}, False),
        ({"ci", "bare"}, {"system"}, True),
        ({"ci", "bare"}, {"gpu"}, True),
    ],
)
def test_what_may_be_skipped(where: set[str], marks: set[str], may: bool) -> None:
    found = forbidden_skip(ci="ci" in where, bare="bare" in where, gpu="gpu" in marks, system="system" in marks)
    assert (not found) == may
