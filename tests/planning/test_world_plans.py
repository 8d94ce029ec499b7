"""Planning and landscapes with a model: what is planned is what it imagines, and a known best action is found."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.planning.material import BATCH, PLACES, WIDTH, bits_equal, drawn, poses
from vjepa_scale.core.errors import UserError
from vjepa_scale.planning import PlanConfig, WorldModel
from vjepa_scale.planning import world as world_module

QUICK = PlanConfig(samples=40, elites=6, iterations=4)


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 36, 64, 3), dtype=np.uint8)


class Formula(nn.Module):
    """In place of a trained network: tokens say where the hand and the gripper are after the last action."""

    extrinsics = False

    def __init__(self) -> None:
        super().__init__()
        self.still, self.basis = drawn(PLACES, WIDTH), drawn(4, PLACES, WIDTH, seed=1)

    def tokens_at(self, states_B7: Tensor) -> Tensor:
        moved = torch.einsum("bi,ind->bnd", states_B7[:, [0, 1, 2, 6]], self.basis)
        return F.layer_norm(self.still + moved, (WIDTH,))

    def forward(self, tokens: Tensor, actions: Tensor, states: Tensor, camera: None, *, grid: object) -> Tensor:
        return torch.cat([tokens[:, :-PLACES], self.tokens_at(states[:, -1] + actions[:, -1])], dim=1)


@pytest.fixture
def formula(world: WorldModel, monkeypatch: pytest.MonkeyPatch) -> Formula:
    """Of ``world``, while a test lasts."""
    network = Formula()
    monkeypatch.setitem(world.__dict__, "predictor", network)
    return network


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_best_action_is_found(world: WorldModel, formula: Formula, horizon: int) -> None:
    states = drawn(3, 7, seed=4, scale=0.3)
    states[:, 6] = torch.tensor([0.2, 0.9, 0.5])
    moves = torch.tensor([[0.03, -0.04, 0.01, 0, 0, 0, 0.5], [-0.02, 0.0, 0.045, 0, 0, 0, -0.6], [0.0] * 7])
    goals = formula.tokens_at(states + moves)
    plan = world.plan(formula.tokens_at(states), states, goals, PlanConfig(horizon=horizon, iterations=12))
    # Where it ends, whatever the way: 2 mm, and 1 % of the gripper's range.
    ended = plan.states[:, -1] - states
    assert (ended - moves)[:, :3].abs().max() < 2e-3
    assert (ended - moves)[:, 6].abs().max() < 1e-2
    still = world.energy(formula.tokens_at(states), goals)
    assert (plan.energy[:2] < 0.05 * still[:2]).all()
    if horizon == 1:
        assert (plan.actions[:, 0] - moves).abs().max() < 1e-2


def test_the_lowest_place_of_a_landscape_is_the_true_action(world: WorldModel, formula: Formula) -> None:
    state = drawn(7, seed=4, scale=0.3)
    goal = formula.tokens_at((state + torch.tensor([0.03, 0, -0.02, 0, 0, 0, 0]))[None])
    found = world.landscape(formula.tokens_at(state[None]), state, goal, axes=(0, 2), points=11)
    assert found.energies.shape == (11, 11)
    assert found.lowest == pytest.approx((0.03, -0.02), abs=1e-6)


@pytest.mark.parametrize("with_camera", [False, True])
def test_a_plan_is_better_than_doing_nothing(world: WorldModel, camera_world: WorldModel, with_camera: bool) -> None:
    """With random weights; and all that it says of itself is what the model imagines of its actions."""
    model = camera_world if with_camera else world
    now, goals, states = pictures(BATCH, 0), pictures(BATCH, 1), poses(1)[1][:, 0]
    camera = drawn(BATCH, 6, seed=9) if with_camera else None
    plan = model.plan(now, states, goals, QUICK, seed=3, extrinsics=camera)
    assert plan.actions.shape == (BATCH, 2, 7)
    imagined, reached = model.rollout(model.encode(now), states, plan.actions, camera)
    torch.testing.assert_close(plan.tokens, imagined, rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.states, reached, rtol=0, atol=1e-6)
    energy = model.energy(imagined[:, -1], model.encode(goals))
    torch.testing.assert_close(plan.energy, energy, rtol=1e-5, atol=0)
    nothing, _ = model.rollout(model.encode(now), states, torch.zeros(BATCH, 2, 7), camera)
    assert (plan.energy < model.energy(nothing[:, -1], model.encode(goals))).all()
    assert (plan.energy < plan.energies[:, 0].mean(dim=1)).all()


def margin(energies_BIS: Tensor, elites: int) -> float:
    """By how much the last elite is better than the best sequence that is none, in the closest iteration."""
    ordered = energies_BIS.sort(dim=-1).values
    return float((ordered[..., elites] - ordered[..., elites - 1]).min())


def test_episodes_do_not_depend_on_each_other_nor_on_how_many_fit(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other batch sizes round otherwise, by some 1e-6 here, and a swapped elite moves a plan by 1e-2: so energies are
    spread out (larger weights), and the draws are of a seed whose elites are chosen by more than rounding."""
    lively = copy.deepcopy(world.predictor)
    for parameter in lively.parameters():
        parameter.mul_(16 if parameter.ndim == 2 else 1)
    monkeypatch.setitem(world.__dict__, "predictor", lively)
    now, goals, states = pictures(BATCH, 0), pictures(BATCH, 1), poses(1)[1][:, 0]
    plans = ((seed, world.plan(now, states, goals, QUICK, seed=seed)) for seed in range(100))
    seed, together = next(found for found in plans if margin(found[1].energies, QUICK.elites) > 2e-5)

    assert bits_equal(world.plan(now, states, goals, QUICK, seed=seed).actions, together.actions)
    assert not bits_equal(world.plan(now, states, goals, QUICK, seed=seed + 1).actions, together.actions)
    for one in range(BATCH):
        alone = world.plan(now[one], states[one], goals[one], QUICK, seed=[seed])
        torch.testing.assert_close(alone.energies[0], together.energies[one], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.actions[0], together.actions[one], rtol=0, atol=1e-4)
    monkeypatch.setattr(world_module, "_TOKENS_AT_ONCE", 7 * 2 * (PLACES + 2))
    assert world._rows(2) == 7
    torch.testing.assert_close(
        world.plan(now, states, goals, QUICK, seed=seed).actions, together.actions, rtol=0, atol=1e-4
    )
    # One goal for all; and tokens for pictures.
    shared = world.plan(now, states, goals[:1], QUICK, seed=seed)
    torch.testing.assert_close(shared.actions[0], together.actions[0], rtol=0, atol=1e-4)
    tokens = world.plan(world.encode(now), states, world.encode(goals), QUICK, seed=seed)
    assert bits_equal(tokens.actions, together.actions)


