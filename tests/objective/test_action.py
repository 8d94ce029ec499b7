"""The action-conditioned objective: what its predictor is shown, what it is compared with, and what it leaves alone.

The loss is computed again by hand, in numpy, around a predictor that is a formula. tests/published compares whole steps
with the published code's.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from tests.processes import ENGINE, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.objective.action import ActionConditioned
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.training.step import training_step

pytestmark = pytest.mark.distributed

FRAMES, SIZE, CLIPS, WIDTH = 5, (16, 24), 2, 36  # a grid of 2 × 3 tokens
Floats = npt.NDArray[np.float64]


def recipe(rollout_steps: int = 3, **action: Any) -> Recipe:
    return validate_recipe(
        {
            "run": {"dir": "unused", "seed": 3},
            "data": {"sets": {"arm": {"path": "unused"}}},
            "model": {
                "encoder": {"width": WIDTH, "depth": 2, "heads": 3},
                "action_predictor": {"width": 36, "depth": 2, "heads": 3, "grid": [2, 3]},
                "patch": 8,
            },
            "action": {
                "init_from": "elsewhere",
                "steps": 3,
                "clip": {"frames": FRAMES, "size": SIZE},
                "global_batch": 4,
                "micro_batch": CLIPS,
                "rollout_steps": rollout_steps,
                "phases": [{"name": "all", "start_lr": 1e-3}],
                **action,
            },
        },
        source="test",
    )


def batch(seed: int = 0) -> MicroBatch:
    draw = np.random.default_rng(seed)
    clips = torch.from_numpy(draw.integers(0, 256, (CLIPS, 3, FRAMES, *SIZE), dtype=np.uint8))
    states = torch.from_numpy(draw.normal(size=(CLIPS, FRAMES, 7)).astype(np.float32))
    return MicroBatch(clips, (), 0, range(CLIPS), ("arm",) * CLIPS, extras={"states": states})


class Formula(nn.Module):
    """A predictor that mixes everything it is shown, causally, without weights; it keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor, tuple[int, int]]] = []

    def forward(
        self, tokens: Tensor, actions: Tensor, states: Tensor, cameras: None, *, grid: tuple[int, int]
    ) -> Tensor:
        self.seen.append((tokens, actions, states, grid))
        return torch.from_numpy(formula(tokens.double().numpy(), actions.double().numpy(), states.double().numpy()))


def formula(tokens: Floats, actions: Floats, states: Floats) -> Floats:
    B, K = actions.shape[:2]
    frames = tokens.reshape(B, K, -1, WIDTH)
    moved = np.cumsum(frames * (1 + 0.3 * actions[..., :1, None]), axis=1) + np.sin(
        states[..., 3:4, None] * frames[:, :, ::-1]
    )
    return moved.reshape(B, -1, WIDTH)


def normalised(tokens: Floats) -> Floats:
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def by_objective(ranks: Ranks, rollout_steps: int, exponent: float) -> dict[str, Any]:
    stage = stages_of(recipe(rollout_steps, loss_exponent=exponent))["action"]
    objective = ActionConditioned(stage, build_engine(ENGINE, ranks), {}, {})
    objective.predictor = predictor = Formula()
    found = objective.loss(batch())
    frames = objective._normalised(batch().clips)
    with torch.no_grad():  # each frame alone, a still of the tubelet's two frames
        alone = [objective.encoder(frames[:, :, k : k + 1].repeat(1, 1, 2, 1, 1)) for k in range(FRAMES)]
    tokens = torch.stack(alone, 1).numpy().astype(np.float64)
    return {"loss": {name: float(value) for name, value in found.items()}, "tokens": tokens, "seen": predictor.seen}


CASES = [(1, 1.0), (2, 1.0), (4, 1.0), (3, 2.0)]


def by_objectives(ranks: Ranks) -> dict[tuple[int, float], dict[str, Any]]:
    return {case: by_objective(ranks, *case) for case in CASES}


@pytest.fixture(scope="module")
def found_losses() -> dict[tuple[int, float], dict[str, Any]]:
    return run_processes(by_objectives, 1)[0]


