"""README and docs/launch.md: their recipes, commands and figures."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT
from tests.pages import TOY, run_line
from tests.videos import encoded
from vjepa_scale.commands import launch
from vjepa_scale.launch.estimate import summary
from vjepa_scale.recipe import load_recipe
from vjepa_scale.shards.make import Settings, make_shards

README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs/launch.md").read_text()
RECIPES = re.findall(r"^As `(recipes/\w+\.yaml)`:\n\n```yaml\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_door_is_short() -> None:
    """What it is, results, install, commands, one whole path and the eight files come before the list of pages."""
    door, found, _ = README.partition("## Where to read on\n")
    assert found
    assert len(door.splitlines()) <= 85
    (files,) = re.findall(r"## Read these eight files\n\n(.*?)\n\n", door, re.DOTALL)
    named = [
        name if name.startswith("vjepa_scale") else f"vjepa_scale/{name}" for name in re.findall(r"`(.*?)`", files)
    ]
    assert len(named) == 8
    assert all((ROOT / name).is_file() for name in named)


def test_its_figures_are_those_of_the_showcase() -> None:
    found = json.loads((ROOT / "benchmarks/results/showcase.json").read_text())
    attentive = [found["attentive_probe"][of]["mean"] for of in ("trained", "untrained")]
    said = ", ".join(f"{100 * share:.0f} %" for share in [*attentive, found["chance"]])
    assert re.search(rf"attentive probe, {found['attentive_labels_per_class']} labels .* \| {said} \|", README)
    planning = ", ".join(f"{100 * found['planning'][of]:.0f} %" for of in ("success", "random"))
    assert re.search(rf"the robot reaches the goal.* \| {planning} \|", README)


def test_memory_and_days_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d) × ([\w ]+) \| (\d+) GB of (\d+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) == 3
    for name, count, gpu, memory, _, days in rows:
        recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
        found = summary(recipe)
        assert found is not None
        assert (f"{found[0] / 1e9:.0f}", f"{found[1]:.1f}") == (memory, days)
        assert recipe.launch.gpu == gpu.replace(" ", "")
        assert recipe.launch.tasks_per_node == int(count)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_path_from_videos_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of it, in order, with a recipe that is made small; then transformers loads what it wrote."""
    (path,) = re.findall(r"## From a folder of videos .*?```sh\n(.*?)```", README, re.DOTALL)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "VIDEOS").mkdir()
    for number in range(4):
        (tmp_path / f"VIDEOS/{number}.mp4").write_bytes(encoded(60))
    lines = path.splitlines()
    assert len(lines) == 7
    for line in lines:
        run_line(line, *(TOY if "vitb_1gpu.yaml" in line else ()), cwd=tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].config.hidden_size == 48  # type: ignore[attr-defined]


def test_every_recipe_of_the_page_is_found() -> None:
    assert len(RECIPES) == PAGE.count("```yaml") == PAGE.count("extends: ") > 0


@pytest.mark.parametrize(("name", "text"), RECIPES)
def test_a_recipe_of_the_page(
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
