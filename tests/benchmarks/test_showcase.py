"""benchmarks/showcase.py: its check of a demo, and its table of finished runs."""

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.running import BENCHMARKS, ROOT, Run, load
from vjepa_scale.commands import demo
from vjepa_scale.recipe import load_recipe, recipe_yaml

RECORDED = json.loads((BENCHMARKS / "results" / "showcase.json").read_text())


def summary(**changes: float) -> dict[str, Any]:
    """One run's summary.json: the recorded means, but for some planning figures."""
    tree = {key: copy.deepcopy(value) for key, value in RECORDED.items() if key not in ("std", "seeds")}
    tree["planning"] |= changes
    return tree


@pytest.mark.parametrize(("success", "code"), [(None, 0), (0.05, 1)])
def test_showcase_check(run: Run, tmp_path: Path, success: float | None, code: int) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary(**({} if success is None else {"success": success}))))
    found, text, _ = run("showcase", "--check", file)
    assert found == code
    lines = text.splitlines()
    assert len(lines) == 6
    assert all(line[:5] in ("yes  ", "NO   ") for line in lines)
    assert [line[5:].split()[0] for line in lines if line.startswith("NO")] == ([] if code == 0 else ["planning"])


OVERRIDES = ("pretrain.steps=8", "cooldown.steps=2")


def test_showcase_of_finished_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are there are not trained again; their means and spreads are printed."""
    monkeypatch.chdir(ROOT)
    successes = {21: 0.7, 22: 0.8}
    for seed, success in successes.items():
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(success=success)))
        words = words_of(tmp_path, seed)
        (folder / "recipe.yaml").write_text(recipe_yaml(load_recipe("recipes/demo.yaml", words)))
    code, text, _ = run("showcase", "--seeds", 21, 22, "--out", tmp_path, *OVERRIDES)
    assert code == 0
    assert re.search(r"^over seeds 21, 22 +mean +std$", text, re.MULTILINE)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[\w.]+ +\S+ +\S+$", line))
    average, spread = map(float, rows["planning.success"].split())
    assert (average, spread) == pytest.approx((mean(successes.values()), stdev(successes.values())), rel=0.02)
    assert all(math.isfinite(float(value)) for row in rows.values() for value in row.split())
    assert len(re.findall("^yes ", text, re.MULTILINE)) == 6

    showcase = load("showcase")
    monkeypatch.setattr(showcase, "RESULT", tmp_path / "recorded.json")
    assert showcase.main(["--seeds", "21", "22", "--out", str(tmp_path), "--record", *OVERRIDES]) == 0
    recorded = json.loads((tmp_path / "recorded.json").read_text())
    assert recorded["seeds"] == [21, 22]
    assert recorded["planning"]["success"] == pytest.approx(mean(successes.values()))
    assert recorded["std"]["planning"]["success"] == pytest.approx(stdev(successes.values()))

    with pytest.raises(SystemExit, match="is of another recipe"):
        run("showcase", "--seeds", 21, 22, "--out", tmp_path, "pretrain.steps=9")


def words_of(out: Path, seed: int) -> list[str]:
    shards = {"synthetic": "train", "held_out": "val", "robot": "robot"}
    return [
        f"run.dir={out / f'seed{seed}'}",
        f"run.seed={seed}",
        f"data.seed={seed}",
        *OVERRIDES,
        *(f"data.sets.{name}.path={out / f'data{seed}' / 'shards' / folder}" for name, folder in shards.items()),
    ]


def test_showcase_runs_the_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, as tools/demo.py reads it, with the demo's own steps left out: those take minutes."""
    steps: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "step", lambda _, *words: steps.append(words))
    stub = SimpleNamespace(measure_demo=lambda *_, **__: summary(), table=lambda _: [])
    monkeypatch.setitem(sys.modules, "vjepa_scale.demo.summary", stub)  # which takes seconds to import

    def here(command: Sequence[str], *, check: bool) -> None:
        assert check
        assert command[:2] == [sys.executable, str(ROOT / "tools" / "demo.py")]
        assert demo.main(command[2:]) == 0

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.chdir(ROOT)
    (tmp_path / "seed31").mkdir()
    recipe = load_recipe("recipes/demo.yaml", words_of(tmp_path, 31))
    (tmp_path / "seed31" / "recipe.yaml").write_text(recipe_yaml(recipe))  # the launch's
    code, text, _ = run("showcase", "--seeds", 31, "--out", tmp_path, "--clips", 20, "--val-clips", 4, *OVERRIDES)
    assert code == 0
    assert [words[0] for words in steps][-4:] == ["launch", "launch", "consolidate", "consolidate"]
    assert steps[0][1:6] == (tmp_path / "data31" / "videos", "--clips", 20, "--val-clips", 4)
    assert steps[1][3:5] == ("--trajectories", 192)
    assert json.loads((tmp_path / "seed31" / "summary.json").read_text())["planning"] == RECORDED["planning"]
    for page in (tmp_path / "seed31" / "report.html", tmp_path / "report.html"):
        assert "</html>" in page.read_text()
    assert len(re.findall("^yes ", text, re.MULTILINE)) == 6
