"""Three whole training steps against the published ``app/vjepa/train.py``: same weights, clips and masks.

Tolerances: loss 1e-5 and each parameter's gradient 1e-4 of its largest value (float32 sums in another order, over two
micro-batches here); EMA weights 1e-6 where their values are of order 1.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import ENGINE, run_processes
from tests.published import inputs
from tests.published.results import MODEL, checkpoint, relative, steps
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MaskPair, MicroBatch
from vjepa_scale.distributed.fsdp import FsdpEngine
from vjepa_scale.distributed.optim import named_parameters
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.training.step import training_step

pytestmark = pytest.mark.distributed

# Losses, gradients by name, and all weights at the end.
Results = tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]
Record = Callable[[str, object], None]

MICRO = 2
RECIPE = validate_recipe(
    {
        "run": {"dir": "unused"},
        "data": {"sets": {"a": {"path": "unused"}}},
        "model": MODEL.model_dump(),
        "masks": {"group": inputs.CLIPS},
        # The published predictor has two mask tokens here and only ever uses the first.
        "jepa": {"ema_momentum": inputs.MOMENTUM, "mask_token": "first"},
        "optimizer": {"weight_decay": inputs.WEIGHT_DECAY, "eps": inputs.ADAM_EPS},
        "pretrain": {
            "steps": inputs.STEPS,
            "clip": {"frames": inputs.FRAMES, "size": inputs.SIZE},
            "global_batch": inputs.CLIPS,
            "micro_batch": MICRO,
            "phases": [{"name": "all", "start_lr": inputs.PEAK_LR}],
        },
    },
    source="test",
)


def batch(step: int) -> list[MicroBatch]:
    clips = torch.from_numpy(inputs.clips(step))
    pairs = [
        MaskPair(steps()[f"step{step}.context{generator}"].long(), steps()[f"step{step}.target{generator}"].long())
        for generator in range(2)
    ]
    return [
        MicroBatch(
            clips[slots.start : slots.stop],
            tuple(MaskPair(p.context[slots.start : slots.stop], p.target[slots.start : slots.stop]) for p in pairs),
            step,
            slots,
            ("a",) * MICRO,
        )
        for slots in (range(start, start + MICRO) for start in range(0, inputs.CLIPS, MICRO))
    ]


def ours(ranks: Ranks) -> Results:
    engine = FsdpEngine(ENGINE, ranks)
    objective = Jepa(stages_of(RECIPE)["pretrain"], engine)
    for network, module in objective.networks.items():
        for name, parameter in module.named_parameters():
            value = inputs.weight(f"{network.removeprefix('target_')}.{name}", tuple(parameter.shape))
            parameter.detach().to_local().copy_(torch.from_numpy(value))  # type: ignore[attr-defined]
    engine.start_optimizer(RECIPE.optimizer, objective.trained)
    named = named_parameters(objective.trained)
    gradients: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        gradients.append({name: p.grad.full_tensor().clone() for name, p in named if p.grad is not None})  # type: ignore[attr-defined]

    engine._optimizer.register_step_pre_hook(note)
    losses = [
        training_step(objective, engine, batch(step), lr=float(steps()[f"step{step}.lr"])).loss
        for step in range(inputs.STEPS)
    ]
    final = {
        f"{network}.{name}": parameter.full_tensor().detach()  # type: ignore[attr-defined]
        for network, module in objective.networks.items()
        for name, parameter in module.named_parameters()
    }
    return losses, gradients, final


@pytest.fixture(scope="module")
def results() -> Results:
    return run_processes(ours, 1)[0]


def test_the_rate_changes_from_step_to_step() -> None:
    assert len({float(steps()[f"step{step}.lr"]) for step in range(inputs.STEPS)}) == inputs.STEPS


def test_loss(results: Results, record_property: Record) -> None:
    theirs = [float(steps()[f"step{step}.loss"]) for step in range(inputs.STEPS)]
    record_property("measured", f"{max(abs(a - b) / b for a, b in zip(results[0], theirs, strict=True)):.1e}")
    assert results[0] == pytest.approx(theirs, rel=1e-5)


def test_gradients(results: Results, record_property: Record) -> None:
    """Norms in every step, values in the last. The published mask token 1 has none: it is never used."""
    worst_norm, worst_value = 0.0, 0.0
    for step, gradients in enumerate(results[1]):
        norms = published(f"step{step}.norm.")
        assert gradients.keys() == norms.keys()
        for name, gradient in gradients.items():
            worst_norm = max(worst_norm, abs(float(gradient.double().norm() / norms[name]) - 1))
    for name, gradient in published(f"step{inputs.STEPS - 1}.gradient.").items():
        worst_value = max(worst_value, relative(results[1][-1][name], gradient))
    record_property("measured", f"norms {worst_norm:.1e}, values {worst_value:.1e}")
    assert max(worst_norm, worst_value) <= 1e-4


def test_ema_weights(results: Results, record_property: Record) -> None:
    worst = compare(results[2], "target_encoder")
    record_property("measured", f"{worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("network", ["encoder", "predictor"])
def test_weights(results: Results, network: str, record_property: Record) -> None:
    """Ten times the EMA's: that takes a tenth of each step."""
    worst = compare(results[2], network)
    record_property("measured", f"{worst:.1e}")
    assert worst <= 1e-5


def compare(final: dict[str, Tensor], network: str) -> float:
    """Largest difference of any weight, after all have moved by far more."""
    theirs = checkpoint()[network]
    found = {n.removeprefix(f"{network}."): value for n, value in final.items() if n.startswith(f"{network}.")}
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        start = inputs.weight(f"{network.removeprefix('target_')}.{name}", tuple(value.shape))
        if name != "mask_tokens.1":  # never used
            assert (value - torch.from_numpy(start)).abs().mean() > 1e-4, name
    return max(float((found[name] - value).abs().max()) for name, value in theirs.items())


def published(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in steps().items() if name.startswith(prefix)}
