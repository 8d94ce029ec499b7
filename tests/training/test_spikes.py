"""Which steps are spikes, what is done about them, and which checkpoints are good: tables of cases."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.guard_sections import SpikesConfig
from vjepa_scale.run.ledger import Spike, read_spikes
from vjepa_scale.training.spikes import GRAD_NORM, LOSS, SpikeGuard, SpikeLog

CFG = SpikesConfig()


def guard_after(losses: list[float], norms: list[float], cfg: SpikesConfig = CFG) -> SpikeGuard:
    guard = SpikeGuard(cfg)
    guard.begin("a")
    for loss, norm in zip(losses, norms, strict=True):
        assert guard.judge({LOSS: loss, GRAD_NORM: norm}) is None
    return guard


STEADY = [0.5] * 64
NOISY = [math.exp(0.3 * math.sin(7 * k)) for k in range(64)]  # a MAD of about 0.2, so 10 deviations are a factor of 20


@pytest.mark.parametrize(
    ("loss", "norm", "told"),
    [
        (0.5, 1.0, None),
        (0.74, 1.0, None),  # 1.5 times the median is allowed, however steady the loss was
        (0.76, 1.0, "the loss is 0.76, above 0.75 (median 0.5)"),
        (0.01, 1e-9, None),  # below the level: no spike
        (0.5, 9.0, None),
        (0.5, 1e3, "the gradient norm is 1000, above"),
        (9.0, 1e3, "the loss is 9, above 0.75 (median 0.5) and the gradient norm is 1000, above"),
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, math.nan, "the loss is inf, the gradient norm is nan"),
        (0.5, math.inf, "the gradient norm is inf"),
        (-1.0, 1.0, None),  # has no logarithm, and is not judged
    ],
)
def test_a_spike_is_not_finite_or_far_above_the_level(loss: float, norm: float, told: str | None) -> None:
    said = guard_after(STEADY, NOISY).judge({LOSS: loss, GRAD_NORM: norm})
    assert said is None if told is None else said is not None and said.startswith(told)


def test_the_limit_is_the_median_and_the_mad_of_logarithms() -> None:
    """By NumPy and SciPy, for random series of random lengths: just below it is no spike, just above it is one."""
    from scipy.stats import median_abs_deviation

    draws = random.Random(5)
    for _ in range(40):
        norms = [draws.lognormvariate(1, draws.choice([0.3, 0.6])) for _ in range(draws.randint(32, 300))]
        guard = SpikeGuard(SpikesConfig(deviations=4.0, grad_norm_factor=1.0001))
        guard.begin("a")
        taken = [norm for norm in norms if guard.judge({GRAD_NORM: norm}) is None]
        if len(taken) < 32:
            continue
        logs = np.log(taken[-128:])
        limit = math.exp(np.median(logs) + 4 * median_abs_deviation(logs, scale="normal"))
        state = guard.state()
        assert guard.judge({GRAD_NORM: limit * 1.001}) is not None
        assert guard.judge({GRAD_NORM: limit * 0.999}) is None
        guard.restore(state)


def test_few_steps_are_no_level() -> None:
    guard = guard_after(STEADY[:31], NOISY[:31])
    assert guard.judge({LOSS: 100.0, GRAD_NORM: 1.0}) is None
    assert guard_after(STEADY[:32], NOISY[:32]).judge({LOSS: 100.0, GRAD_NORM: 1.0}) is not None
    assert guard_after(STEADY[:8], NOISY[:8], SpikesConfig(window=8)).judge({LOSS: 100.0, GRAD_NORM: 1.0}) is not None
    assert guard_after(STEADY[:3], NOISY[:3]).judge({LOSS: math.nan, GRAD_NORM: 1.0}) == "the loss is nan"


def test_spikes_do_not_raise_the_level_and_another_kind_of_step_has_its_own() -> None:
    guard = guard_after(STEADY, STEADY)
    for _ in range(200):
        assert guard.judge({LOSS: 2.0, GRAD_NORM: 0.5}) is not None
    guard.begin("b")
    assert guard.judge({LOSS: 2.0, GRAD_NORM: 0.5}) is None
    guard.begin("a")  # forgotten
    assert guard.judge({LOSS: 9.0, GRAD_NORM: 0.5}) is None


def test_without_deviations_only_values_that_are_not_finite_are_spikes() -> None:
    guard = guard_after(STEADY, NOISY, SpikesConfig(deviations=None))
    assert guard.judge({LOSS: 1e30, GRAD_NORM: 1e30}) is None
    assert guard.judge({LOSS: math.nan}) is not None


def test_a_resume_judges_with_the_same_bits() -> None:
    """The state goes through JSON, as in a checkpoint's manifest."""
    draws = random.Random(3)
    whole = guard_after([draws.lognormvariate(0, 0.01) for _ in range(90)], [draws.random() for _ in range(90)])
    resumed = SpikeGuard(CFG, json.loads(json.dumps(whole.state())))
    for _ in range(300):
        values = {LOSS: draws.lognormvariate(0, 0.2), GRAD_NORM: draws.lognormvariate(0, 2)}
        assert whole.judge(values) == resumed.judge(values)
    assert whole.state() == resumed.state()
    assert statistics.median(whole.state()[LOSS]) != 0


# -- what has been done about them -------------------------------------------------------------------


def skip(step: int) -> Spike:
    return Spike(step, "skip", "seen")


def rollback(step: int, to: int) -> Spike:
    return Spike(step, "rollback", "seen", to, {"a": step - to})


def test_steps_are_skipped_again_unless_a_rollback_has_gone_behind_them() -> None:
    log = SpikeLog([skip(150), skip(90), rollback(180, 100), skip(120)])
    assert [step for step in range(200) if log.skipped(step)] == [90, 120]
    assert log.left_out() == [(100, {"a": 80})]


