"""The evaluation at the end of a probe stage: accuracy of its probes on held-out clips."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.augment import empty_clips
from vjepa_scale.data.evaluation import LabelledClips, evaluation_clips
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.distributed.optim import GroupSetting
from vjepa_scale.recipe import Phase

if TYPE_CHECKING:
    from vjepa_scale.objective.probe_stage import ProbeStage

# With more labelled records than this and no drawn subset, k-NN and the linear probe are skipped.
FEATURE_RECORDS = 20_000
_POLL_S = 0.1

# Share of the free memory for tokens; the rest is for workers, checkpoints and the page cache.
_SHARE = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """Predictions of the probes for some records.

    labels:    [n], of the task
    predicted: [n, P], for each probe: the class of the highest probability, averaged over a record's views; -1 where
               outputs are not finite
    features:  float32 [n, F], averaged over a record's views; None where not requested
    """

    labels: Ints
    predicted: Ints
    features: npt.NDArray[np.float32] | None

    def accuracies(self) -> list[float]:
        return [float(share) for share in (self.predicted == self.labels[:, None]).mean(0)]


class TrainedProbes(Protocol):
    """The evaluated probes of a stage (objective/probe.py)."""

    @property
    def settings(self) -> Mapping[str, GroupSetting]:
        """By probe: learning rate and weight decay."""

    @property
    def draw_of(self) -> Mapping[str, int]:
        """By probe: its draw of labels."""

    def evaluate(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits [B, P, classes] and pooled features [B, F] of uint8 clips [B, 3, T, H, W]. Collective."""


class ProbeEvaluation:
    """Evaluates a stage's probes, on all ranks together.

    manifests, records: of the stage; records: those that each data set is trained on
    phase:              the last one; the evaluation uses its clips, batches and sizes
    each_round:         called on every rank after each batch, where it may stop
    """

    def __init__(
        self,
        stage: "ProbeStage",
        probes: TrainedProbes,
        engine: Engine,
        manifests: Mapping[str, Manifest],
        records: Mapping[str, Ints],
        phase: Phase,
        each_round: Callable[[], None],
    ) -> None:
        self._stage, self._config, self._phase = stage, stage.config, phase
        self._probes, self._engine, self._each_round = probes, engine, each_round
        self._manifests, self._records = manifests, records
        self._classes = stage.task(manifests).classes
        self._views = self._config.views.segments * self._config.views.crops

    def result(self, *, step: int, peak_lr: float) -> dict[str, Any] | None:
        """Returns the content of evaluation.json (docs/probe.md) on rank 0; None on the others.

        step: of the evaluated checkpoint;  peak_lr: of the stage, multiplied by the probes' scales
        Raises UserError naming a clip that does not decode within data.faults.decode_timeout_s.
        """
        labelled = sum(len(records) for records in self._records.values())
        featured = self._config.labels_per_class is not None or labelled <= FEATURE_RECORDS
        known = self._see_all(dict(self._records), features=True) if featured else None
        parts = [self._rows_of_draw(draw) for draw in range(self._config.label_draws)]
        choice = {name: self._stage.choice_records(self._manifests[name]) for name in self._records}
        chosen = self._see_all(choice) if self._config.choose_per_class else None
        held_out = self._config.evaluate_on
        every = np.arange(self._manifests[held_out].records)
        seen = self._see_all({held_out: every}, features=featured)

        def summary() -> dict[str, Any]:
            assert seen is not None, "on rank 0"
            return {
                "step": step,
                "trained_on": {name: len(records) for name, records in self._records.items()},
                "labels_per_class": self._config.labels_per_class,
                "evaluated_on": held_out,
                "clips": len(seen.labels),
                "views": self._config.views.model_dump(),
                "classes": len(self._classes),
                "class_names": self._classes,
                "chance": 1 / len(self._classes),
                "majority": float(np.bincount(seen.labels).max() / len(seen.labels)),
                "label_draws": self._config.label_draws,
                **_choice(self._settings(peak_lr), seen, chosen),
                **_training_free(known, parts, seen, neighbours=self._config.neighbours),
            }

        return _while_all_wait(summary, here=seen is not None)

    def _settings(self, peak_lr: float) -> list[dict[str, Any]]:
        return [
            {
                "probe": name,
                "draw": self._probes.draw_of[name],
                "lr": peak_lr * own.lr_scale,
                "weight_decay": own.weight_decay,
            }
            for name, own in self._probes.settings.items()
        ]

    def _rows_of_draw(self, draw: int) -> Ints:
        """Returns the rows of a draw's records among all records that the probes are trained on."""
        rows, before = [], 0
        for name, records in self._records.items():
            own = self._stage.records_of_draw(self._manifests[name], draw)
            rows.append(before + np.flatnonzero(np.isin(records, own)))
            before += len(records)
        return np.concatenate(rows)

    def _see_all(self, wanted: Mapping[str, Ints], *, features: bool = False) -> Seen | None:
        """Evaluates records of data sets on all ranks; returns the result on rank 0, in the order of ``wanted``."""
        parts = []
        for name, records in wanted.items():
            rows = list(self._look(name, records, features=features))
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

    def _look(self, name: str, records: Ints, *, features: bool) -> Iterator["_Row"]:
        """Evaluates this rank's records of a data set."""
        rounds = padded_rounds(
            self._stage,
            self._engine,
            self._phase,
            self._manifests,
            name,
            records,
            frames=self._stage.evaluated_frames,
            segments=self._config.views.segments,
            crops=self._config.views.crops,
        )
        for shown, clips in rounds:
            looks = [self._probes.evaluate(part) for part in clips.split(self._phase.micro_batch)]
            if shown is not None:
                logits, pooled = (torch.cat(parts) for parts in zip(*looks, strict=True))
                yield from _rows(shown, logits, pooled, views=self._views, featured=features)
            self._each_round()


