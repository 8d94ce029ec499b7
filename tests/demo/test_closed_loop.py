"""Episodes in closed loop, with a planner that knows the way in place of a model."""

from typing import Any

import numpy as np
import pytest
import torch

from vjepa_scale.demo.closed_loop import at_random, evaluate_planning, play
from vjepa_scale.demo.robot import Reach, Robot
from vjepa_scale.demo.robot_world import RobotWorld
from vjepa_scale.planning import Plan, PlanConfig

WORLD, REACH = RobotWorld(size=16), Reach(steps=6)
CONFIG = PlanConfig(horizon=1, max_translation_m=0.06, max_gripper=0.0)


class KnowsTheWay:
    """A world model whose plans are right, or the other way round; it tells where the hand is by its state alone."""

    def __init__(self, seed: int, sense: float) -> None:
        self.seed, self.sense = seed, sense
        self.seen: list[Any] = []

    def encode(self, pictures: Any) -> torch.Tensor:
        self.seen.append(pictures)
        return torch.zeros(len(pictures), 1, 1)

    def plan(self, pictures: Any, states: Any, goals: Any, config: PlanConfig, *, seed: Any) -> Plan:
        self.seen.append(pictures)
        there = Robot(WORLD, REACH, seed=self.seed, episodes=range(len(states))).goals
        away = np.clip(self.sense * (there - states), -config.max_translation_m, config.max_translation_m)
        actions = torch.from_numpy(away)[:, None]
        return Plan(actions, *(torch.empty(0),) * 4)


@pytest.mark.parametrize(("sense", "success"), [(1.0, 1.0), (-1.0, 0.0)])
def test_success_is_where_the_hand_ends(sense: float, success: float) -> None:
    model = KnowsTheWay(5, sense)
    found = evaluate_planning(model, WORLD, REACH, CONFIG, seed=5, episodes=12)  # type: ignore[arg-type]
    assert found["success"] == success
    assert found["still"] == 0
    assert found["random"] <= 0.25
    assert (found["episodes"], found["steps"], found["radius_m"]) == (12, 6, 0.05)
    assert 0.15 <= found["median_start_m"] <= 0.25
    assert (found["median_left_m"]["success"] < 0.05) == (sense > 0)
    assert found["median_left_m"]["still"] == found["median_start_m"]
    assert len(model.seen) == 1 + REACH.steps  # the goals once, then what is seen at every step
    first = Robot(WORLD, REACH, seed=5, episodes=range(12))
    np.testing.assert_array_equal(model.seen[0], first.pictures(first.goals))
    np.testing.assert_array_equal(model.seen[1], first.pictures())


def test_an_episode_does_not_depend_on_how_many_are_played() -> None:
    few, many = (Robot(WORLD, REACH, seed=2, episodes=range(n)) for n in (2, 5))
    of_few, of_many = (play(robot, at_random(CONFIG, seed=9)) for robot in (few, many))
    np.testing.assert_array_equal(of_few, of_many[:, :2])
    moved = np.abs(np.diff(of_many, axis=0))
    assert moved[..., :3].max() <= CONFIG.max_translation_m + 1e-12
    assert moved[..., :3].max() > 0.05
    assert moved[..., 3:].max() == pytest.approx(0, abs=1e-12)
