"""A finished run in figures: how it trained, and what its frozen encoder is worth on held-out clips.

The encoder is set beside an untrained one of the same architecture and beside raw pixels, with few labels per
class (objective/frozen.py), in the geometry that it was trained on last.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from vjepa_scale.checkpoint.consolidated import load_encoder, read_config
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.labels import few_labels, labels_of
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.objective import frozen
from vjepa_scale.recipe import Recipe

LABELS_PER_CLASS = 10
LABEL_DRAWS = 3


def summarise(recipe: Recipe, consolidated: Path, train: Manifest, val: Manifest) -> dict[str, Any]:
    """Everything the demo's table says, as one JSON value. Decodes ``val`` and the labelled part of ``train``."""
    stages = {name: _stage(Path(recipe.run.dir) / name / "metrics.jsonl") for name in recipe.stages()}
    return {
        "stages": stages,
        **_frozen(recipe, consolidated, train, val),
        "files": {"run": recipe.run.dir, "consolidated": str(consolidated)},
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
        "effective_rank_start": ranks[0],
        "effective_rank_end": ranks[-1],
        "clips_per_s": mean(row["clips_per_s"] for row in rows),
    }


def _frozen(recipe: Recipe, consolidated: Path, train: Manifest, val: Manifest) -> dict[str, Any]:
    config = read_config(consolidated)
    untrained = Encoder(recipe.model)
    initialise(untrained, seed=recipe.run.seed, prefix="encoder")
    encoders = {"trained": load_encoder(consolidated), "untrained": untrained.eval()}
    features: dict[str, dict[str, list[np.ndarray]]] = {
        name: {"train": [], "val": []} for name in (*encoders, "pixels")
    }
    train_labels, val_labels = labels_of(train).numpy(), labels_of(val, train.classes).numpy()
    draws = [few_labels(train_labels, per_class=LABELS_PER_CLASS, seed=seed) for seed in range(LABEL_DRAWS)]
    labelled = np.unique(np.concatenate(draws))
    channel_mean, channel_std = np.asarray(config.mean), np.asarray(config.std)
    for split, manifest, records in (("train", train, labelled), ("val", val, np.arange(val.records))):
        batches = evaluation_clips(
            manifest,
            frames=config.frames,
            size=config.size,
            fps=config.fps,
            batch=16,
            classes=train.classes,
            records=records.tolist(),
            workers=1,
        )
        for shown in batches:
            clips = shown.clips
            features["pixels"][split].append(frozen.pixel_features(clips))
            for name, encoder in encoders.items():
                rows = frozen.encoder_features(
                    encoder, clips, tubelet=config.model.tubelet, mean=channel_mean, std=channel_std
                )
                features[name][split].append(rows)

    probes = {
        task: {
            measure: {
                name: mean(
                    accuracy(
                        np.concatenate(parts["train"])[np.searchsorted(labelled, few)],
                        of_class[train_labels[few]],
                        np.concatenate(parts["val"]),
                        of_class[val_labels],
                    )
                    for few in draws
                )
                for name, parts in features.items()
            }
            for measure, accuracy in (("linear_probe", frozen.linear_probe_accuracy), ("knn", frozen.knn_accuracy))
        }
        | {"chance": 1 / len(np.unique(of_class))}
        for task, of_class in _tasks(train.classes).items()
    }
    return {
        **probes["label"],
        "parts": {task: probe for task, probe in probes.items() if task != "label"},
        "evaluation": {
            "classes": len(train.classes),
            "labels_per_class": LABELS_PER_CLASS,
            "held_out_clips": len(val_labels),
        },
    }


def _tasks(classes: Sequence[str]) -> dict[str, np.ndarray]:
    """What can be asked of a clip: its label, and each part of labels ``shape-motion``. Class -> number."""
    tasks = {"label": np.arange(len(classes))}
    if all(name.count("-") == 1 for name in classes):
        for part, task in enumerate(("shape", "motion")):
            tasks[task] = np.unique([name.split("-")[part] for name in classes], return_inverse=True)[1]
    return tasks


def table(summary: dict[str, Any]) -> Iterator[str]:
    """The summary as lines for a terminal."""
    yield f"{'stage':<12}{'steps':>7}{'loss: start':>14}{'end':>9}{'rank: start':>14}{'end':>9}{'clips/s':>10}"
    for name, stage in summary["stages"].items():
        yield (
            f"{name:<12}{stage['steps']:>7}{stage['loss_start']:>14.4f}{stage['loss_end']:>9.4f}"
            f"{stage['effective_rank_start']:>14.1f}{stage['effective_rank_end']:>9.1f}{stage['clips_per_s']:>10.1f}"
        )
    about = summary["evaluation"]
    yield ""
    yield (
        f"Frozen features, {about['labels_per_class']} labels for each of {about['classes']} classes, "
        f"{about['held_out_clips']} held-out clips:"
    )
    tasks = {"label": summary, **summary["parts"]}
    yield f"{'linear probe (k-NN)':<20}" + "".join(f"{task:>18}" for task in tasks)
    for name in ("trained", "untrained", "pixels"):
        cells = (f"{probe['linear_probe'][name]:.1%} ({probe['knn'][name]:.1%})" for probe in tasks.values())
        yield f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells)
    yield f"{'chance':<20}" + "".join(f"{probe['chance']:>18.1%}" for probe in tasks.values())