@dataclass(frozen=True)
class _Row:
    record: int
    label: int
    predicted: Ints
    features: npt.NDArray[np.float32] | None


def _rows(shown: LabelledClips, logits: Tensor, features: Tensor, *, views: int, featured: bool) -> Iterator[_Row]:
    """Yields rows from logits [B·views, P, C] and features [B·views, F]; the last records may be padding."""
    probabilities = logits.double().softmax(-1).unflatten(0, (-1, views)).mean(1)
    predicted = probabilities.argmax(-1).where(probabilities.isfinite().all(-1), -1).cpu().numpy()
    mean = features.unflatten(0, (-1, views)).mean(1).cpu().numpy() if featured else None
    for k, (record, label) in enumerate(zip(shown.records, shown.labels.tolist(), strict=True)):
        yield _Row(record, label, predicted[k], None if mean is None else mean[k])


def _in_order(records: Ints, rows: list[_Row]) -> list[_Row]:
    """Returns the rows of all ranks in the order of ``records``, each exactly once."""
    found = {row.record: row for row in rows}
    assert len(found) == len(rows) == len(records), f"{len(rows)} rows of {len(found)} records for {len(records)}"
    return [found[record] for record in records.tolist()]


def _choice(settings: list[dict[str, Any]], seen: Seen, chosen: Seen | None) -> dict[str, Any]:
    """Returns each setting's accuracy, and the best setting of each draw of labels, selected on the selection clips.

    Of equal settings the first is best. ``best`` is the first draw's; ``accuracy`` has mean, standard deviation and all
    values of the best of each draw.
    """
    for setting, accuracy, predicted in zip(settings, seen.accuracies(), seen.predicted.T, strict=True):
        setting["accuracy"] = accuracy
        setting["finite"] = bool((predicted >= 0).all())
    if chosen is not None:
        for setting, accuracy in zip(settings, chosen.accuracies(), strict=True):
            setting["choice_accuracy"] = accuracy
    best = _best_of_draws(settings)
    return {
        "settings": settings,
        "best": best[0],
        "accuracy": _over_draws([setting["accuracy"] for setting in best]),
        "chosen_on": "evaluate_on" if chosen is None else "choose_per_class",
        "choice_clips": len((chosen or seen).labels),
    }


