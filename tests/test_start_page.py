"""docs/README.md leads to every page, and the pages at the root lead to files that are there."""

import re

import pytest

from tests.chain import ROOT

START = "docs/README.md"


def links(page: str) -> set[str]:
    """What a page links to in this repository, from its root."""
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    return {str((ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT.resolve())) for link in found}


def test_every_page_is_on_the_start_page() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {START}
    assert pages <= links(START)


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    assert not [link for link in links(page) if not (ROOT / link).exists()]


def test_the_promises_name_tests() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "CHANGELOG.md").read_text())
    assert len(named) > 4
    assert all((ROOT / path).is_file() for path in named)
