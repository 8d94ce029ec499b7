"""Closed-loop episodes of the synthetic robot: measures how often it reaches the state in a goal picture.

In each episode the hand has a start and a goal picture. At every step a world model plans from the current camera
picture, and the first action is executed. Baselines are the same episodes with random actions of the same size, and
without actions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.trajectories import Floats
from vjepa_scale.demo.robot import Reach, Robot
from vjepa_scale.demo.robot_world import RobotWorld
from vjepa_scale.planning import PlanConfig, WorldModel

Policy = Callable[[Robot, int], Floats]


def play(robot: Robot, policy: Policy) -> Floats:
    """Executes the actions of a policy, (robot, step) -> [B, 7]; returns all states, [steps + 1, B, 7]."""
    states = [robot.states]
    for step in range(robot.reach.steps):
        states.append(robot.step(policy(robot, step)))
    return np.stack(states)


def planner(model: WorldModel, config: PlanConfig, robot: Robot, seed: int) -> Policy:
    """Returns the policy of a world model with pictures of the goals."""
    goals = model.encode(robot.pictures(robot.goals))

    def first_actions(robot: Robot, step: int) -> Floats:
        # One seed per episode and step, so that an episode does not depend on the other episodes of the batch.
        seeds = [KeyedRng(seed, "closed loop", step, episode).integer(2**31) for episode in robot.episodes]
        plan = model.plan(robot.pictures(), robot.states, goals, config, seed=seeds)
        actions: Floats = plan.actions[:, 0].double().cpu().numpy()
        return actions

    return first_actions


def at_random(config: PlanConfig, seed: int) -> Policy:
    """Returns the policy of uniform random actions within the planner's limits."""

    def actions(robot: Robot, step: int) -> Floats:
        draws = [KeyedRng(seed, "random policy", step, episode).uniforms(7) for episode in robot.episodes]
        return (2 * np.stack(draws) - 1) * np.array(config.limits)

    return actions


def do_nothing(robot: Robot, step: int) -> Floats:
    return np.zeros((len(robot.states), 7))


def evaluate_planning(
    model: WorldModel, world: RobotWorld, reach: Reach, config: PlanConfig, *, seed: int, episodes: int
) -> dict[str, Any]:
    """Returns the share of episodes that end at the goal, and the remaining distances.

    seed: of the episodes, whose scenes are in no training trajectory
    """

    def fresh() -> Robot:
        return Robot(world, reach, seed=seed, episodes=range(episodes))

    first = fresh()
    policies = {"success": planner(model, config, first, seed), "random": at_random(config, seed), "still": do_nothing}
    shares: dict[str, Any] = {}
    left: dict[str, float] = {}
    for name, policy in policies.items():
        robot = fresh()
        play(robot, policy)
        shares[name] = float(robot.reached().mean())
        left[name] = float(np.median(robot.distances_m()))
    return {
        **shares,
        "episodes": episodes,
        "steps": reach.steps,
        "radius_m": reach.radius_m,
        "median_start_m": float(np.median(first.distances_m())),
        "median_left_m": left,
    }