def _best_of_draws(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the best setting of each draw of labels, by the selection clips where there are any."""
    key = "choice_accuracy" if "choice_accuracy" in settings[0] else "accuracy"
    draws = range(settings[-1]["draw"] + 1)
    return [max((s for s in settings if s["draw"] == draw), key=lambda setting: setting[key]) for draw in draws]


def _training_free(known: Seen | None, draws: list[Ints], seen: Seen, *, neighbours: int) -> dict[str, Any]:
    """Evaluates k-NN and a linear probe on pooled features of the records that the probes were trained on.

    draws: rows of ``known``; results are means over draws, with all values under ``knn_draws``, ``linear_draws``
    """
    if known is None or known.features is None or seen.features is None:
        return dict.fromkeys(("knn", "linear", "knn_draws", "linear_draws", "neighbours"))
    from vjepa_scale.eval import knn_linear  # needs scikit-learn

    k = min(neighbours, min(len(rows) for rows in draws))
    knn, linear = [], []
    for rows in draws:
        given = known.features[rows], known.labels[rows], seen.features, seen.labels
        knn.append(knn_linear.knn_accuracy(*given, k=k))
        linear.append(knn_linear.linear_probe_accuracy(*given))
    return {
        "knn": float(np.mean(knn)),
        "linear": float(np.mean(linear)),
        "knn_draws": _over_draws(knn),
        "linear_draws": _over_draws(linear),
        "neighbours": k,
    }


def _over_draws(values: list[float]) -> dict[str, Any]:
    """Returns mean, std and all values over the draws of labels; std is None for a single draw."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "draws": values}


def _while_all_wait(work: Callable[[], T], *, here: bool) -> T | None:
    """Runs ``work`` on rank 0. It may take longer than a collective's timeout, so the other ranks poll for its end.

    Raises on every rank where it fails, so that no rank enters a collective that others miss.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if here else None
        while not process_group.from_rank_0(future is not None and future.done()):
            time.sleep(_POLL_S)
        failed = process_group.from_rank_0(future is not None and future.exception() is not None)
        if future is not None:
            return future.result()
    if failed:
        raise RuntimeError("rank 0 failed to compute the evaluation")
    return None


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Formats evaluation.json for a terminal."""
    views = result["views"]["segments"] * result["views"]["crops"]
    yield (
        f"probes at step {result['step']}: {result['clips']} clips of {result['evaluated_on']!r}, {result['classes']} "
        f"classes, {views} view{'s' * (views > 1)} of each"
    )
    several = result["label_draws"] > 1
    yield f"{'draw':>6}" * several + f"{'learning rate':>15}{'weight decay':>15}{'accuracy':>11}"
    best_of = [setting["probe"] for setting in _best_of_draws(result["settings"])]
    for setting in result["settings"]:
        best = f"   best, chosen on {result['chosen_on']}" * (setting["probe"] == best_of[setting["draw"]])
        lost = "   outputs not finite" * (not setting["finite"])
        numbers = f"{setting['lr']:>15.3g}{setting['weight_decay']:>15g}{setting['accuracy']:>11.1%}"
        yield f"{setting['draw']:>6}" * several + numbers + best + lost
    if several:
        over = result["accuracy"]
        yield f"attentive probe over {result['label_draws']} draws of labels: {over['mean']:.1%} ± {over['std']:.1%}"
    free = [(f"{result['neighbours']}-NN", result["knn"]), ("linear", result["linear"])] if result["neighbours"] else []
    yield ", ".join(f"{name} {value:.1%}" for name, value in [*free, ("chance", result["chance"])]) + (
        "" if free else f" (no k-NN or linear probe: more than {FEATURE_RECORDS} labelled clips)"
    )


# -- labelled clips without randomness, split over all ranks -----------------------------------------
#
# Each record is evaluated by one rank: rank r of W takes records r, r + W, …. All ranks have equally many batches of
# one size, the last ones padded, so that the prediction of a clip depends neither on ranks nor on batches.


def padded_rounds(
    stage: "ProbeStage",
    engine: Engine,
    phase: Phase,
    manifests: Mapping[str, Manifest],
    dataset: str,
    records: Ints,
    *,
    frames: int,
    segments: int = 1,
    crops: int = 1,
) -> Iterator[tuple[LabelledClips | None, Tensor]]:
    """Yields this rank's records of a data set, one micro-batch per round; all ranks have equally many rounds.

    frames, segments, crops: as in ``evaluation_clips``
    Yields the records (None in a round without any) and uint8 clips [b, 3, T, H, W], padded with zeros.
    """
    views, data = segments * crops, stage.recipe.data
    together = max(1, phase.micro_batch // views)
    mine = records[engine.dp_rank :: engine.dp_world_size]
    batches = evaluation_clips(
        manifests[dataset],
        frames=frames,
        size=phase.size,
        fps=data.fps_of(dataset),
        batch=together,
        classes=stage.task(manifests).classes,
        records=mine.tolist(),
        workers=data.workers if len(mine) else 0,
        segments=segments,
        crops=crops,
        limit_s=data.faults.decode_timeout_s,
    )
    for _ in range(math.ceil(math.ceil(len(records) / engine.dp_world_size) / together)):
        shown = next(batches, None)
        clips = empty_clips(together * views, frames, phase.size).zero_()
        if shown is not None:
            clips[: len(shown.clips)] = shown.clips
        yield shown, clips


def keep_tokens(
    stage: "ProbeStage",
    encode: Callable[[Tensor], Tensor],
    engine: Engine,
    manifests: Mapping[str, Manifest],
    trained_on: Mapping[str, Ints],
    phase: Phase,
    each_round: Callable[[], None],
) -> dict[tuple[str, int], Tensor]:
    """Encodes each training clip of a phase once, as in the evaluation, and keeps all its tokens on every rank.

    encode:     returns tokens [B, N, D] of uint8 clips [B, 3, T, H, W]; collective
    trained_on: the records of each data set
    each_round: called on every rank after each batch, where it may stop
    Returns tokens [N, D] by data set and record.
    Raises UserError where memory does not suffice, and naming a clip that does not decode.
    """
    check_memory(stage, trained_on, phase, engine.ranks)
    found: dict[tuple[str, int], Tensor] = {}
    for name, records in trained_on.items():
        frames = phase.frames_of(name)
        for shown, clips in padded_rounds(stage, engine, phase, manifests, name, records, frames=frames):
            tokens = encode(clips).cpu()
            own = () if shown is None else shown.records
            mine = [
                ((name, record), tokens[row].clone()) for row, record in enumerate(own)
            ]  # copied, so that the batch's memory is freed
            for theirs in process_group.from_all(mine):
                found.update(theirs)
            each_round()
    return found


def check_memory(stage: "ProbeStage", trained_on: Mapping[str, Ints], phase: Phase, ranks: Ranks) -> None:
    """Raises UserError where the tokens of all ranks of a node would take more than half of what is free there."""
    recipe = stage.recipe
    value = 4 if recipe.engine.precision == "float32" else 2
    needed = 0
    for name, records in trained_on.items():
        t, h, w = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=phase.frames_of(name))
        needed += ranks.local_world_size * len(records) * t * h * w * recipe.model.encoder.width * value
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        raise UserError(
            f"the tokens of {sum(map(len, trained_on.values()))} clips take {needed / 1e9:.1f} GB on the "
            f"{ranks.local_world_size} ranks of a node, of {free / 1e9:.1f} GB that are free",
            where=f"{phase.stage}.keep_tokens",
            fix="fewer labels_per_class, or keep_tokens: false, which encodes clips at every step",
        )