@pytest.mark.parametrize(("rollout_steps", "exponent"), CASES)
def test_the_loss_by_hand(
    rollout_steps: int, exponent: float, found_losses: dict[tuple[int, float], dict[str, Any]]
) -> None:
    """Float32 against float64: 1e-5 relative."""
    from scipy.spatial.transform import Rotation  # here: the ranks do without it, and it takes long to import

    found = found_losses[rollout_steps, exponent]
    states = batch().extras["states"].numpy().astype(np.float64)
    turned = (
        Rotation.from_euler("xyz", states[:, 1:, 3:6].reshape(-1, 3))
        * Rotation.from_euler("xyz", states[:, :-1, 3:6].reshape(-1, 3)).inv()
    )
    actions = np.diff(states, axis=1)
    actions[..., 3:6] = turned.as_euler("xyz").reshape(CLIPS, FRAMES - 1, 3)

    def distance(a: Floats, b: Floats) -> float:
        return float((np.abs(a - b) ** exponent).mean() / exponent)

    def imagined(frames: list[Floats]) -> Floats:
        """What follows some frames."""
        n = len(frames)
        out = formula(np.stack(frames, 1).reshape(CLIPS, -1, WIDTH), actions[:, :n], states[:, :n])
        return normalised(out.reshape(CLIPS, n, -1, WIDTH))

    z = normalised(found["tokens"])
    teacher = distance(imagined([z[:, k] for k in range(FRAMES - 1)]), z[:, 1:])
    dream = [z[:, 0]]
    for _ in range(rollout_steps):
        dream.append(imagined(dream)[:, -1])
    rollout = distance(np.stack(dream[1:], 1), z[:, 1 : rollout_steps + 1])
    expected = {
        "loss": teacher + rollout,
        "teacher_loss": teacher,
        "rollout_loss": rollout,
        "copy_loss": distance(z[:, :-1], z[:, 1:]),
    }
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert len(found["seen"]) == rollout_steps  # teacher forcing gives the first step of the rollout
    assert {grid for *_, grid in found["seen"]} == {(2, 3)}
    assert abs(teacher - rollout) > 0.01 * teacher


def trained(ranks: Ranks, engine_options: dict[str, Any]) -> tuple[list[float], float, bool, float]:
    """Losses of three steps, how much the predictor moved, whether the encoder stayed, and the gradient's norm."""
    engine = build_engine(EngineConfig(**{**ENGINE.model_dump(), **engine_options}), ranks)
    objective = ActionConditioned(stages_of(recipe())["action"], engine, {}, {})
    engine.start_optimizer(recipe().optimizer, objective.trained, objective.settings)

    def whole(name: str) -> list[Tensor]:
        tensors = engine.tensors({name: objective.networks[name]}, optimizer=False)
        return [tensor.full_tensor().clone() for tensor in tensors.values()]  # type: ignore[attr-defined]

    encoder, predictor = whole("encoder"), whole("action_predictor")
    share = range(ranks.rank * 2 // ranks.world_size, (ranks.rank + 1) * 2 // ranks.world_size)
    results = [
        training_step(objective, engine, [batch(2 * step + n) for n in share], lr=1e-3, observe=Observation(["arm"]))
        for step in range(3)
    ]
    still = all(torch.equal(a, b) for a, b in zip(encoder, whole("encoder"), strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(predictor, whole("action_predictor"), strict=True))
    parts = results[0].parts
    assert set(parts) == {"teacher_loss", "rollout_loss", "copy_loss", "collapse/to_copy"}
    assert parts["collapse/to_copy"] == pytest.approx(parts["teacher_loss"] / parts["copy_loss"])
    if ranks.is_main:
        assert results[0].measured is not None
        measured = results[0].measured.result()
        assert set(measured) == {"collapse/to_mean", "update_ratio"}  # a frozen encoder's features do not collapse
        assert min(measured.values()) > 0
    return [result.loss for result in results], moved, still, results[0].grad_norm


ENGINES = {
    "fsdp": ({}, 2),
    "fsdp, checkpointed": ({"activation_checkpointing": "full"}, 1),
    "ZeRO 2": ({"kind": "deepspeed", "zero_stage": 2}, 2),
    "ZeRO 3": ({"kind": "deepspeed", "zero_stage": 3}, 2),
}


@pytest.fixture(scope="module")
def by_one() -> tuple[list[float], float, bool, float]:
    return run_processes(trained, 1, {})[0]


@pytest.mark.parametrize("name", ENGINES)
def test_the_encoder_stays_to_the_bit_and_engines_agree(name: str, by_one: Any) -> None:
    """Losses within 1e-5 and the gradient's norm within 1e-4 relative: float32 sums in another order."""
    options, world_size = ENGINES[name]
    losses, moved, still, norm = run_processes(trained, world_size, options)[0]
    assert still
    assert moved > 1e-4
    assert losses[0] > losses[-1]
    assert losses == pytest.approx(by_one[0], rel=1e-5)
    assert norm == pytest.approx(by_one[3], rel=1e-4)
    assert by_one[2]
