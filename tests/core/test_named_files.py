"""No page, docstring or comment names a file of this repository that is not there, nor a heading of a page."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.chain import ROOT

TOP = ("vjepa_scale", "tests", "tools", "benchmarks", "recipes", "docs", "slurm")
ROOMS = sorted(path.name for path in (ROOT / "vjepa_scale").iterdir() if (path / "__init__.py").exists())
# Beginning with a folder of the repository, or in short with a room of the package (or of the tests).
LONG = re.compile(rf"(?<![\w/.{{}}-])(?:{'|'.join(TOP)})/[\w./-]*\w")
SHORT = re.compile(rf"(?<![\w/.{{}}-])(?:{'|'.join(ROOMS)})/[\w/]+\.(?:py|sh)\b")
# Made by a user, a run or a command; of other projects; or patterns.
NOT_OURS = re.compile(r"^(slurm/profiles/mine|recipes/mine|docs/recipe_keys\.md\.|data/)|[*…<>]|YOUR|NAME|/\d+$")


def named() -> list[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    out = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in (".md", ".py", ".toml", ".yaml", ".cfg") or not path.is_file():
            continue
        if name.startswith("tests/"):  # they write files of their own, too
            continue
        text = path.read_text()
        out += [(name, found) for found in (*LONG.findall(text), *SHORT.findall(text))]
    return out


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive: which files are ours is not known")
def test_files_that_are_named_are_there() -> None:
    missing = []
    for where, name in named():
        if NOT_OURS.search(name) or Path(name).suffix not in (".py", ".md", ".yaml", ".sh", ".sbatch", ".toml"):
            continue
        places = (ROOT / name, ROOT / "vjepa_scale" / name, ROOT / "tests" / name)
        if not any(place.exists() for place in places):
            missing.append(f"{where}: {name}")
    assert not missing, "\n".join(missing)


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "slurm" / "sandbox" / "README.md"]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if "://" not in target:
            other = page.parent / target if target else page
            assert other.exists(), target
            assert not heading or heading in anchors(other), f"{target}#{heading}"
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name
