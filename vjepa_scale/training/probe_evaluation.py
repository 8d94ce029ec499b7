"""What a probe stage ends with: how often its probes are right on clips that they were not trained on.

Each record is looked at by one rank: rank r of W takes records r, r + W, …. All ranks call the networks equally often,
with batches of one size, the last ones padded, so that neither ranks nor batches change what a clip is taken for.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vjepa_scale.data.augment import empty_clips
from vjepa_scale.data.evaluation import LabelledClips, evaluation_clips
from vjepa_scale.data.kept import choice_records
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.objective.probe import Probes, task_classes
from vjepa_scale.parallel import process_group
from vjepa_scale.parallel.engine import Engine
from vjepa_scale.recipe import Phase, Recipe
from vjepa_scale.recipe.stage_sections import ProbeStageConfig

# Of more labelled records than these, drawn by nobody, no features are kept for k-NN and the linear probe.
FEATURE_RECORDS = 20_000
_POLL_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What the probes made of some records.

    labels:    [n], of the task
    predicted: [n, P], by each probe: the class of the highest probability, averaged over a record's views; -1 where
               its outputs are not finite
    features:  float32 [n, F], averaged over its views; None where they were not asked for
    """

    labels: Ints
    predicted: Ints
    features: npt.NDArray[np.float32] | None

    def accuracies(self) -> list[float]:
        return [float(share) for share in (self.predicted == self.labels[:, None]).mean(0)]


