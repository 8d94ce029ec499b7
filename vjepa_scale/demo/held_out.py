"""What a frozen encoder is worth on held-out clips, with few labels per class.

It is set beside an untrained one of the same architecture and beside raw pixels (eval/knn_linear.py), in the geometry
that it was trained on last. Two controls say whether the figures mean what they seem to: labels dealt out at random
must give chance, and clips whose frames are shuffled in time must hide the motion.
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
# Draws of labels, from a pool of so many clips of each class: more clips would only cost time.
LABEL_DRAWS, LABEL_POOL = 10, 20
NAMES = ("trained", "untrained", "pixels")
SHUFFLED = "frames shuffled"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Accuracy = Callable[[Floats, Ints, Floats, Ints], float]
MEASURES: dict[str, Accuracy] = {"linear_probe": knn_linear.linear_probe_accuracy, "knn": knn_linear.knn_accuracy}


def measure(recipe: Recipe, consolidated: Path, train: Manifest, val: Manifest) -> dict[str, Any]:
    """Accuracies by measure and features for the whole label and its parts, and the controls.

    Decodes ``val`` and the labelled part of ``train``. Nothing is chosen on ``val``.
    """
    labels, val_labels = labels_of(train), labels_of(val, train.classes)
    pool = few_labels(labels, per_class=min(LABEL_POOL, int(np.bincount(labels).min())), seed=0)
    draws = [pool[few_labels(labels[pool], per_class=LABELS_PER_CLASS, seed=seed)] for seed in range(LABEL_DRAWS)]
    labelled = np.unique(np.concatenate(draws))
    features = _features(recipe, consolidated, train, labelled, val)

    def accuracies(
        measure: Accuracy, of_class: Ints, *, shown: str, tested: str = "", deal: bool = False
    ) -> list[float]:
        """One for each draw of labels. deal: deal them out at random first."""
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
    """Rows of features, by what made them and by split."""
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
    """What the recipe's pretraining began with, in eval mode."""
    encoder = Encoder(recipe.model)
    initialise(encoder, seed=recipe.run.seed, prefix="encoder")
    return encoder.eval()


def in_another_order(clips: Tensor, records: Sequence[int]) -> Tensor:
    """Clips [n, 3, T, H, W] with the frames of each shuffled: a keyed draw for each record."""
    T = clips.shape[2]
    orders = (KeyedRng(0, "control.frames", record).shuffled(T) for record in records)
    return torch.stack([clip[:, torch.from_numpy(order)] for clip, order in zip(clips, orders, strict=True)])


def _tasks(classes: Sequence[str]) -> Iterator[tuple[str, Ints]]:
    """What can be asked of a clip: its label, and each part of labels ``shape-motion``. Class -> number."""
    yield "label", np.arange(len(classes))
    if all(name.count("-") == 1 for name in classes):
        for part, task in enumerate(("shape", "motion")):
            yield task, np.unique([name.split("-")[part] for name in classes], return_inverse=True)[1]
