"""What is made once for all tests of a run, and what tests of several rooms look at files with."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vjepa_scale.core.files import file_lock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` that ``make(folder)`` has filled, in whichever worker of pytest-xdist needed it first.

    It is only read: who wants to change it takes a copy.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of one run, of all its workers
    folder, whole = base / name, base / f".{name}.whole"
    with file_lock(base / f".{name}.lock", patience_s=math.inf):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker whose attempt failed
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def checkout_with(folder: Path, *, file: str, text: str, registry: str, line: str) -> Path:
    """A copy of the package with one more file and one more line; returns its folder, ``folder/checkout``.

    file: below vjepa_scale/; registry: the mapping of recipe/registry.py whose first item ``line`` becomes
    """
    package = folder / "checkout" / "vjepa_scale"
    ours = Path(__file__).parents[1] / "vjepa_scale"
    shutil.copytree(ours, package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (package / file).write_text(text)
    path = package / "recipe" / "registry.py"
    head, start, rest = path.read_text().partition(f"{registry} = {{\n")
    assert start
    path.write_text(head + start + line + rest)
    return package.parent
