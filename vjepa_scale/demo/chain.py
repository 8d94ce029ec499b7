"""What the demo measures of its run: held-out clips, surprise, episodes with the robot; and pictures of planning."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.demo.closed_loop import evaluate_planning, planner, play
from vjepa_scale.demo.episode import draw_episode
from vjepa_scale.demo.held_out import measure, untrained_encoder
from vjepa_scale.demo.pictures import draw_features, draw_masks
from vjepa_scale.demo.robot import Reach, Robot
from vjepa_scale.demo.robot_world import RobotWorld
from vjepa_scale.demo.summary import summarise
from vjepa_scale.demo.surprise import surprise_of_pairs
from vjepa_scale.demo.synthetic import U8, world_of
from vjepa_scale.inference.model import load_model
from vjepa_scale.masking.draw import drawn_masks
from vjepa_scale.planning import PlanConfig, WorldModel, draw_landscape, load_world_model
from vjepa_scale.recipe import Recipe, stages_of

# How they were found: docs/learning.md.
PLAN = PlanConfig(samples=48, elites=4, iterations=2, horizon=1, max_translation_m=0.06, max_gripper=0.0)
REACH = Reach()
SURPRISE_PAIRS = 40


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
    shapes = world_of(train.parent.parent / "videos")
    surprise = surprise_of_pairs(load_model(run / "pretrain"), shapes, seed=seed, pairs=SURPRISE_PAIRS)
    draw_planning(run / "pictures", model, world, seed=seed)
    draw_what_is_seen(recipe, run / "consolidated", Manifest.open(val), run / "pictures")
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


def draw_what_is_seen(recipe: Recipe, consolidated: Path, clips: Manifest, folder: Path) -> None:
    """``masks.png``: what pretraining shows and asks for; ``features.png``: the features of three clips."""
    pretrain = stages_of(recipe)["pretrain"].phases[0]
    grid = pretrain.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=pretrain.frames)
    drawn = drawn_masks(recipe.masks, seed=recipe.run.seed, step=0, slots=range(1), grid=grid)
    masks = {f"generator {number}": pair for number, pair in enumerate(drawn, start=1)}
    (shown,) = _middles(clips, recipe, frames=pretrain.frames, size=pretrain.size, records=[0])
    draw_masks(folder / "masks.png", _pictures(shown), masks, grid)

    model = load_model(consolidated)
    T, size = model.config.frames, model.config.size
    records = [0, clips.records // 3 + 1, 2 * clips.records // 3 + 2]  # of three classes: labels take turns
    several = _middles(clips, recipe, frames=T, size=size, records=records)
    encoders = {"trained": model.encoder, "untrained": untrained_encoder(recipe)}
    with torch.no_grad():
        tokens = {name: encoder(model.normalise(several)) for name, encoder in encoders.items()}
    t, (h, w) = T // recipe.model.tubelet, (side // recipe.model.patch for side in size)
    draw_features(folder / "features.png", _pictures(several), tokens, (t, h, w))


def _middles(clips: Manifest, recipe: Recipe, *, frames: int, size: tuple[int, int], records: list[int]) -> Tensor:
    """The middle of some records: uint8 [n, 3, T, H, W]."""
    (shown,) = evaluation_clips(
        clips, frames=frames, size=size, fps=recipe.data.fps, batch=len(records), records=records, workers=0
    )
    return shown.clips


def _pictures(clips: Tensor) -> U8:
    """[…, 3, T, H, W] -> […, T, H, W, 3]"""
    pictures: U8 = clips.movedim(-4, -1).numpy()
    return pictures
