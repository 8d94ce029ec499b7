"""Where things are: no file is too long to be read at once."""

from pathlib import Path

import pytest

from tests.chain import ROOT

LINES = 450


@pytest.mark.parametrize("folder", ["vjepa_scale", "tools", "benchmarks", "tests"])
def test_no_file_is_over_450_lines(folder: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert lines
    long: dict[Path, int] = {path.relative_to(ROOT): count for path, count in lines.items() if count > LINES}
    assert not long, f"split them: {long}"