@pytest.mark.parametrize(
    ("step", "rollbacks", "abandoned"),
    [(100, 0, True), (50, 0, False), (150, 1, True), (51, 1, True), (50, 1, False), (60, 2, False), (170, 2, False)],
)
def test_a_checkpoint_is_left_behind_by_a_later_rollback_to_an_earlier_step(
    step: int, rollbacks: int, *, abandoned: bool
) -> None:
    """The first rollback went to step 100, the second to step 50."""
    log = SpikeLog([rollback(180, 100), rollback(170, 50)])
    assert log.is_abandoned(step, rollbacks) is abandoned
    one = SpikeLog([rollback(180, 100)])
    assert [one.is_abandoned(step, 0) for step in (99, 100, 101, 200)] == [False, False, True, True]
    assert not one.is_abandoned(200, 1)


@pytest.mark.parametrize(
    ("spikes", "now", "good"),
    [
        ([], 250, 200),
        ([skip(199)], 250, 100),  # 200 was saved one step after the spike, and 100 steps have not passed
        ([skip(199)], 298, 100),
        ([skip(199)], 299, 200),
        ([skip(200)], 250, 200),  # met after it
        ([skip(50)], 140, None),
        ([skip(50), skip(120)], 160, 100),
        ([skip(20), rollback(230, 200)], 250, 100),  # it has been tried
        ([rollback(230, 200)], 299, 100),
        ([rollback(130, 100)], 230, 200),
        ([skip(190), rollback(195, 100)], 205, 200),  # 190 was on the way that was left; 100 has been tried
    ],
)
def test_which_checkpoint_is_good(spikes: list[Spike], now: int, good: int | None) -> None:
    assert SpikeLog(spikes).good([100, 200, 300], now=now, window=100) == good


@pytest.mark.parametrize(
    ("spikes", "step", "back", "told"),
    [
        ([], 10, False, None),
        ([skip(n) for n in (6, 7, 8, 9)], 10, False, None),
        ([skip(n) for n in (5, 6, 7, 8, 9)], 10, False, "5 steps in a row were skipped (guards.spikes.in_a_row: 5)"),
        ([skip(n) for n in (4, 6, 7, 8, 9)], 10, False, None),
        ([skip(n) for n in (5, 6, 7, 8, 9)], 10, True, None),
        ([skip(10 * n) for n in range(20)], 999, False, "20 of 1000 steps were skipped (guards.spikes.per_1000: 20)"),
        ([skip(10 * n) for n in range(20)], 1000, False, None),  # step 0 no longer counts
        ([rollback(n, 5) for n in (30, 40)], 50, True, None),
        ([rollback(n, 5) for n in (30, 90, 40)], 50, True, "3 rollbacks in 1000 steps (guards.spikes.rollbacks: 3)"),
        ([rollback(n, 5) for n in (30, 90, 40)], 50, False, None),
    ],
)
def test_bounds(spikes: list[Spike], step: int, *, back: bool, told: str | None) -> None:
    refusal = SpikeLog(spikes).refusal(CFG, step, rollback=back)
    assert refusal is None if told is None else refusal is not None and refusal.startswith(told)
    assert refusal is None or str(spikes[-1]) in refusal


ROW: dict[str, Any] = {"event": "spike", "stage": "pretrain", "step": 7, "action": "skip", "to": None, "saw": "seen"}
BACK: dict[str, Any] = {"action": "rollback", "to": 4, "left_out": {"a": 3}}
NOT_WHOLE: list[dict[str, Any]] = [
    *({"step": "7"}, {"step": None}, {"saw": 3}, {"action": "go"}, {"to": 4}, {"action": "rollback"}),
    *({**BACK, "left_out": None}, {**BACK, "left_out": {"a": "3"}}, {**BACK, "to": "4"}),
]


def test_rows_of_a_ledger(tmp_path: Any) -> None:
    book = tmp_path / "ledger.jsonl"
    rows = [
        ROW,
        {**ROW, "stage": "cooldown"},
        {"event": "stop", "stage": "pretrain"},
        {**ROW, **BACK},
    ]
    book.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_spikes(book, "pretrain") == [skip(7), rollback(7, 4)]
    assert read_spikes(tmp_path / "none.jsonl", "pretrain") == []


@pytest.mark.parametrize(
    ("kind", "counted"), [("SpikeError", False), ("NonFiniteLossError", False), ("UserError", True)]
)
def test_bounds_begin_anew_where_the_run_has_ended_itself_over_spikes(
    kind: str, *, counted: bool, tmp_path: Path
) -> None:
    """A lower rate is a new chance. What was skipped stays skipped."""
    book = tmp_path / "ledger.jsonl"
    rows = [*({**ROW, "step": step} for step in range(5, 10)), {"event": "stop", "stage": "pretrain", "kind": kind}]
    book.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = SpikeLog(read_spikes(book, "pretrain"))
    assert (log.refusal(CFG, 10, rollback=False) is not None) == counted
    assert [step for step in range(20) if log.skipped(step)] == [5, 6, 7, 8, 9]
    for step in range(10, 15):
        log.add(skip(step))
    assert "steps in a row were skipped" in str(log.refusal(CFG, 15, rollback=False))


@pytest.mark.parametrize("change", NOT_WHOLE)
def test_a_row_that_is_not_whole(change: dict[str, Any], tmp_path: Any) -> None:
    book = tmp_path / "ledger.jsonl"
    book.write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(UserError, match=r"ledger.jsonl: a row of 'pretrain' that is not whole"):
        read_spikes(book, "pretrain")
