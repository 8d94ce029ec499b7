"""The planner on energies whose best actions are known, by hand-written numpy, and beside the published planner."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.planning.worlds import Bowl, Reach, some_states
from tests.published import inputs
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.poses import states_along
from vjepa_scale.planning import cem
from vjepa_scale.planning.cem import Imagined, PlanConfig, cross_entropy_plan

PUBLISHED = json.loads((Path(inputs.__file__).parent / "plans.json").read_text())
ONE = PlanConfig(horizon=1)


def bests(count: int, seed: int = 0) -> Tensor:
    """Best first actions inside the published limits, the gripper's well above what counts as still."""
    draw = torch.rand(count, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    best = draw * torch.tensor([0.05, 0.05, 0.05, 0, 0, 0, 0.4])
    best[:, 6] += 0.3 * best[:, 6].sign()
    return best


@pytest.mark.parametrize("horizon", [1, 2])
def test_every_episode_finds_its_own_best_action(horizon: int) -> None:
    best = bests(8)
    # A millimetre: the energy of all numbers together is one sum, in which the gripper's are ten times as large.
    config = PlanConfig(horizon=horizon, samples=800, iterations=15)
    plan = cross_entropy_plan(Bowl(best), some_states(8), config, seed=0)
    assert plan.actions.shape == (8, horizon, 7)
    found = plan.actions[:, 0]
    assert (found - best)[:, :3].abs().max() < 1e-3
    assert (found - best)[:, 6].abs().max() < 5e-3
    assert (found[:, 3:6] == 0).all()
    assert plan.energies.shape == (8, 15, 800)
    medians = plan.energies.median(2).values
    assert (medians[:, -1] < 0.01 * medians[:, 0]).all()
    assert (plan.energy < plan.energies[:, 0].min(1).values).all()


def test_only_the_last_frame_counts() -> None:
    """A goal out of one step's reach is reached in two; which of the two goes how far is free."""
    states = some_states(6)
    offsets = torch.tensor([0.08, -0.07, 0.06, 0.0])
    goal = states[:, [0, 1, 2, 6]] + offsets * torch.tensor([[1.0], [-1]]).repeat(3, 1)
    plan = cross_entropy_plan(Reach(goal), states, PlanConfig(), seed=1)
    assert (plan.states[:, -1, :3] - goal[:, :3]).abs().max() < 5e-3
    one = cross_entropy_plan(Reach(goal), states, ONE, seed=1)
    assert (one.actions[:, 0, :3].abs() > 0.049).all(), "as far as it may, the right way"
    assert (one.actions[:, 0, :3].sign() == (goal - states[:, [0, 1, 2, 6]])[:, :3].sign()).all()


def test_what_is_imagined_under_the_plan() -> None:
    states, world = some_states(3), Bowl(bests(3))
    plan = cross_entropy_plan(world, states, replace(ONE, horizon=3, samples=50), seed=0)
    assert torch.equal(plan.states, states_along(states, plan.actions))
    assert torch.equal(plan.tokens, plan.states[:, 1:, None])
    every = torch.arange(3)
    assert torch.equal(plan.energy, world(states, plan.actions, every).energy)


def test_limits_hold() -> None:
    seen = []

    class Watched(Bowl):
        def __call__(self, states: Tensor, actions: Tensor, episodes: Tensor) -> Imagined:
            seen.append(actions)
            return super().__call__(states, actions, episodes)

    config = PlanConfig(max_translation_m=0.03, max_rotation_rad=0.1, max_gripper=0.6, samples=100)
    plan = cross_entropy_plan(Watched(torch.full((2, 7), 9.0)), some_states(2), config, seed=0)
    largest = torch.cat([*seen, plan.actions]).abs().amax((0, 1))
    assert largest.tolist() == pytest.approx([0.03] * 3 + [0.1] * 3 + [0.6])
    reached = plan.actions[:, 0] / torch.tensor(config.limits)
    assert reached.min() > 0.97, "the best is out of reach: as far as it goes"
    seen.clear()
    cross_entropy_plan(Watched(torch.full((2, 7), 9.0)), some_states(2), PlanConfig(samples=100), seed=0)
    assert (torch.cat(seen)[..., 3:6] == 0).all(), "no rotation unless it is asked for"


def test_rotations_are_planned_where_they_may_be() -> None:
    best = torch.tensor([[0.02, 0, 0, 0.1, -0.05, 0.15, 0.5], [0, 0, 0, -0.15, 0.1, 0, -0.5]])
    config = PlanConfig(horizon=1, max_rotation_rad=0.2, samples=800, iterations=20)
    plan = cross_entropy_plan(Bowl(best), some_states(2), config, seed=0)
    assert (plan.actions[:, 0] - best).abs().max() < 5e-3


def test_the_same_seed_the_same_plan() -> None:
    world, states = Bowl(bests(2)), some_states(2)
    config = replace(ONE, samples=60, iterations=3)
    first = cross_entropy_plan(world, states, config, seed=5)
    assert torch.equal(first.actions, cross_entropy_plan(world, states, config, seed=5).actions)
    assert torch.equal(first.energies, cross_entropy_plan(world, states, config, seed=5).energies)
    assert not torch.equal(first.actions, cross_entropy_plan(world, states, config, seed=6).actions)


@pytest.mark.parametrize("rows", [7, 100, 4096])
def test_episodes_do_not_influence_each_other(rows: int) -> None:
    best, states = bests(5), some_states(5)
    config = replace(ONE, samples=60, iterations=4)
    seeds = [3, 1, 4, 1, 5]
    world = Bowl(best)
    together = cross_entropy_plan(world, states, config, seed=seeds, rows=rows)
    assert max(world.calls) == min(rows, 5 * 60)
    assert sum(world.calls) == 5 * 60 * 4 + 5
    for i, seed in enumerate(seeds):
        alone = cross_entropy_plan(Bowl(best[i : i + 1]), states[i : i + 1], config, seed=seed)
        assert (alone.actions[0] - together.actions[i]).abs().max() < 1e-7
        assert (alone.energies[0] - together.energies[i]).abs().max() < 1e-7
    shared = cross_entropy_plan(Bowl(best), states, config, seed=3, rows=rows)
    assert (shared.actions[0] - together.actions[0]).abs().max() < 1e-7


def test_draws_are_standard_normal_and_differ() -> None:
    noise = cem._noise([0, 1], 0, 4000, 2).numpy()
    assert noise.shape == (2, 4000, 2, 7)
    rows = noise.transpose(0, 2, 3, 1).reshape(28, 4000)
    assert np.abs(rows.mean(1)).max() < 4 / 4000**0.5
    assert np.abs(rows.var(1) - 1).max() < 4 * (2 / 4000) ** 0.5
    correlation = np.corrcoef(rows) - np.eye(28)
    assert np.abs(correlation).max() < 5 / 4000**0.5
    inside = [(np.abs(rows) < k).mean() for k in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=3e-3)
    assert np.array_equal(cem._noise([0], 0, 3, 2).numpy(), noise[:1, :3]), "fewer samples are the first of more"
    assert not np.array_equal(cem._noise([0], 1, 3, 2).numpy(), noise[:1, :3])


def test_mean_and_deviation_keep_their_momentum() -> None:
    """Two iterations by hand: the second draws around what the first left."""
    config = PlanConfig(samples=30, elites=4, iterations=2, horizon=2, momentum_mean=0.3, momentum_std=0.6)
    best, states = bests(1, seed=3), some_states(1)
    plan = cross_entropy_plan(Bowl(best), states, config, seed=11)
    mean = np.zeros((2, 7))
    std = np.tile([0.05, 0.05, 0.05, 0, 0, 0, 1.0], (2, 1))
    limit = np.array([0.05, 0.05, 0.05, 0, 0, 0, 0.75])
    for iteration in range(2):
        drawn = np.clip(mean + std * cem._noise([11], iteration, 30, 2)[0].numpy(), -limit, limit)
        energy = ((drawn[:, 0] - best[0].numpy()) ** 2).sum(1) + (drawn[:, 1] ** 2).sum(1)
        assert plan.energies[0, iteration].numpy() == pytest.approx(energy, abs=1e-5)
        elites = drawn[np.argsort(energy)[:4]]
        mean = 0.3 * mean + 0.7 * elites.mean(0)
        std = 0.6 * std + 0.4 * elites.std(0, ddof=1)
    mean[np.abs(mean[:, 6]) < 0.25, 6] = 0
    assert plan.actions[0].numpy() == pytest.approx(mean, abs=1e-6)


def test_a_small_motion_of_the_gripper_is_none() -> None:
    best = torch.zeros(4, 7)
    best[:, 6] = torch.tensor([0.15, -0.15, 0.4, -0.4])
    plan = cross_entropy_plan(Bowl(best), some_states(4), replace(ONE, samples=800), seed=0)
    assert plan.actions[:2, 0, 6].tolist() == [0, 0]
    assert plan.actions[2:, 0, 6].tolist() == pytest.approx([0.4, -0.4], abs=0.02)
    free = cross_entropy_plan(Bowl(best), some_states(4), replace(ONE, samples=800, still_gripper=0.0), seed=0)
    assert free.actions[:, 0, 6].tolist() == pytest.approx(best[:, 6].tolist(), abs=0.02)


@pytest.mark.parametrize("name", inputs.PLAN_CASES)
def test_plans_are_the_published_planners(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same world with the same draws."""
    case = inputs.PLAN_CASES[name]

    def noise(seeds: list[int], iteration: int, samples: int, horizon: int) -> Tensor:
        drawn = torch.zeros(1, samples, horizon, 7)
        for step in range(horizon):
            drawn[0, :, step, [0, 1, 2, 6]] = torch.from_numpy(inputs.plan_noise(name, iteration, step))
        return drawn

    def world(states: Tensor, actions: Tensor, episodes: Tensor) -> Imagined:
        along, frames = states_along(states, actions), [torch.zeros(len(actions), *inputs.PLAN_FRAME)]
        for step in range(case.horizon):
            arrays = [t.double().numpy() for t in (frames[-1], actions[:, step], along[:, step])]
            frames.append(torch.from_numpy(inputs.plan_world(arrays[0], arrays[1], arrays[2])).float())
        goal = torch.from_numpy(inputs.plan_goal(name)).float()
        return Imagined((frames[-1] - goal).abs().mean((1, 2)), torch.stack(frames[1:], 1), along)

    monkeypatch.setattr(cem, "_noise", noise)
    config = PlanConfig(
        samples=case.samples,
        elites=case.elites,
        iterations=case.iterations,
        horizon=case.horizon,
        max_translation_m=case.max_translation,
        momentum_mean=case.momentum,
        momentum_std=case.momentum,
    )
    plan = cross_entropy_plan(world, torch.from_numpy(inputs.plan_start(name))[None], config, seed=0)
    assert plan.actions[0].numpy() == pytest.approx(np.array(PUBLISHED[name]), abs=1e-6)


def test_a_broken_world_is_named() -> None:
    def broken(states: Tensor, actions: Tensor, episodes: Tensor) -> Imagined:
        imagined = Bowl(bests(3))(states, actions, episodes)
        energy = torch.where(episodes == 2, torch.nan, imagined.energy)
        return imagined._replace(energy=energy)

    with pytest.raises(UserError, match="planning, episode 2: the energy of what is imagined is not a number"):
        cross_entropy_plan(broken, some_states(3), replace(ONE, samples=20), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elites": 1}, "plan.elites: 1 does not plan .between 2 and samples"),
        ({"samples": 9}, "plan.elites: 10 does not plan"),
        ({"horizon": 0}, "plan.horizon: 0"),
        ({"iterations": 0}, "plan.iterations: 0"),
        ({"momentum_std": 1.0}, "plan.momentum_std: 1.0"),
        ({"max_translation_m": float("nan")}, "plan.max_translation_m: nan"),
        ({"max_gripper": 2.0}, "plan.max_gripper: 2.0"),
    ],
)
def test_settings_that_do_not_plan(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanConfig(**change)
