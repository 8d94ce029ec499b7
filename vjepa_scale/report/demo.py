"""What the demo measures of its run: held-out clips, surprise, episodes with the robot; and pictures of planning."""

from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.robot import Reach, Robot
from vjepa_scale.data.robot_world import RobotWorld
from vjepa_scale.inference.model import load_model
from vjepa_scale.planning import PlanConfig, WorldModel, draw_landscape, load_world_model
from vjepa_scale.recipe import Recipe
from vjepa_scale.report.closed_loop import evaluate_planning, planner, play
from vjepa_scale.report.episode import draw_episode
from vjepa_scale.report.held_out import measure
from vjepa_scale.report.summary import summarise
from vjepa_scale.report.surprise import surprise_of_pairs

# How they were found: docs/learning.md.
PLAN = PlanConfig(samples=32, elites=4, iterations=4, horizon=1, max_translation_m=0.06, max_gripper=0.0)
REACH = Reach()
SURPRISE_PAIRS = 60


def measure_demo(
    recipe: Recipe, train: Path, val: Path, *, untrained: Path, episodes: int, seed: int
) -> dict[str, Any]:
    """The demo's summary.json; writes ``pictures/`` into the run folder.

    seed: of the worlds, whose episodes show scenes that no training trajectory has
    """
    run = Path(recipe.run.dir)
    model = load_world_model(run / "world_model")
    world = RobotWorld(size=model.size[0])
    held_out = measure(recipe, run / "consolidated", Manifest.open(train), Manifest.open(val))
    planning = evaluate_planning(model, world, REACH, PLAN, seed=seed, episodes=episodes)
    # Of pretraining, whose predictor has learned at its clips for longest.
    surprise = surprise_of_pairs(load_model(run / "pretrain"), seed=seed, pairs=SURPRISE_PAIRS)
    draw_planning(run / "pictures", model, world, seed=seed)
    return summarise(
        recipe,
        held_out,
        untrained=untrained,
        planning=planning,
        surprise=surprise,
        files={"run": recipe.run.dir, "consolidated": str(run / "consolidated")},
    )


def draw_planning(folder: Path, model: WorldModel, world: RobotWorld, *, seed: int, episode: int = 0) -> None:
    """``landscape.png``: energies over the first action's x and y; ``episode.png``: the whole episode."""
    folder.mkdir(exist_ok=True)
    robot = Robot(world, REACH, seed=seed, episodes=[episode])
    start, goal = robot.pictures(), robot.pictures(robot.goals)
    limit = 2 * PLAN.max_translation_m
    landscape = model.landscape(start[0], robot.states[0], goal[0], axes=(0, 1), limits=(limit, limit), points=17)
    planned = model.plan(start, robot.states, goal, PLAN, seed=seed).actions[0, 0]
    draw_landscape(
        folder / "landscape.png",
        landscape,
        true_7=np.clip(robot.goals[0] - robot.states[0], -limit, limit),
        planned_7=planned,
        title="Energy of the first action",
    )
    states = play(robot, planner(model, PLAN, robot, seed))
    distances = np.linalg.norm(states[:, 0, :3] - robot.goals[0, :3], axis=1)
    pictures = np.stack([robot.pictures(state)[0] for state in states])
    draw_episode(folder / "episode.png", pictures, goal[0], distances, title="A planned episode")
