"""The README's recipes, as they stand there: each is read, and planned for real shards."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT
from tests.videos import encoded
from tools import launch
from vjepa_scale.shards.make import Settings, make_shards

RECIPES = re.findall(r"as `(recipes/\w+\.yaml)`:\n\n```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_recipe_of_the_readme_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(RECIPES) == text.count("```yaml") == text.count("extends: ") > 0


@pytest.mark.parametrize(("name", "text"), RECIPES)
def test_a_recipe_of_the_readme(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / name).write_text(text)
    (tmp_path / "videos").mkdir()
    for number in range(3):
        (tmp_path / f"videos/{number}.mp4").write_bytes(encoded(60))
    shards = re.findall(r"path: ([\w/-]+)", text)
    assert shards
    for path in shards:
        make_shards(tmp_path / "videos", tmp_path / path, Settings(), workers=1, progress=lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py", name, "--dry-run"])
    assert launch.main() == 0
    plan = capsys.readouterr().out
    assert "refused now" not in plan
    for path in shards:
        assert path in plan
    assert "demo-data" not in plan  # the sets of the recipe that it extends
