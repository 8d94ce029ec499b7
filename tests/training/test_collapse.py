"""A run whose target is no average is told to have collapsed, or stopped; a healthy one is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain import launch, tool, write_recipe

pytestmark = pytest.mark.distributed

# One phase of ten steps, each of them measured, in which the target equals the encoder from the second step on.
SECTIONS: dict[str, Any] = {
    "cooldown": None,
    "launch": {"tasks_per_node": 1},
    "data": {"workers": 0},
    "jepa": {"ema_momentum": 0.0},
    "log": {"effective_rank_every": 1},
    "pretrain": {"steps": 10, "phases": [{"name": "all", "start_lr": 1e-3}]},
}


def events(run: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "pretrain" / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


def test_a_healthy_run_has_no_sign(finished: Path) -> None:
    assert events(finished, "done")
    assert not events(finished, "collapse")


@pytest.mark.slow
def test_a_collapse_is_told_before_half_of_the_run_or_stops_it(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    write_recipe(recipe, run, two_data_sets, **SECTIONS)
    said = launch(recipe).stdout
    (sign,) = events(run, "collapse")
    assert (sign["column"], sign["value"], sign["step"]) == ("collapse/distance", 0.0, 2)
    assert "a sign of collapse: collapse/distance is 0, below 1e-08 since step 0" in said
    assert len((run / "pretrain" / "metrics.jsonl").read_text().splitlines()) == 10
    assert "signs of a collapse: collapse/distance 0 (limit 1e-08) at step 2" in tool("launch", "status", run).stdout

    write_recipe(recipe, tmp_path / "stopped", two_data_sets, **SECTIONS, guards={"collapse": "stop", "patience": 4})
    ended = launch(recipe, check=False)
    assert ended.returncode == 2
    assert "pretrain has collapsed: collapse/distance is 0" in ended.stdout + ended.stderr
    rows = (tmp_path / "stopped" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 4  # the fourth measurement is judged before the fifth step changes the weights
    assert len(events(tmp_path / "stopped", "started")) == 1  # starting again would not help
