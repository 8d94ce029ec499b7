"""Summary of a finished run: training, accuracy of the frozen encoder, and success of planning with a robot.

Measures held-out clips, surprise and episodes with the robot, and draws masks, features and a planned episode.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.checkpoint.evaluations import in_words, results_of
from vjepa_scale.core.files import read_json, read_jsonl
from vjepa_scale.data.clips import short_videos
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.demo.closed_loop import evaluate_planning, planner, play
from vjepa_scale.demo.held_out import NAMES, measure, untrained_encoder
from vjepa_scale.demo.pictures import draw_episode, draw_features, draw_masks
from vjepa_scale.demo.robot import Reach, Robot
from vjepa_scale.demo.robot_world import RobotWorld
from vjepa_scale.demo.surprise import surprise_of_pairs
from vjepa_scale.demo.synthetic import U8, world_of
from vjepa_scale.inference.model import load_model
from vjepa_scale.masking.generator import drawn_masks
from vjepa_scale.planning import PlanConfig, WorldModel, draw_landscape, load_world_model
from vjepa_scale.recipe import Recipe, Stage, stages_of
from vjepa_scale.recipe.stage import EVALUATION

# docs/learning.md explains how these were chosen.
PLAN = PlanConfig(samples=48, elites=4, iterations=2, horizon=1, max_translation_m=0.06, max_gripper=0.0)
REACH = Reach()
SURPRISE_PAIRS = 40


def measure_demo(
    recipe: Recipe, train: Path, val: Path, *, untrained: Path, episodes: int, seed: int
) -> dict[str, Any]:
    """Returns the content of the demo's summary.json; writes ``pictures/`` into the run folder.

    seed: of the worlds; scenes of the episodes are in no training trajectory
    """
    run = Path(recipe.run.dir)
    model = load_world_model(run / "world_model")
    world = RobotWorld(size=model.size[0])
    held_out = measure(recipe, run / "consolidated", Manifest.open(train), Manifest.open(val))
    planning = evaluate_planning(model, world, REACH, PLAN, seed=seed, episodes=episodes)
    # Uses pretraining, because its predictor was trained longest at its clip geometry.
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
    """Draws ``landscape.png``, energies over the first action's x and y, and ``episode.png``, the whole episode."""
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
    """Draws ``masks.png``, context and targets of pretraining, and ``features.png``, the features of three clips."""
    pretrain = stages_of(recipe)["pretrain"].phases[0]
    grid = pretrain.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=pretrain.frames)
    drawn = drawn_masks(recipe.masks, seed=recipe.run.seed, step=0, slots=range(1), grid=grid)
    masks = {f"generator {number}": pair for number, pair in enumerate(drawn, start=1)}
    (shown,) = _middles(clips, recipe, frames=pretrain.frames, size=pretrain.size, records=[0])
    draw_masks(folder / "masks.png", _pictures(shown), masks, grid)

    model = load_model(consolidated)
    T, size = model.config.frames, model.config.size
    records = [0, clips.records // 3 + 1, 2 * clips.records // 3 + 2]  # of three classes, because labels alternate
    several = _middles(clips, recipe, frames=T, size=size, records=records)
    encoders = {"trained": model.encoder, "untrained": untrained_encoder(recipe)}
    with torch.no_grad():
        tokens = {name: encoder(model.normalise(several)) for name, encoder in encoders.items()}
    t, (h, w) = T // recipe.model.tubelet, (side // recipe.model.patch for side in size)
    draw_features(folder / "features.png", _pictures(several), tokens, (t, h, w))


def _middles(clips: Manifest, recipe: Recipe, *, frames: int, size: tuple[int, int], records: list[int]) -> Tensor:
    """Decodes the middle of some records: uint8 [n, 3, T, H, W]."""
    (shown,) = evaluation_clips(
        clips, frames=frames, size=size, fps=recipe.data.fps, batch=len(records), records=records, workers=0
    )
    return shown.clips


def _pictures(clips: Tensor) -> U8:
    """[…, 3, T, H, W] -> […, T, H, W, 3]"""
    pictures: U8 = clips.movedim(-4, -1).numpy()
    return pictures


# -- the figures as JSON, and as a table -----------------------------------------------------------


def summarise(
    recipe: Recipe, held_out: dict[str, Any], *, untrained: Path | None = None, **parts: Any
) -> dict[str, Any]:
    """Returns all figures of the demo's table as one JSON value.

    held_out:  result of held_out.measure
    untrained: run folder of a probe stage on an untrained encoder, for comparison
    parts:     other measures, by name
    """
    stages = stages_of(recipe)
    own = read_json(stages["probe"].evaluation) if "probe" in stages else None
    other = read_json(untrained / "probe" / EVALUATION) if untrained is not None else None
    attentive = {name: found["accuracy"] for name, found in (("trained", own), ("untrained", other)) if found}
    return {
        "stages": {name: _stage(stage.folder / "metrics.jsonl") for name, stage in stages.items()},
        "short_videos": _short_videos(recipe),
        "probe": held_out["linear_probe"],
        "attentive_probe": attentive,
        "attentive_labels_per_class": own["labels_per_class"] if own else None,
        "best_checkpoint": _best_checkpoint(stages["pretrain"]) if "pretrain" in stages else None,
        **held_out,
        **parts,
    }


def _best_checkpoint(stage: Stage) -> dict[str, Any] | None:
    """Returns the best checkpoint of those that were evaluated during training; None without evaluations."""
    found = results_of(stage)
    if found.best is None:
        return None
    facts = {"stage": stage.name, "checkpoint": found.best["checkpoint"], "evaluated": len(found.rows)}
    return (
        facts
        | {"words": in_words(found.best)}
        | {key: found.best[key] for key in ("step", "knn", "linear", "val_clips")}
    )


def _stage(metrics: Path) -> dict[str, Any]:
    rows = list(read_jsonl(metrics))
    # One step's loss depends on its masks, so first and last losses are means over a tenth of the stage.
    few = max(1, len(rows) // 10)
    ranks = [row["effective_rank"] for row in rows if row["effective_rank"] is not None]
    return {
        "steps": len(rows),
        "loss_start": mean(row["loss"] for row in rows[:few] if row["loss"] is not None),
        "loss_end": mean(row["loss"] for row in rows[-few:] if row["loss"] is not None),
        "effective_rank_start": ranks[0] if ranks else None,
        "effective_rank_end": ranks[-1] if ranks else None,
        "clips_per_s": mean(row["clips_per_s"] for row in rows),
    }


def _short_videos(recipe: Recipe) -> dict[str, Any]:
    """Returns, by stage and phase with short videos, their number in each data set and their share of the clips."""
    stages = stages_of(recipe).values()
    names = {name for stage in stages for phase in stage.phases for name in phase.mixture}
    folders = {name: Path(recipe.data.sets[name].path) for name in names}
    manifests = {name: Manifest.open(path) for name, path in folders.items() if (path / MANIFEST).exists()}
    found = dict[str, Any]()
    for stage in stages:
        for phase in stage.phases:
            short, share = short_videos(stage.data, phase, manifests)
            if short:
                sets = {name: {"records": s.records, "of": s.of} for name, s in short.items()}
                found[f"{phase.stage}.{phase.name}"] = {"share": share, "sets": sets}
    return found


def table(summary: dict[str, Any]) -> Iterator[str]:
    """Formats the summary for a terminal: each figure, and its meaning."""
    yield f"{'stage':<12}{'steps':>7}{'loss: start':>14}{'end':>9}{'rank: start':>14}{'end':>9}{'clips/s':>10}"
    for name, stage in summary["stages"].items():
        start, end = (stage[f"effective_rank_{where}"] for where in ("start", "end"))
        ranks = f"{'-':>14}{'-':>9}" if start is None else f"{start:>14.1f}{end:>9.1f}"
        yield (
            f"{name:<12}{stage['steps']:>7}{stage['loss_start']:>14.4f}{stage['loss_end']:>9.4f}"
            f"{ranks}{stage['clips_per_s']:>10.1f}"
        )
    yield ""
    yield from _probes(summary)
    yield ""
    yield from _meanings(summary)


def _probes(summary: dict[str, Any]) -> Iterator[str]:
    tasks = {"joint": summary, **summary["parts"]}
    measures = {"linear_probe": "linear probe", "knn": "k-NN"}
    columns = [(f"{measures[measure]}: {task}", measure, task) for measure in measures for task in tasks]
    yield "Right answers in %, from frozen features" + (
        f" (mean ± spread over draws of labels; {summary['evaluation']['held_out_clips']} held-out clips)"
    )
    yield f"{'':<11}" + "".join(f"{title.replace(': ', ' '):>21}" for title, *_ in columns) + f"{'attentive joint':>18}"
    for name in NAMES:
        cells = [_cell(tasks[task][measure][name], tasks[task][f"{measure}_std"][name]) for _, measure, task in columns]
        attentive = summary["attentive_probe"].get(name)
        cells.append(_cell(attentive["mean"], attentive["std"]) if attentive else "-")
        widths = [21] * len(columns) + [18]
        yield f"{name:<11}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    chances = [_cell(tasks[task]["chance"], None) for _, _, task in columns] + [_cell(summary["chance"], None)]
    yield f"{'chance':<11}" + "".join(f"{cell:>{w}}" for cell, w in zip(chances, widths, strict=True))


def _cell(share: float, std: float | None) -> str:
    return f"{100 * share:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _meanings(summary: dict[str, Any]) -> Iterator[str]:
    """Returns a line for each figure that explains it."""
    about, controls = summary["evaluation"], summary["controls"]
    few, classes, attentive = about["labels_per_class"], about["classes"], summary["attentive_labels_per_class"]
    rows = {
        "linear probe": f"a linear map of the features, from {few} labelled clips of each of {classes} classes",
        "k-NN": "the class of the nearest of these clips: nothing is trained on the features",
        "attentive probe": f"the method's own: a small network on all tokens, from {attentive} labelled clips a class",
        "untrained": "the same network before training: the distance to it is what pretraining gave",
        "controls": f"labels dealt at random: {controls['labels_dealt_at_random']:.1%} (has to be chance)",
    }
    if "motion_with_frames_shuffled" in controls:
        shuffled = controls["motion_with_frames_shuffled"]
        rows["controls"] += f"; motion, frames shuffled: {shuffled:.1%} (has to fall)"
    if planning := summary.get("planning"):
        rows["planning"] = (
            f"a robot reaches what a picture shows in {planning['success']:.0%} of {planning['episodes']} episodes; "
            f"random actions {planning['random']:.0%}, no action {planning['still']:.0%}"
        )
    if surprise := summary.get("surprise"):
        rows["surprise"] = (
            f"impossible motion surprises more in {surprise['pairs_right']:.0%} of {surprise['pairs']} pairs "
            f"(untrained: {surprise['untrained']:.0%})"
        )
    if short := summary.get("short_videos"):
        shares = ", ".join(
            f"{found['share']:.1%} of {name} ({sum(s['records'] for s in found['sets'].values())} videos)"
            for name, found in short.items()
        )
        rows["short videos"] = f"clips that repeat their last picture, since their video is shorter: {shares}"
    if best := summary.get("best_checkpoint"):
        rows["best checkpoint"] = (
            f"of {best['evaluated']} of {best['stage']}: that of step {best['step']}, on {best['val_clips']} held-out "
            f"clips ({best['words']})"
        )
    for name, meaning in rows.items():
        yield f"{name:<17}{meaning}"
