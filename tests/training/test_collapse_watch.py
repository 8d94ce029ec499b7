"""When figures beyond their limits count as a sign of a collapse: a table of cases."""

from typing import Any

import pytest

from vjepa_scale.recipe.guard_sections import GuardsConfig
from vjepa_scale.training.collapse_watch import CollapseWatch

RANK, TIME, TO_MEAN = "effective_rank", "collapse/over_time", "collapse/to_mean"
STEPS, SETTLED = 1000, 500  # a later step than any limit settles at


def signs(rows: list[dict[str, Any]], **guards: Any) -> list[tuple[int, str]]:
    """Returns (step, column) of each sign, of a stage from step 1000 to 1999."""
    watch = CollapseWatch(GuardsConfig(**guards), first=1000, steps=STEPS)
    return [(row["step"] - 1000, sign.column) for row in rows for sign in watch.judge(row)]


def rows(column: str, *values: float | None, first: int = SETTLED) -> list[dict[str, Any]]:
    return [{"step": 1000 + first + n, column: value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("ranks", "guards", "expected"),
    [
        ((9.0, 9.0, 9.0), {}, []),
        ((1.0, 1.0), {}, []),
        ((1.0, 1.0, 1.0), {}, [SETTLED + 2]),
        ((1.0, 1.0, 9.0, 1.0, 1.0), {}, []),
        ((1.0, 1.0, None, 1.0), {}, [SETTLED + 3]),  # a step in which it was not measured says nothing
        ((1.0,) * 8, {}, [SETTLED + 2]),  # once
        ((1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0), {}, [SETTLED + 2, SETTLED + 6]),  # again
        ((1.0,), {"patience": 1}, [SETTLED]),
        ((float("nan"),) * 3, {}, [SETTLED + 2]),
        ((5.0, 5.0, 5.0), {}, []),  # at its limit
        ((7.0, 7.0, 7.0), {"limits": {RANK: 8}}, [SETTLED + 2]),
        ((1.0, 1.0, 1.0), {"limits": {RANK: None}}, []),
    ],
)
def test_measurements_in_a_row_are_a_sign(
    ranks: tuple[float | None, ...], guards: dict[str, Any], expected: list[int]
) -> None:
    assert signs(rows(RANK, *ranks), **guards) == [(step, RANK) for step in expected]


def test_a_limit_above_is_one_too() -> None:
    assert signs(rows(TO_MEAN, 0.9, 0.9, 0.9)) == []
    assert signs(rows(TO_MEAN, 1.5, 1.5, 1.5)) == [(SETTLED + 2, TO_MEAN)]


def test_what_has_to_be_learned_first_is_judged_later() -> None:
    """A new predictor is no better than the mean; features that do not move are wrong from the start."""
    assert signs(rows(TO_MEAN, 1.5, 1.5, 1.5, first=200)) == []
    assert signs(rows(TIME, 0, 0, 0, first=0)) == [(2, TIME)]


def test_a_predictor_that_repeats_the_last_frame_is_no_better_than_that() -> None:
    """Its loss is that of copying: the quotient is 1, not above it."""
    assert signs(rows("collapse/to_copy", 1.0, 1.0, 1.0, first=800)) == [(802, "collapse/to_copy")]
    assert signs(rows("collapse/to_copy", 0.9, 0.9, 0.9, first=800)) == []


def test_columns_are_judged_apart() -> None:
    both = [{"step": 1000 + SETTLED + n, RANK: 1.0, TIME: 0.0 if n else 0.5} for n in range(4)]
    assert signs(both) == [(SETTLED + 2, RANK), (SETTLED + 3, TIME)]


@pytest.mark.parametrize(
    ("steps", "done", "holds"),
    [(12, 11, False), (150, 99, False), (150, 100, True), (10_000, 2999, False), (10_000, 3000, True)],
)
def test_what_has_to_be_learned_takes_a_share_of_the_steps_and_a_hundred(steps: int, done: int, holds: bool) -> None:
    watch = CollapseWatch(GuardsConfig(patience=1), first=7, steps=steps)
    assert bool(watch.judge({"step": 7 + done, TO_MEAN: 1.5})) == holds


@pytest.mark.parametrize(
    ("ranks", "standing"),
    [
        ((), None),
        ((1.0, 1.0), None),
        ((1.0, 1.5, 1.2), (1.2, SETTLED)),
        ((1.0,) * 6 + (1.4,), (1.4, SETTLED)),
        ((1.0, 1.0, 1.0, 9.0), None),  # it has recovered
        ((9.0, 1.0, 1.0, 1.0), (1.0, SETTLED + 1)),
    ],
)
def test_a_resume_knows_what_earlier_attempts_measured(
    ranks: tuple[float, ...], standing: tuple[float, int] | None
) -> None:
    watch = CollapseWatch(GuardsConfig(), first=1000, steps=STEPS)
    for row in rows(RANK, *ranks):
        watch.replay(row | {"update_ratio": 1e-3})
        watch.replay({"step": row["step"], RANK: None})  # a step that was not measured
    found = [(sign.value, sign.since - 1000) for sign in watch.standing()]
    assert found == ([] if standing is None else [standing])
    if standing is not None:
        assert not watch.judge(rows(RANK, 1.0, first=SETTLED + len(ranks))[0])  # said already