class ProbeEvaluation:
    """Of a stage's probes, on all ranks together.

    manifests, kept: of the stage; kept holds the records that each data set is trained on
    phase:           the last, whose clips, batches and sizes are taken
    each_round:      called on every rank after each batch: a place to stop
    """

    def __init__(
        self,
        recipe: Recipe,
        probes: Probes,
        engine: Engine,
        manifests: Mapping[str, Manifest],
        kept: Mapping[str, Ints],
        phase: Phase,
        each_round: Callable[[], None],
    ) -> None:
        assert recipe.probe is not None, "the stage of this evaluation"
        self._recipe, self._config, self._phase = recipe, recipe.probe, phase
        self._probes, self._engine, self._each_round = probes, engine, each_round
        self._manifests, self._kept = manifests, kept
        self._classes = task_classes(recipe, manifests)
        self._views = self._config.views.segments * self._config.views.crops

    def result(self, *, step: int, peak_lr: float) -> dict[str, Any] | None:
        """evaluation.json's content (docs/probe.md), on rank 0; None on the others.

        step: of the checkpoint that is evaluated;  peak_lr: of the stage, which the probes' scales multiply
        Raises UserError naming a clip that does not decode, or not within data.faults.decode_timeout_s.
        """
        labelled = sum(len(records) for records in self._kept.values())
        featured = self._config.labels_per_class is not None or labelled <= FEATURE_RECORDS
        known = self._see_all(dict(self._kept), features=True) if featured else None
        choice = {name: choice_records(self._recipe, self._manifests[name]) for name in self._kept}
        chosen = self._see_all(choice) if self._config.choose_per_class else None
        held_out = self._config.evaluate_on
        every = np.arange(self._manifests[held_out].records)
        seen = self._see_all({held_out: every}, features=featured)

        def summary() -> dict[str, Any]:
            assert seen is not None, "on rank 0"
            return {
                "step": step,
                "trained_on": {name: len(records) for name, records in self._kept.items()},
                "labels_per_class": self._config.labels_per_class,
                "evaluated_on": held_out,
                "clips": len(seen.labels),
                "views": self._config.views.model_dump(),
                "classes": len(self._classes),
                "class_names": self._classes,
                "chance": 1 / len(self._classes),
                "majority": float(np.bincount(seen.labels).max() / len(seen.labels)),
                **_choice(self._settings(peak_lr), seen, chosen, self._config),
                **_training_free(known, seen, neighbours=self._config.neighbours),
            }

        return _while_all_wait(summary, here=seen is not None)

    def _settings(self, peak_lr: float) -> list[dict[str, Any]]:
        return [
            {"probe": name, "lr": peak_lr * own.lr_scale, "weight_decay": own.weight_decay}
            for name, own in self._probes.settings.items()
        ]

    def _see_all(self, wanted: Mapping[str, Ints], *, features: bool = False) -> Seen | None:
        """Records of some data sets, by all ranks; on rank 0 what they saw, in the order of ``wanted``."""
        parts = []
        for name, records in wanted.items():
            mine = records[self._engine.dp_rank :: self._engine.dp_world_size]
            rounds = math.ceil(math.ceil(len(records) / self._engine.dp_world_size) / self._together)
            rows = list(self._look(name, mine, rounds, features=features))
            everyones = process_group.to_rank_0(rows)
            if everyones is not None:
                parts.append(_in_order(records, [row for theirs in everyones for row in theirs]))
        if not process_group.is_main():
            return None
        joined = [row for part in parts for row in part]
        return Seen(
            labels=np.array([row.label for row in joined], np.int64),
            predicted=np.stack([row.predicted for row in joined]),
            features=np.stack([row.features for row in joined if row.features is not None]) if features else None,
        )

    @property
    def _together(self) -> int:
        """Records of a batch."""
        return max(1, self._phase.micro_batch // self._views)

    def _look(self, name: str, records: Ints, rounds: int, *, features: bool) -> Iterator["_Row"]:
        """This rank's records of a data set, in as many rounds as every rank has."""
        batches = self._batches(name, records) if len(records) else iter(())
        frames = self._recipe.data.sets[self._config.evaluate_on].frames or self._phase.frames
        for _ in range(rounds):
            shown = next(batches, None)
            clips = empty_clips(self._together * self._views, frames, self._phase.size).zero_()
            if shown is not None:
                clips[: len(shown.clips)] = shown.clips
            looks = [self._probes.look(part) for part in clips.split(self._phase.micro_batch)]
            if shown is not None:
                logits, pooled = (torch.cat(parts) for parts in zip(*looks, strict=True))
                yield from _rows(shown, logits, pooled, views=self._views, featured=features)
            self._each_round()

    def _batches(self, name: str, records: Ints) -> Iterator[LabelledClips]:
        views, data = self._config.views, self._recipe.data
        return evaluation_clips(
            self._manifests[name],
            frames=data.sets[self._config.evaluate_on].frames or self._phase.frames,
            size=self._phase.size,
            fps=data.fps_of(name),
            batch=self._together,
            classes=self._classes,
            records=records.tolist(),
            workers=data.workers,
            segments=views.segments,
            crops=views.crops,
            limit_s=data.faults.decode_timeout_s,
        )


@dataclass(frozen=True)
class _Row:
    record: int
    label: int
    predicted: Ints
    features: npt.NDArray[np.float32] | None


def _rows(shown: LabelledClips, logits: Tensor, features: Tensor, *, views: int, featured: bool) -> Iterator[_Row]:
    """logits [B·views, P, C] and features [B·views, F] of records, the last of which may be padding."""
    probabilities = logits.double().softmax(-1).unflatten(0, (-1, views)).mean(1)
    predicted = probabilities.argmax(-1).where(probabilities.isfinite().all(-1), -1).cpu().numpy()
    mean = features.unflatten(0, (-1, views)).mean(1).cpu().numpy() if featured else None
    for k, (record, label) in enumerate(zip(shown.records, shown.labels.tolist(), strict=True)):
        yield _Row(record, label, predicted[k], None if mean is None else mean[k])


def _in_order(records: Ints, rows: list[_Row]) -> list[_Row]:
    """The rows of all ranks by record: each record once, none else."""
    found = {row.record: row for row in rows}
    assert len(found) == len(rows) == len(records), f"{len(rows)} rows of {len(found)} records for {len(records)}"
    return [found[record] for record in records.tolist()]


def _choice(
    settings: list[dict[str, Any]], seen: Seen, chosen: Seen | None, config: ProbeStageConfig
) -> dict[str, Any]:
    """Each setting's accuracy, and the best: the first of equals, by the clips that it is to be chosen on."""
    for setting, accuracy, predicted in zip(settings, seen.accuracies(), seen.predicted.T, strict=True):
        setting["accuracy"] = accuracy
        setting["finite"] = bool((predicted >= 0).all())
    key = "accuracy"
    if chosen is not None:
        key = "choice_accuracy"
        for setting, accuracy in zip(settings, chosen.accuracies(), strict=True):
            setting[key] = accuracy
    best = max(settings, key=lambda setting: setting[key])
    return {
        "settings": settings,
        "best": best,
        "chosen_on": "evaluate_on" if chosen is None else "choose_per_class",
        "choice_clips": len((chosen or seen).labels),
    }


def _training_free(known: Seen | None, seen: Seen, *, neighbours: int) -> dict[str, Any]:
    """k-NN and a linear probe on pooled features of the records that the probes were trained on."""
    if known is None or known.features is None or seen.features is None:
        return {"knn": None, "linear": None, "neighbours": None}
    from vjepa_scale.objective import frozen  # scikit-learn, for whoever needs it

    rows = known.features, known.labels, seen.features, seen.labels
    k = min(neighbours, len(known.labels))
    return {
        "knn": frozen.knn_accuracy(*rows, k=k),
        "linear": frozen.linear_probe_accuracy(*rows),
        "neighbours": k,
    }


def _while_all_wait(work: Callable[[], T], *, here: bool) -> T | None:
    """What one rank (0) works out, which may take longer than a collective may: the others keep asking for its end.

    Raises on every rank where it fails: none goes on to a collective in which the others would be missing.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if here else None
        while not process_group.from_rank_0(future is not None and future.done()):
            time.sleep(_POLL_S)
        failed = process_group.from_rank_0(future is not None and future.exception() is not None)
        if future is not None:
            return future.result()
    if failed:
        raise RuntimeError("rank 0 could not sum up the evaluation")
    return None


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """evaluation.json for a terminal."""
    views = result["views"]["segments"] * result["views"]["crops"]
    yield (
        f"probes at step {result['step']}: {result['clips']} clips of {result['evaluated_on']!r}, {result['classes']} "
        f"classes, {views} view{'s' * (views > 1)} of each"
    )
    yield f"{'learning rate':>15}{'weight decay':>15}{'accuracy':>11}"
    for setting in result["settings"]:
        best = f"   best, chosen on {result['chosen_on']}" * (setting["probe"] == result["best"]["probe"])
        lost = "   outputs not finite" * (not setting["finite"])
        yield f"{setting['lr']:>15.3g}{setting['weight_decay']:>15g}{setting['accuracy']:>11.1%}{best}{lost}"
    free = [(f"{result['neighbours']}-NN", result["knn"]), ("linear", result["linear"])] if result["neighbours"] else []
    yield ", ".join(f"{name} {value:.1%}" for name, value in [*free, ("chance", result["chance"])]) + (
        "" if free else f" (no k-NN or linear probe: more than {FEATURE_RECORDS} labelled clips)"
    )
