"""Masks of whole time steps against what their names say, counted token by token."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.batch import MaskPair, draw_masks
from vjepa_scale.masking import check_masks
from vjepa_scale.recipe import Recipe
from vjepa_scale.recipe.load import recipe_yaml, validate_recipe
from vjepa_scale.recipe.mask_sections import MasksConfig

GRID = (8, 3, 2)
FUTURE, DROPOUT, RATES = {"kind": "future"}, {"kind": "frame_dropout"}, {"kind": "multi_rate"}


def masks(*generators: dict, group: int = 6) -> MasksConfig:
    return MasksConfig.model_validate({"generators": generators, "group": group})


def draw(generator: dict, *, grid=GRID, seed=0, step=0, slots=range(6), group=6) -> MaskPair:
    (pair,) = draw_masks(masks(generator, group=group), seed=seed, step=step, slots=slots, grid=grid)
    return pair


def time_steps(tokens: torch.Tensor, grid=GRID) -> list[tuple[int, ...]]:
    """The time steps of each row; fails where a step is there in part, or rows are not sorted."""
    _, h, w = grid
    out = []
    for row in tokens.tolist():
        steps = tuple(sorted({n // (h * w) for n in row}))
        assert row == [t * h * w + y * w + x for t in steps for y in range(h) for x in range(w)]
        out.append(steps)
    return out


shares = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted)
grids = st.tuples(st.integers(2, 17), st.integers(1, 3), st.integers(1, 3))
keys = st.fixed_dictionaries({"seed": st.integers(0, 2**32), "step": st.integers(0, 10**6)})


@given(shares, grids, keys)
@settings(max_examples=100, deadline=None)
def test_future_is_the_first_part_and_the_rest(share, grid, key) -> None:
    t = grid[0]
    pair = draw({**FUTURE, "context_share": share}, grid=grid, **key)
    context, target = time_steps(pair.context, grid), time_steps(pair.target, grid)
    assert len(set(context)) == len(set(target)) == 1
    assert context[0] + target[0] == tuple(range(t))
    assert 1 <= len(context[0]) < t
    # The nearest number of steps to a share between the two, as far as one step of each is left.
    assert max(1, share[0] * t - 0.5) - 1e-9 <= len(context[0]) or len(context[0]) == t - 1
    assert len(context[0]) <= max(1, share[1] * t + 0.5) + 1e-9


@given(shares, grids, keys)
@settings(max_examples=100, deadline=None)
def test_frame_dropout_splits_time_in_two_of_equal_counts_in_every_clip(share, grid, key) -> None:
    t = grid[0]
    pair = draw({**DROPOUT, "dropped_share": share}, grid=grid, **key)
    context, target = time_steps(pair.context, grid), time_steps(pair.target, grid)
    assert all(sorted(c + d) == list(range(t)) for c, d in zip(context, target, strict=True))
    (dropped,) = {len(d) for d in target}
    assert 1 <= dropped < t
    assert max(1, share[0] * t - 0.5) - 1e-9 <= dropped or dropped == t - 1
    assert dropped <= max(1, share[1] * t + 0.5) + 1e-9


@given(shares, grids, keys, st.sets(st.integers(1, 16), min_size=1, max_size=4).map(sorted))
@settings(max_examples=100, deadline=None)
def test_multi_rate_predicts_single_steps_at_their_distances(share, grid, key, ahead) -> None:
    t = grid[0]
    generator = {**RATES, "context_share": share, "steps_ahead": ahead}
    if t <= ahead[-1]:
        for refuse in (lambda: draw(generator, grid=grid, **key), lambda: check_masks(masks(generator), grid=grid)):
            with pytest.raises(UserError, match=rf"masks\.generators\.0.*takes {ahead[-1] + 1} time steps.*has {t} "):
                refuse()
        return
    pair = draw(generator, grid=grid, **key)
    (context,), (target,) = set(time_steps(pair.context, grid)), set(time_steps(pair.target, grid))
    assert context == tuple(range(len(context)))
    assert context
    assert target == tuple(context[-1] + n for n in ahead)
    assert target[-1] < t
    assert len(context) <= max(1, share[1] * t + 0.5) + 1e-9


def test_the_drawing_in_the_documentation() -> None:
    half = draw(RATES)  # 8 time steps: context 0 to 3; 1, 2 and 4 after the last are 4, 5 and 7
    assert set(time_steps(half.context)) == {(0, 1, 2, 3)}
    assert set(time_steps(half.target)) == {(4, 5, 7)}
    assert set(time_steps(draw(FUTURE).target)) == {(4, 5, 6, 7)}
    assert {len(steps) for steps in time_steps(draw(DROPOUT).target)} == {4}


@pytest.mark.parametrize("generator", [FUTURE, DROPOUT, RATES])
def test_a_draw_is_a_function_of_seed_step_and_slot(generator: dict) -> None:
    """Not of the slots drawn beside it, nor of the mask group: all slots of a step agree on the counts."""
    share = "dropped_share" if generator is DROPOUT else "context_share"
    generator = {**generator, share: [0.1, 0.9]}
    counts = set()
    for step in range(12):
        whole = draw(generator, step=step, slots=range(12), group=12)
        counts.add(whole.target.shape[1] + 1000 * whole.context.shape[1])
        for size in (1, 2, 3, 6):
            parts = [draw(generator, step=step, slots=range(s, s + size)) for s in range(0, 12, size)]
            assert torch.equal(torch.cat([p.context for p in parts]), whole.context)
            assert torch.equal(torch.cat([p.target for p in parts]), whole.target)
    assert len(counts) > 2  # of the range, another share in other steps
    several = {tuple(draw(generator, step=s, seed=seed).context.shape) for s in range(6) for seed in (1, 2)}
    assert len(several) > 2


def test_frame_dropout_draws_every_set_of_steps_equally_often() -> None:
    """6 subsets of two of four steps: chi-squared over 6,000 slots below 20.5 (p = 0.001 at 5 degrees of freedom)."""
    pair = draw(DROPOUT, grid=(4, 1, 1), slots=range(6000), group=6000, seed=3)
    subsets = time_steps(pair.target, (4, 1, 1))
    counts = np.array([subsets.count(pick) for pick in itertools.combinations(range(4), 2)])
    assert counts.sum() == 6000
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5
    other = time_steps(draw(DROPOUT, grid=(4, 1, 1), slots=range(6000), group=6000, seed=3, step=1).target, (4, 1, 1))
    assert 700 < sum(a == b for a, b in zip(subsets, other, strict=True)) < 1300  # a sixth agree by chance


def test_two_generators_of_a_kind_draw_independently() -> None:
    first, second = draw_masks(masks(DROPOUT, DROPOUT, group=24), seed=0, step=0, slots=range(24), grid=GRID)
    assert time_steps(first.target) != time_steps(second.target)


@pytest.mark.parametrize("generator", [FUTURE, DROPOUT, RATES])
def test_one_time_step_is_refused(generator: dict) -> None:
    cfg = masks({"blocks": 1, "spatial_scale": 0.3}, generator)
    with pytest.raises(UserError, match=rf"masks\.generators\.1.*{generator['kind']} mask takes . time steps at least"):
        check_masks(cfg, grid=(1, 4, 4))
    check_masks(cfg, grid=(5, 4, 4))


def recipe_with(*generators: object) -> Recipe:
    tree = {
        "run": {"dir": "runs/x"},
        "data": {"sets": {"a": {"path": "a"}}},
        "model": {"encoder": "vit_tiny"},
        "masks": {"generators": list(generators)},
        "pretrain": {"steps": 1, "phases": [{"name": "all", "start_lr": 0.1}]},
    }
    return validate_recipe(tree, source="my.yaml")


@pytest.mark.parametrize(
    ("generator", "key", "hint"),
    [
        ({"kind": "futur"}, "", "there are blocks, future, frame_dropout, multi_rate"),
        ({"kind": 3}, "", "there are blocks"),
        (3, "", "a section of keys, not 3"),
        ({**FUTURE, "blocks": 2}, "", "'blocks' is no key of masks of kind future"),
        ({**FUTURE, "blocks": 2}, "", "kind, context_share; it is one of blocks"),
        ({**FUTURE, "dropped_share": 0.2}, "", "it is one of frame_dropout"),
        ({"blocks": 2, "spatial_scale": 0.2, "context_share": 0.2}, "", "it is one of future and multi_rate"),
        ({"spatial_scale": 0.2}, ".blocks", "missing"),
        ({"blocks": 0, "spatial_scale": 0.2}, ".blocks", "must be greater than 0, not 0"),
        ({**FUTURE, "context_share": 0}, ".context_share.0", "must be greater than 0, not 0"),
        ({**FUTURE, "context_share": [0.8, 0.2]}, ".context_share", "from low to high"),
        ({**DROPOUT, "dropped_share": 1.5}, ".dropped_share.0", "must be at most 1, not 1.5"),
        ({**RATES, "steps_ahead": []}, ".steps_ahead", "at least 1 item"),
        ({**RATES, "steps_ahead": [0, 1]}, ".steps_ahead.0", "must be greater than 0, not 0"),
        ({**RATES, "steps_ahead": [2, 1]}, "", "steps_ahead must go up, not [2, 1]"),
        ({**RATES, "steps_ahead": [1, 1]}, "", "steps_ahead must go up"),
    ],
)
def test_bad_generators_are_one_error_that_names_the_key(generator: object, key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_with({"blocks": 1, "spatial_scale": 0.3}, generator)
    assert f"my.yaml:masks.generators.1{key}: " in str(caught.value)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_all_kinds_is_written_and_read_as_itself() -> None:
    import yaml

    recipe = recipe_with({"blocks": 1, "spatial_scale": 0.3}, FUTURE, DROPOUT, {**RATES, "steps_ahead": [1, 3]})
    assert validate_recipe(yaml.safe_load(recipe_yaml(recipe)), source="again") == recipe
    assert [g.kind for g in recipe.masks.generators] == ["blocks", "future", "frame_dropout", "multi_rate"]
