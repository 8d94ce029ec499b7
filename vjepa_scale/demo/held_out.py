"""Evaluates a frozen encoder on held-out clips, with few labels per class.

Compares it with an untrained encoder of the same architecture and with raw pixels (eval/knn_linear.py), in the geometry
of the last training. Two controls validate the figures: with randomly assigned labels accuracy must be at chance, and
with frames shuffled in time the accuracy for motion must fall.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vjepa_scale.checkpoint.load import load_encoder, read_config
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.manifest import Manifest, few_labels, labels_of
from vjepa_scale.eval import knn_linear
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.recipe import Recipe

LABELS_PER_CLASS = 10
# Draws of labels, from a pool of this many clips per class; a larger pool would only cost time.
LABEL_DRAWS, LABEL_POOL = 10, 20
NAMES = ("trained", "untrained", "pixels")
SHUFFLED = "frames shuffled"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Accuracy = Callable[[Floats, Ints, Floats, Ints], float]
MEASURES: dict[str, Accuracy] = {"linear_probe": knn_linear.linear_probe_accuracy, "knn": knn_linear.knn_accuracy}


def measure(recipe: Recipe, consolidated: Path, train: Manifest, val: Manifest) -> dict[str, Any]:
    """Returns accuracies by measure and features, for the whole label and its parts, and the controls.

    Decodes ``val`` and the labelled part of ``train``. Selects nothing on ``val``.
    """
    labels, val_labels = labels_of(train), labels_of(val, train.classes)
    pool = few_labels(labels, per_class=min(LABEL_POOL, int(np.bincount(labels).min())), seed=0)
    draws = [pool[few_labels(labels[pool], per_class=LABELS_PER_CLASS, seed=seed)] for seed in range(LABEL_DRAWS)]
    labelled = np.unique(np.concatenate(draws))
    features = _features(recipe, consolidated, train, labelled, val)

    def accuracies(
        measure: Accuracy, of_class: Ints, *, shown: str, tested: str = "", deal: bool = False
    ) -> list[float]:
        """Returns one accuracy per draw of labels. deal: assign the labels at random first"""
        rows, results = features[shown]["train"], []
        for number, few in enumerate(draws):
            given = of_class[labels[few]]
            if deal:
                given = given[KeyedRng(number, "control.labels").shuffled(len(given))]
            tests = features[tested or shown]["val"]
            results.append(measure(rows[np.searchsorted(labelled, few)], given, tests, of_class[val_labels]))
        return results

    tasks = dict(_tasks(train.classes))
    probes: dict[str, dict[str, Any]] = {}
    for task, of_class in tasks.items():
        probes[task] = {"chance": 1 / len(np.unique(of_class))}
        for name, measure in MEASURES.items():
            found = {shown: accuracies(measure, of_class, shown=shown) for shown in NAMES}
            probes[task][name] = {shown: mean(values) for shown, values in found.items()}
            probes[task][f"{name}_std"] = {shown: stdev(values) for shown, values in found.items()}
    linear = MEASURES["linear_probe"]
    controls = {"labels_dealt_at_random": mean(accuracies(linear, tasks["label"], shown="trained", deal=True))}
    if "motion" in tasks:
        shuffled = accuracies(linear, tasks["motion"], shown="trained", tested=SHUFFLED)
        controls["motion_with_frames_shuffled"] = mean(shuffled)
    return {
        **probes["label"],
        "parts": {task: probe for task, probe in probes.items() if task != "label"},
        "controls": controls,
        "evaluation": {
            "classes": len(train.classes),
            "labels_per_class": LABELS_PER_CLASS,
            "label_draws": LABEL_DRAWS,
            "held_out_clips": len(val_labels),
        },
    }


def _features(
    recipe: Recipe, consolidated: Path, train: Manifest, labelled: Ints, val: Manifest
) -> dict[str, dict[str, Floats]]:
    """Returns rows of features, by encoder and by split."""
    config = read_config(consolidated)
    encoders = {"trained": load_encoder(consolidated), "untrained": untrained_encoder(recipe)}

    def rows(name: str, clips: Tensor) -> Floats:
        return knn_linear.encoder_features(
            encoders[name],
            clips,
            tubelet=config.model.tubelet,
            mean=config.mean,
            std=config.std,
        )

    out: dict[str, dict[str, list[Floats]]] = {name: {"train": [], "val": []} for name in (*NAMES, SHUFFLED)}
    for split, manifest, records in (("train", train, labelled), ("val", val, np.arange(val.records))):
        for shown in evaluation_clips(
            manifest,
            frames=config.frames,
            size=config.size,
            fps=config.fps,
            batch=16,
            classes=train.classes,
            records=records.tolist(),
            workers=1,
        ):
            out["pixels"][split].append(knn_linear.pixel_features(shown.clips))
            for name in encoders:
                out[name][split].append(rows(name, shown.clips))
            if split == "val":
                out[SHUFFLED][split].append(rows("trained", in_another_order(shown.clips, shown.records)))
    return {
        name: {split: np.concatenate(parts) for split, parts in splits.items() if parts} for name, splits in out.items()
    }


def untrained_encoder(recipe: Recipe) -> Encoder:
    """Returns the encoder with the initial weights of the recipe's pretraining, in eval mode."""
    encoder = Encoder(recipe.model)
    initialise(encoder, seed=recipe.run.seed, prefix="encoder")
    return encoder.eval()


def in_another_order(clips: Tensor, records: Sequence[int]) -> Tensor:
    """Shuffles the frames of each of the clips [n, 3, T, H, W], with a keyed draw per record."""
    T = clips.shape[2]
    orders = (KeyedRng(0, "control.frames", record).shuffled(T) for record in records)
    return torch.stack([clip[:, torch.from_numpy(order)] for clip, order in zip(clips, orders, strict=True)])


def _tasks(classes: Sequence[str]) -> Iterator[tuple[str, Ints]]:
    """Yields the tasks, each with class -> number: the label, and each part of labels ``shape-motion``."""
    yield "label", np.arange(len(classes))
    if all(name.count("-") == 1 for name in classes):
        for part, task in enumerate(("shape", "motion")):
            yield task, np.unique([name.split("-")[part] for name in classes], return_inverse=True)[1]