def test_a_landscape_is_energies_of_actions(world: WorldModel) -> None:
    now, goal, state = pictures(1, 0), pictures(1, 1), poses(1)[1][:1, 0]
    around = drawn(2, 7, seed=8, scale=0.1)
    found = world.landscape(now, state[0], goal, axes=(6, 4), limits=(0.5, 0.2), points=3, around=around)
    assert [values.tolist() for values in found.values] == [
        pytest.approx([-0.5, 0, 0.5]),
        pytest.approx([-0.2, 0, 0.2]),
    ]
    for i, first in enumerate((-0.5, 0.0, 0.5)):
        for j, second in enumerate((-0.2, 0.0, 0.2)):
            actions = around.clone()[None]
            actions[0, 0, 6], actions[0, 0, 4] = first, second
            imagined, _ = world.rollout(world.encode(now), state, actions)
            energy = world.energy(imagined[:, -1], world.encode(goal))
            assert float(found.energies[i, j]) == pytest.approx(float(energy), rel=1e-5)


def test_input_that_does_not_fit(world: WorldModel, camera_world: WorldModel) -> None:
    now, goals, states = pictures(BATCH, 0), pictures(BATCH, 1), poses(1)[1][:, 0]
    camera = drawn(BATCH, 6)
    one = (now[0], states[0], goals[0])
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: world.plan(now, states[0], goals), r"plan states: shape \[7\]"),
        (lambda: world.plan(now, states[:1], goals), r"plan states: shape \[1, 7\]"),
        (lambda: world.plan(now, "here", goals), "plan states: a str that is no array"),
        (lambda: world.plan(now, states, pictures(3, 1)), "plan goals: tokens of shape"),
        (lambda: world.plan(world.encode(now)[:, 1:], states, goals), "plan pictures: tokens of shape"),
        (lambda: world.plan(now.astype(np.float64), states, goals), "encode: pictures of shape"),
        (lambda: world.plan(now, states, goals, seed=[1, 2, 3]), "plan seed: 3 seeds"),
        (lambda: world.plan(now, states, goals, extrinsics=camera), "plan: extrinsics given"),
        (lambda: camera_world.plan(now, states, goals), "plan: extrinsics missing"),
        (lambda: camera_world.plan(now, states, goals, extrinsics=camera[0]), "plan extrinsics: shape"),
        (lambda: world.plan(now, states, goals, replace(QUICK, elites=1)), "elites"),
        (lambda: world.landscape(now, states, goals), "landscape: 2 episodes"),
        (lambda: world.landscape(*one, axes=(1, 1)), r"landscape: .*axes \(1, 1\)"),
        (lambda: world.landscape(*one, axes=(1, 7)), r"landscape: .*axes \(1, 7\)"),
        (lambda: world.landscape(*one, points=1), "landscape: .*1 points"),
        (lambda: world.landscape(*one, around=drawn(2, 6)), "landscape around: shape"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
