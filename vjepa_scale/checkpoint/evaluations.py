"""The results of a stage's checkpoints on held-out clips: which are due, which is the best, and which must be kept.

evaluations.jsonl has a row per evaluation:

    step, checkpoint    completed steps, and the folder's name
    identity            of the checkpoint's tensors (manifest.identity): a row of other weights does not count
    knn, linear         accuracies on the held-out clips, 0 … 1; null without labels
    effective_rank      of the target encoder's features of the held-out clips
    held_out_loss       the training loss on these clips, under the same masks for each checkpoint
    settings            the data sets and the geometry; only rows with equal settings are compared
    train_clips, val_clips, time (seconds since 1970), seconds (that the evaluation took)

Rows are only appended, each in one write. Does not import PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.manifest import identity, newest_first, read_manifest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import append_jsonl, read_jsonl
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.evaluate_section import EvaluateConfig, evaluation_of, settings_of

Row = dict[str, Any]

# Checkpoints beyond ``checkpoint.keep`` that stay because they are due and not evaluated yet: a bound for the disk.
WAITING = 2
# Features that use less than this share of the largest effective rank count as collapsed.
COLLAPSED = 0.5

_NUMBER = (int, float)
_REQUIRED: dict[str, Any] = {"step": int, "checkpoint": str, "identity": str, "settings": dict}


# -- rows ------------------------------------------------------------------------------------------


def read_rows(stage: Stage) -> list[Row]:
    """Returns all rows, oldest first; of several for the same weights and settings only the last one."""
    rows: dict[tuple[str, str], Row] = {}
    for row in read_jsonl(stage.evaluations):
        if all(isinstance(row.get(key), kind) for key, kind in _REQUIRED.items()):
            key = row["identity"], repr(sorted(row["settings"].items()))
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def add_row(stage: Stage, row: Row) -> None:
    append_jsonl(stage.evaluations, row, durable=True)


def comparable(rows: Sequence[Row], settings: dict[str, Any] | None) -> list[Row]:
    """Returns the rows with these settings; None, or no such row: those with the settings of the last row."""
    found = [row for row in rows if row["settings"] == settings]
    if found or not rows:
        return found
    return [row for row in rows if row["settings"] == rows[-1]["settings"]]


def best_checkpoint(rows: Sequence[Row]) -> Row | None:
    """Returns the best row of comparable ones; None if none can be ranked.

    With labels: the highest k-NN accuracy, then the highest accuracy of the linear probe, then the latest step.
    Without labels: the lowest held-out loss among checkpoints whose features have not collapsed (COLLAPSED), then the
    latest step. A collapsed encoder has a low loss, because constant features are easy to predict.
    """
    labelled = [row for row in rows if _finite(row.get("knn"))]
    if labelled:
        return max(labelled, key=lambda row: (row["knn"], _or_lowest(row.get("linear")), row["step"]))
    ranked = [row for row in rows if _finite(row.get("held_out_loss")) and _finite(row.get("effective_rank"))]
    widest = max((row["effective_rank"] for row in ranked), default=0.0)
    spread = [row for row in ranked if row["effective_rank"] >= COLLAPSED * widest]
    return min(spread, key=lambda row: (row["held_out_loss"], -row["step"]), default=None)


def _finite(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def _or_lowest(value: Any) -> float:
    return float(value) if _finite(value) else -math.inf


def in_words(row: Row) -> str:
    """``k-NN 41.2 %, linear probe 38.0 %`` or ``held-out loss 0.4312``, then ``, effective rank 31.2``."""
    accuracies = {"knn": "k-NN", "linear": "linear probe"}
    parts = [f"{name} {100 * row[key]:.1f} %" for key, name in accuracies.items() if _finite(row.get(key))]
    if not parts and _finite(row.get("held_out_loss")):
        parts.append(f"held-out loss {row['held_out_loss']:.4f}")
    if _finite(row.get("effective_rank")):
        parts.append(f"effective rank {row['effective_rank']:.1f}")
    return ", ".join(parts)


# -- rows and checkpoints --------------------------------------------------------------------------


def _identities(stage: Stage) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Returns identity → folder and manifest of each checkpoint whose manifest can be read, newest first."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for checkpoint in newest_first(stage.checkpoints):
        try:
            manifest = read_manifest(checkpoint)
        except (UserError, OSError):  # damaged, or removed meanwhile
            continue
        found[identity(manifest)] = checkpoint, manifest
    return found


@dataclass(frozen=True)
class Results:
    """The comparable results of a stage, by step.

    rows: also of checkpoints that have been removed since
    best: among the checkpoints that are there
    """

    rows: list[Row]
    best: Row | None
    present: frozenset[str]

    def lines(self) -> list[str]:
        """Returns a line per row for a terminal."""
        marks = ("  best", "", "  (removed)")
        return [
            f"{row['checkpoint']}  {in_words(row)}"
            + marks[0 if row is self.best else 1 + (row["identity"] not in self.present)]
            for row in self.rows
        ]


def results_of(stage: Stage) -> Results:
    """Reads the results with the settings of the recipe's ``evaluate``; without it, of the last evaluation."""
    if not stage.evaluations.exists():
        return Results([], None, frozenset())
    config = evaluation_of(stage)
    rows = comparable(read_rows(stage), None if config is None else settings_of(stage, config))
    rows.sort(key=lambda row: row["step"])
    present = frozenset(_identities(stage))
    return Results(rows, best_checkpoint([row for row in rows if row["identity"] in present]), present)


def not_evaluated(stage: Stage, config: EvaluateConfig, *, only_due: bool) -> list[Path]:
    """Returns the checkpoints without a row of these settings, newest first.

    only_due: those of ``evaluate.every`` and of ends of phases
    """
    settings = settings_of(stage, config)
    done = {row["identity"] for row in read_rows(stage) if row["settings"] == settings}
    every = config.every or stage.recipe.checkpoint.every
    return [
        checkpoint
        for name, (checkpoint, manifest) in _identities(stage).items()
        if name not in done and (not only_due or manifest["step"] % every == 0 or manifest.get("ends_phase") is True)
    ]


def kept_by_evaluation(stage: Stage) -> set[str]:
    """Returns names of checkpoints that stay in addition to ``checkpoint.keep``: the best, and those that wait."""
    config = evaluation_of(stage)
    if config is None or not stage.recipe.checkpoint.keep_best:
        return set()
    best = results_of(stage).best
    newest = newest_first(stage.checkpoints)[: stage.recipe.checkpoint.keep]
    waiting = [path for path in not_evaluated(stage, config, only_due=True) if path not in newest]
    if config.where == "off":
        waiting = []
    return {path.name for path in waiting[:WAITING]} | ({best["checkpoint"]} if best else set())
