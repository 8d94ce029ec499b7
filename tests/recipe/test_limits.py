"""The limits of a clip, a loader worker, a step and a collective: in this order, whatever a recipe sets."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.chain import write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import Recipe, load_recipe
from vjepa_scale.recipe.limits import item_limit_s, outside_limit_s, step_limit_s


def recipe(folder: Path, **sections: Any) -> Recipe:
    sets = {name: folder / name for name in ("left", "right")}
    return load_recipe(write_recipe(folder / "recipe.yaml", folder / "run", sets, **sections))


def test_the_defaults_that_the_pages_name(tmp_path: Path) -> None:
    usual = recipe(tmp_path, engine={"timeout_s": 600})
    assert (item_limit_s(usual), step_limit_s(usual), outside_limit_s(usual)) == (255, 480, 2400)


@pytest.mark.parametrize(("decode_s", "timeout_s"), list(itertools.product((1, 30, 500), (31, 60, 501, 600, 7200))))
def test_defaults_keep_the_order(decode_s: int, timeout_s: int, tmp_path: Path) -> None:
    """Recipes of earlier versions, which set only these two, stay usable."""
    if decode_s >= timeout_s:
        return
    found = recipe(tmp_path, engine={"timeout_s": timeout_s}, data={"faults": {"decode_timeout_s": decode_s}})
    assert decode_s < item_limit_s(found) < step_limit_s(found) < timeout_s < outside_limit_s(found)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"guards": {"step_limit_s": 600}}, "guards.step_limit_s 600 is not less than engine.timeout_s 600"),
        ({"data": {"faults": {"item_timeout_s": 700}}}, "data.faults.item_timeout_s 700 is not less than"),
        ({"data": {"faults": {"item_timeout_s": 30}}}, "is not more than data.faults.decode_timeout_s 30: no clip"),
        ({"data": {"faults": {"decode_timeout_s": 600}}}, "decode_timeout_s 600 is not less than engine.timeout_s 600"),
        ({"guards": {"step_limit_s": 0}}, "guards.step_limit_s"),
    ],
)
def test_limits_in_another_order_are_refused(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        recipe(tmp_path, engine={"timeout_s": 600}, **sections)
    assert words in str(refused.value)


def test_own_limits_are_taken(tmp_path: Path) -> None:
    own = recipe(tmp_path, guards={"step_limit_s": 100}, data={"faults": {"item_timeout_s": 50}})
    assert (item_limit_s(own), step_limit_s(own)) == (50, 100)
