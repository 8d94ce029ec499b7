"""docs/ideas.md cannot rot: what it names is there, and every override on it is one."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from vjepa_scale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ideas.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
IDEAS = [row for row in ROWS if row[0] != "idea" and set(row[0]) != {"-"}]
SPANS = [span for row in IDEAS for span in re.findall(r"`([^`]+)`", row[-1])]
OVERRIDES = [span for span in SPANS if "=" in span]
COMMANDS = [span for span in SPANS if span.startswith("python ")]


def test_every_row_says_whether_it_is_here() -> None:
    assert len(IDEAS) > 60
    for row in IDEAS:
        assert len(row) == 3, row
        assert row[1] in ("yes", "partly", "not built"), row
        assert row[2], row


@pytest.mark.parametrize("span", OVERRIDES)
def test_overrides_are_valid(span: str) -> None:
    load_recipe(ROOT / "recipes" / "vitl_256.yaml", shlex.split(span))  # as a shell would split it


@pytest.mark.parametrize("span", COMMANDS)
def test_commands_know_their_flags(span: str) -> None:
    _, tool, *words = shlex.split(span)
    source = (ROOT / tool).read_text()
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in source


@pytest.mark.parametrize("span", [span for span in SPANS if re.fullmatch(r"vjepa_scale(\.\w+)+", span)])
def test_names_are_importable(span: str) -> None:
    pkgutil.resolve_name(span)


def test_files_exist() -> None:
    named = re.findall(r"\b(?:recipes|tools|tests|docs)/[\w/]+\.(?:yaml|py|md)\b", PAGE)
    linked = [f"docs/{target}" for target in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert named
    assert linked
    for path in named + linked:
        assert (ROOT / path).is_file(), path
