"""A finished run in figures: how it trained, what its frozen encoder is worth, and whether a robot can plan with it."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from vjepa_scale.core.files import read_json, read_jsonl
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.data.short_videos import short_videos
from vjepa_scale.demo.held_out import NAMES
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.recipe.stage import EVALUATION


def summarise(
    recipe: Recipe, held_out: dict[str, Any], *, untrained: Path | None = None, **parts: Any
) -> dict[str, Any]:
    """Everything the demo's table says, as one JSON value.

    held_out:  of held_out.measure
    untrained: the run folder of a probe stage on an untrained encoder, to set beside this run's
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
        **held_out,
        **parts,
    }


def _stage(metrics: Path) -> dict[str, Any]:
    rows = list(read_jsonl(metrics))
    # One step's loss depends on its masks: the ends of a stage are means over a tenth of it.
    few = max(1, len(rows) // 10)
    ranks = [row["effective_rank"] for row in rows if row["effective_rank"] is not None]
    return {
        "steps": len(rows),
        "loss_start": mean(row["loss"] for row in rows[:few]),
        "loss_end": mean(row["loss"] for row in rows[-few:]),
        "effective_rank_start": ranks[0] if ranks else None,
        "effective_rank_end": ranks[-1] if ranks else None,
        "clips_per_s": mean(row["clips_per_s"] for row in rows),
    }


def _short_videos(recipe: Recipe) -> dict[str, Any]:
    """By stage and phase with any: how many records of each data set clips repeat the last picture of, and the share
    of the phase's clips.
    """
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
    """The summary as lines for a terminal: each figure, and what it means."""
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
    """What each figure is, in a line."""
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
    for name, meaning in rows.items():
        yield f"{name:<17}{meaning}"
