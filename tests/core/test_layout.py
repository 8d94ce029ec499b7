"""Where things are: no file is too long to be read at once, and none is a sliver that a reader hops through."""

from pathlib import Path

import pytest

from tests.chain import ROOT

LINES = 450
PACKAGE_FILES = range(130, 231)


@pytest.mark.parametrize("folder", ["vjepa_scale", "tools", "benchmarks", "tests"])
def test_no_file_is_over_450_lines(folder: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert lines
    long: dict[Path, int] = {path.relative_to(ROOT): count for path, count in lines.items() if count > LINES}
    assert not long, f"split them: {long}"


def test_the_package_has_neither_slivers_nor_too_many_files() -> None:
    files = sorted((ROOT / "vjepa_scale").rglob("*.py"))
    assert len(files) in PACKAGE_FILES, f"{len(files)} files: merge those that are one subject, or split the long ones"
