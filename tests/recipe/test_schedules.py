"""Learning rate, weight decay and EMA momentum of every step, against published schedulers and PyTorch's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.plan import describe
from vjepa_scale.recipe import Phase, load_recipe, stages_of
from vjepa_scale.recipe.load import recipe_yaml, validate_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# Step, learning rate, weight decay, EMA momentum, as src/utils/schedulers.py of facebookresearch/jepa (commit 51c59d5)
# gives them: WarmupCosineSchedule and CosineWDSchedule, each stepped once before a step, made as app/vjepa/utils.py
# does with the numbers of configs/pretrain/vitl16.yaml, and of facebookresearch/ijepa's configs/in1k_vith14_ep300.yaml
# (whose schedulers are the same) with 625 iterations an epoch; the momentum by the generator of app/vjepa/train.py.
PUBLISHED = {
    "vjepa1_vitl": [
        (0, 0.00020003541666666668, 0.04000000007018384, 0.998),
        (1, 0.00020007083333333336, 0.040000000280735415, 0.9980000177777778),
        (11999, 0.000625, 0.0500122533572534, 0.9982133155555556),
        (12000, 0.0006249999998475624, 0.0500139064875994, 0.9982133333333333),
        (45000, 0.00047319557919646145, 0.16438172156566044, 0.9988),
        (89999, 7.504222442956086e-05, 0.36562305898749053, 0.9995999822222222),
    ],
    "ijepa_vith": [
        (0, 0.000200032, 0.04000000002526616, 0.996),
        (1, 0.00020006400000000001, 0.04000000010106475, 0.9960000213333333),
        (24999, 0.001, 0.05556181762433182, 0.996533312),
        (25000, 0.0009999999999066535, 0.05556304433622944, 0.9965333333333334),
        (93750, 0.0006200287981250594, 0.22000301592894725, 0.998),
        (187499, 1e-06, 0.4, 0.9999999786666667),
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_schedules(name: str) -> None:
    phases = stages_of(load_recipe(RECIPES / f"{name}.yaml"))["pretrain"].phases
    assert phases[-1].end == PUBLISHED[name][-1][0] + 1
    for step, lr, weight_decay, momentum in PUBLISHED[name]:
        (phase,) = (phase for phase in phases if phase.first <= step < phase.end)
        assert phase.lr(step) == pytest.approx(lr, rel=1e-12)
        assert phase.weight_decay(step) == pytest.approx(weight_decay, rel=1e-12)
        assert phase.ema_momentum(step) == pytest.approx(momentum, rel=1e-12)


def tree(**stages: dict[str, Any]) -> dict[str, Any]:
    small = {"global_batch": 24, "micro_batch": 12, "clip": {"frames": 4, "size": [32, 48]}}
    return {
        "run": {"dir": "runs/x"},
        "data": {"sets": {"a": {"path": "a"}}},
        "model": {"encoder": {"width": 32, "depth": 1, "heads": 2}},
        "optimizer": {"weight_decay": 0.5},
        "jepa": {"ema_momentum": 0.75},
        **{name: {**small, **stage} for name, stage in stages.items()},
    }


def phases_of(stage: str = "pretrain", **stages: dict[str, Any]) -> list[Phase]:
    return stages_of(validate_recipe(tree(**stages), source="test"))[stage].phases


def values(phases: list[Phase], name: str) -> list[float | None]:
    return [getattr(phase, name)(step) for phase in phases for step in range(phase.first, phase.end)]


@pytest.mark.parametrize("horizon", [None, 12, 1.5])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rates_are_those_of_pytorch(shape: str, horizon: float | None) -> None:
    """Eight steps, of a schedule of eight, or of twelve that is cut."""
    phase = {"name": "p", "start_lr": 0.4, "final_lr": 0.1, "lr_shape": shape, "lr_horizon": horizon}
    ours = values(phases_of(pretrain={"steps": 8, "phases": [phase]}), "lr")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    steps = 8 if horizon is None else 12
    scheduler = (
        CosineAnnealingLR(optimizer, steps, eta_min=0.1)
        if shape == "cosine"
        else LinearLR(optimizer, 1.0, 0.25, total_iters=steps)
    )
    theirs = []
    for _ in range(8):
        optimizer.step()
        scheduler.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    assert ours == pytest.approx(theirs, rel=1e-9)


ONE = [{"name": "all", "start_lr": 0.1}]
TWO = [{"name": "a", "steps": 2, "start_lr": 0.1}, {"name": "b"}]


@pytest.mark.parametrize(
    ("pretrain", "decays", "momenta"),
    [
        ({}, [None] * 4, [None] * 4),  # the constants of optimizer and jepa
        ({"weight_decay": 0.2}, [0.2] * 4, [None] * 4),
        ({"weight_decay": {"final": 0.1}}, [0.4, 0.3, 0.2, 0.1], [None] * 4),  # from the constant, over both phases
        ({"weight_decay": {"start": 0, "final": 1, "horizon": 2}}, [0.5, 1, 1, 1], [None] * 4),
        ({"ema_momentum": {"start": 0, "final": 1}}, [None] * 4, [0, 0.25, 0.5, 0.75]),
        ({"ema_momentum": {"final": 1, "horizon": 1.25}}, [None] * 4, [0.75, 0.8, 0.85, 0.9]),
        # (1 - cos(k·45°))/2
        ({"weight_decay": {"start": 0, "final": 1, "shape": "cosine"}}, [0.146447, 0.5, 0.853553, 1], [None] * 4),
        ({"phases": [TWO[0], {**TWO[1], "weight_decay": {"final": 0.1}}]}, [0.5, 0.5, 0.3, 0.1], [None] * 4),
        ({"phases": [{**TWO[0], "weight_decay": {"final": 0.1}}, TWO[1]]}, [0.3, 0.1, 0.1, 0.1], [None] * 4),
        (
            {"weight_decay": {"start": 0, "final": 1}, "phases": [{**TWO[0], "weight_decay": 0.9}, TWO[1]]},
            [0.9, 0.9, 0.75, 1],  # the second phase on the stage's ramp
            [None] * 4,
        ),
    ],
)
def test_a_stage_or_a_phase_schedules(
    pretrain: dict[str, Any], decays: list[float | None], momenta: list[float | None]
) -> None:
    """Four steps in two phases, beside a weight decay of 0.5 and a momentum of 0.75."""
    phases = phases_of(pretrain={"steps": 4, "phases": TWO, **pretrain})
    for name, wanted in (("weight_decay", decays), ("ema_momentum", momenta)):
        assert values(phases, name) == (wanted if None in wanted else pytest.approx(wanted, rel=1e-5))


@pytest.mark.parametrize(
    ("cooldown", "rate", "decay", "momentum"),
    [
        ({}, 0.4, 0.3, 0.9),  # where the cut schedules of pretraining stood
        ({"weight_decay": 0.1, "ema_momentum": {"final": 0.9}}, 0.4, 0.1, 0.9),
        ({"weight_decay": {"final": 0.1}}, 0.4, 0.2, 0.9),
        ({"optimizer": {"weight_decay": 0.7}}, 0.4, None, 0.9),
        ({"phases": [{"name": "d", "start_lr": 0.2}]}, 0.2, 0.3, 0.9),
    ],
)
def test_a_cooldown_goes_on_where_schedules_ended(
    cooldown: dict[str, Any], rate: float, decay: float | None, momentum: float
) -> None:
    pretrain = {
        "steps": 4,
        "weight_decay": {"start": 0.1, "final": 0.5, "horizon": 8},
        "ema_momentum": {"start": 0.8, "final": 1, "horizon": 8},
        "phases": [{"name": "p", "start_lr": 0.8, "final_lr": 0, "lr_horizon": 2.0}],
    }
    after = {"continue_from": "pretrain", "steps": 2, "phases": [{"name": "d"}], **cooldown}
    (phase,) = phases_of("cooldown", pretrain=pretrain, cooldown=after)
    assert (phase.lr(4), phase.ema_momentum(4)) == pytest.approx((rate, momentum))
    assert phase.weight_decay(4) == (None if decay is None else pytest.approx(decay))


def test_a_resolved_recipe_without_the_keys_means_what_it_did() -> None:
    """As runs of earlier commits have recorded them; and one with the keys loads back equal."""
    plain = validate_recipe(tree(pretrain={"steps": 4, "phases": TWO}), source="test")
    old = plain.model_dump(mode="json", exclude_none=True)
    for phase in old["pretrain"]["phases"]:
        del phase["lr_shape"]
    assert validate_recipe(old, source="test") == plain
    for name in PUBLISHED:
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert validate_recipe(recipe.model_dump(mode="json", exclude_none=True), source="test") == recipe
        assert "horizon: null" not in recipe_yaml(recipe)


PROBE = {"init_from": "x.pt", "evaluate_on": "b", "steps": 1, "phases": ONE, "heads": 2}
ACTION = {"init_from": "x.pt", "steps": 1, "phases": ONE}


@pytest.mark.parametrize(
    ("stage", "given", "key", "said"),
    [
        ("pretrain", {"weight_decay": "much"}, "pretrain.weight_decay", "must be a number, or a section"),
        ("pretrain", {"weight_decay": {"start": 0.1}}, "pretrain.weight_decay.final", "missing"),
        ("pretrain", {"weight_decay": {"final": -1}}, "pretrain.weight_decay.final", "at least 0"),
        ("pretrain", {"ema_momentum": {"final": 1.5}}, "pretrain.ema_momentum.final", "at most 1"),
        ("pretrain", {"ema_momentum": {"final": 1, "shape": "sine"}}, "pretrain.ema_momentum.shape", "cosine"),
        ("pretrain", {"weight_decay": {"final": 1, "horizon": True}}, "pretrain.weight_decay.horizon", "not True"),
        ("pretrain", {"weight_decay": {"final": 1, "horizon": 0.0}}, "pretrain.weight_decay.horizon", "multiple"),
        ("pretrain", {"phases": [{**ONE[0], "lr_shape": "cosine"}]}, "pretrain.phases.0", "final_lr"),
        ("action", {"ema_momentum": 0.9}, "action.ema_momentum", "no target encoder"),
        ("action", {"phases": [{**ONE[0], "ema_momentum": 0.9}]}, "action.phases.0.ema_momentum", "no target"),
        ("probe", {"weight_decay": 0.1}, "probe.weight_decay", "probe.weight_decays"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(stage: str, given: dict[str, Any], key: str, said: str) -> None:
    base = {"pretrain": {"steps": 1, "phases": ONE}, "action": ACTION, "probe": PROBE}[stage]
    with pytest.raises(UserError) as refusal:
        validate_recipe(tree(**{stage: {**base, **given}}), source="test")
    assert refusal.value.where == f"test:{key}"
    assert said in str(refusal.value)


def test_a_dry_run_shows_the_ramps_of_each_phase() -> None:
    recipe = load_recipe(RECIPES / "vjepa1_vitl.yaml")
    lines = list(describe([stages_of(recipe)["pretrain"]], where="here"))
    (decay,) = (line for line in lines if " decay: " in line)
    for ramp in (
        "lr 0.000625 → 7.50422e-05 cosine (of 0.000625 → 1e-06 in 100500 steps)",
        "weight decay 0.0500123 → 0.365623 cosine (of 0.04 → 0.4 in 112500 steps)",
        "EMA momentum 0.998213 → 0.9996 (of 0.998 → 1 in 112500 steps)",
    ):
        assert ramp in decay
