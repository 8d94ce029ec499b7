"""Each part of a stage's set-up has the time limit for itself: a slow one leaves no less for the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.chain import write_recipe
from tests.processes import run_processes
from vjepa_scale.core import log
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.run.progress import Page, Progress
from vjepa_scale.training import setup

PARTS = ("build_engine", "open_data", "find_start", "_load", "data_order")


def beats_by_part(ranks: Ranks, recipe: Path) -> dict[str, int]:
    """Sets up pretrain; returns the number of beats before each part."""
    page = Page()
    log.tell_regions(Progress(page=page, outside_s=60).enter)
    found: dict[str, int] = {}

    def noted(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def part(*arguments: Any, **named: Any) -> Any:
            found[name] = page.beats
            return whole(*arguments, **named)

        return part

    patches = [mock.patch.object(setup, name, noted(name, getattr(setup, name))) for name in PARTS]
    patches += [
        mock.patch.object(Jepa, name, noted(name, getattr(Jepa, name))) for name in ("__init__", "before_training")
    ]
    for patch in patches:
        patch.start()
    setup.set_up(stages_of(load_recipe(recipe))["pretrain"], ranks)
    return found


@pytest.mark.distributed
def test_every_part_of_set_up_begins_with_a_beat(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, data={"workers": 0})
    (found,) = run_processes(beats_by_part, 1, recipe)
    assert len(found) == len(PARTS) + 2
    assert sorted(set(found.values())) == list(found.values())  # more before each, in the order of the parts
