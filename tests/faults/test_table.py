"""docs/faults.md is what the tests say, and every kind of fault has one."""

from pathlib import Path

import pytest

from tests.faults.table import KINDS, faults, page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "faults.md").read_text() == page(), "run: python -m tests.faults.table > docs/faults.md"
    assert "(faults.md)" in (DOCS / "README.md").read_text()


def test_a_mark_says_three_things(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text('@pytest.mark.fault("disks", "full", "an error")\n@pytest.mark.slow\ndef test_a(): ...\n')
    (fault,) = faults(tmp_path)
    assert (fault.kind, fault.breaks, fault.then, fault.test) == ("disks", "full", "an error", "test_a")
    for words in ('"disks", "full"', '"floppies", "full", "an error"'):
        file.write_text(f"@pytest.mark.fault({words})\ndef test_a(): ...\n")
        with pytest.raises(ValueError, match=r"test_it\.py:1: give one of processes"):
            faults(tmp_path)


def test_every_kind_has_a_test() -> None:
    assert {fault.kind for fault in faults()} == set(KINDS)
