"""A finished run in figures: how it trained, what its frozen encoder is worth, and whether a robot can plan with it."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from vjepa_scale.core.files import read_json, read_jsonl
from vjepa_scale.recipe import Recipe
from vjepa_scale.recipe.folders import EVALUATION, evaluation_file, stage_folder
from vjepa_scale.report.held_out import NAMES


def summarise(
    recipe: Recipe, held_out: dict[str, Any], *, untrained: Path | None = None, **parts: Any
) -> dict[str, Any]:
    """Everything the demo's table says, as one JSON value.

    held_out:  of held_out.measure
    untrained: the run folder of a probe stage on an untrained encoder, to set beside this run's
    parts:     other measures, by name
    """
    own = read_json(evaluation_file(recipe, "probe")) if recipe.probe is not None else None
    other = read_json(untrained / "probe" / EVALUATION) if untrained is not None else None
    attentive = {name: found["best"]["accuracy"] for name, found in (("trained", own), ("untrained", other)) if found}
    return {
        "stages": {name: _stage(stage_folder(recipe, name) / "metrics.jsonl") for name in recipe.stages()},
        "probe": held_out["linear_probe"],
        "attentive_probe": attentive,
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


def table(summary: dict[str, Any]) -> Iterator[str]:
    """The summary as lines for a terminal."""
    yield f"{'stage':<12}{'steps':>7}{'loss: start':>14}{'end':>9}{'rank: start':>14}{'end':>9}{'clips/s':>10}"
    for name, stage in summary["stages"].items():
        start, end = (stage[f"effective_rank_{where}"] for where in ("start", "end"))
        ranks = f"{'-':>14}{'-':>9}" if start is None else f"{start:>14.1f}{end:>9.1f}"
        yield (
            f"{name:<12}{stage['steps']:>7}{stage['loss_start']:>14.4f}{stage['loss_end']:>9.4f}"
            f"{ranks}{stage['clips_per_s']:>10.1f}"
        )
    about = summary["evaluation"]
    yield ""
    yield (
        f"Frozen features, {about['labels_per_class']} labels for each of {about['classes']} classes, "
        f"{about['held_out_clips']} held-out clips:"
    )
    tasks = {"label": summary, **summary["parts"]}
    yield f"{'linear probe (k-NN)':<20}" + "".join(f"{task:>18}" for task in tasks) + f"{'attentive probe':>18}"
    for name in NAMES:
        cells = [f"{probe['linear_probe'][name]:.1%} ({probe['knn'][name]:.1%})" for probe in tasks.values()]
        cells.append(f"{summary['attentive_probe'][name]:.1%}" if name in summary["attentive_probe"] else "-")
        yield f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells)
    yield f"{'chance':<20}" + "".join(f"{probe['chance']:>18.1%}" for probe in tasks.values())
    controls = summary["controls"]
    yield f"labels dealt at random: {controls['labels_dealt_at_random']:.1%}" + (
        f"; motion with frames shuffled in time: {controls['motion_with_frames_shuffled']:.1%}"
        if "motion_with_frames_shuffled" in controls
        else ""
    )
    if "planning" in summary:
        planning = summary["planning"]
        yield ""
        yield (
            f"Planning to a picture, {planning['episodes']} episodes: success {planning['success']:.0%}; "
            f"random actions {planning['random']:.0%}; no action {planning['still']:.0%}"
        )
    if "surprise" in summary:
        surprise = summary["surprise"]
        right, pairs = surprise["pairs_right"], surprise["pairs"]
        yield (
            f"Impossible motion surprises more than possible motion in {right:.0%} of {pairs} pairs "
            f"(untrained: {surprise['untrained']:.0%})"
        )
