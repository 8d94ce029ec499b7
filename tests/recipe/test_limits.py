"""The limits of a clip, a loader worker, a step and a collective: in this order, whatever a recipe sets."""

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
    assert (item_limit_s(usual), step_limit_s(usual, world_size=2), outside_limit_s(usual)) == (255, 480, 2400)


def test_a_single_rank_has_only_the_limit_of_a_step_that_is_set(tmp_path: Path) -> None:
    """No collective of it can time out, and a long step is no failure."""
    assert step_limit_s(recipe(tmp_path, engine={"timeout_s": 600}), world_size=1) == 0
    assert step_limit_s(recipe(tmp_path, guards={"step_limit_s": 100}), world_size=1) == 100


ITEM, STEP, DECODE = "data.faults.item_timeout_s", "guards.step_limit_s", "data.faults.decode_timeout_s"
TIMEOUT = "engine.timeout_s"


@pytest.mark.parametrize("timeout_s", [31, 60, 501, 600, 7200])
@pytest.mark.parametrize("decode_s", [1, 30, 500])
@pytest.mark.parametrize("own", [(None, None), (0.3, None), (None, 0.3), (0.95, None), (None, 0.99), (0.2, 0.3)])
def test_what_is_taken_keeps_the_order(
    decode_s: int, timeout_s: int, own: tuple[float | None, float | None], tmp_path: Path
) -> None:
    """Also of recipes of earlier versions, which set only these two. own: item and step limit, parts of the way."""
    if decode_s >= timeout_s:
        return
    item_s, step_s = (None if part is None else decode_s + part * (timeout_s - decode_s) for part in own)
    faults = {"decode_timeout_s": decode_s, "item_timeout_s": item_s}
    found = recipe(tmp_path, engine={"timeout_s": timeout_s}, data={"faults": faults}, guards={"step_limit_s": step_s})
    taken = (item_limit_s(found), step_limit_s(found, world_size=2))
    assert decode_s < taken[0] < taken[1] < timeout_s < outside_limit_s(found)
    assert all(mine in (None, theirs) for mine, theirs in zip((item_s, step_s), taken, strict=True))


@pytest.mark.parametrize(
    ("decode_s", "item_s", "step_s", "words"),
    [
        (30, None, 600, f"{STEP} 600 is not less than {TIMEOUT} 600: "),
        (30, None, 600, f"({STEP} between 30 and 600, or {TIMEOUT} above 600)"),
        (30, 700, None, f"{ITEM} 700 is not less than {TIMEOUT} 600: "),
        (30, 30, None, f"{DECODE} 30 is not less than {ITEM} 30: no clip would be replaced"),
        (30, 30, None, f"({DECODE} between 0 and 30, or {ITEM} between 30 and 600)"),
        (600, None, None, f"{DECODE} 600 is not less than {TIMEOUT} 600: "),
        (600, None, None, f"({DECODE} between 0 and 600, or {TIMEOUT} above 600)"),
        (30, None, 20, f"{DECODE} 30 is not less than {STEP} 20: no clip would be replaced"),
        (30, None, 20, f"({DECODE} between 0 and 20, or {STEP} between 30 and 600)"),
        (30, 100, 50, f"{ITEM} 100 is not less than {STEP} 50: "),
        (30, 100, 50, f"({ITEM} between 30 and 50, or {STEP} between 100 and 600)"),
        (30, 100, 20, f"({STEP} between 100 and 600)"),  # an item_timeout_s below 20 would be below decode_timeout_s
        (30, 700, 20, "(null for both)"),
        (30, None, 0, STEP),
    ],
)
def test_limits_in_another_order_are_refused(
    decode_s: int, item_s: int | None, step_s: int | None, words: str, tmp_path: Path
) -> None:
    faults = {"decode_timeout_s": decode_s, "item_timeout_s": item_s}
    with pytest.raises(UserError) as refused:
        recipe(tmp_path, engine={"timeout_s": 600}, data={"faults": faults}, guards={"step_limit_s": step_s})
    assert words in str(refused.value)
