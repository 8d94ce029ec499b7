"""The fixed clips that checkpoints are evaluated on (recipe section ``evaluate``). Does not import PyTorch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.manifest import Manifest, few_labels, labels_of
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.evaluate_section import EvaluateConfig

# Draws do not depend on the run's seed, so that runs with other seeds are evaluated on the same clips.
_SEED = 0


@dataclass(frozen=True)
class Chosen:
    """Records of a data set, ascending."""

    manifest: Manifest
    records: list[int]


@dataclass(frozen=True)
class HeldOut:
    """val: the clips that are evaluated; train: labelled examples for k-NN and probe, None without labels."""

    val: Chosen
    train: Chosen | None

    @property
    def classes(self) -> tuple[str, ...]:
        return () if self.train is None else tuple(self.train.manifest.classes)


def choose_held_out(stage: Stage, config: EvaluateConfig) -> HeldOut:
    """Opens the data sets and draws the records. Raises UserError naming the key of a set that cannot be used."""
    val = _opened(stage, config.held_out)
    if config.train is None:
        return HeldOut(_limited(val, config.clips), None)
    train = _opened(stage, config.train)
    labels, _ = labels_of(train), labels_of(val, train.classes)
    if config.labels_per_class == "all":
        return HeldOut(_limited(val, config.clips), Chosen(train, list(range(train.records))))
    try:
        few = few_labels(labels, per_class=config.labels_per_class, seed=_SEED, classes=train.classes)
    except ValueError as error:
        raise UserError(f"{config.train}: {error}", where="evaluate.labels_per_class", fix="fewer") from None
    return HeldOut(_limited(val, config.clips), Chosen(train, few.tolist()))


def _opened(stage: Stage, name: str) -> Manifest:
    try:
        return Manifest.open(Path(stage.recipe.data.sets[name].path))
    except UserError as error:
        raise UserError(error.what, where=f"data.sets.{name}.path: {error.where}", fix=error.fix) from None


def _limited(manifest: Manifest, clips: int) -> Chosen:
    """Draws at random: evenly spaced records could be of a few classes only, because shards may alternate them."""
    if manifest.records <= clips:
        return Chosen(manifest, list(range(manifest.records)))
    return Chosen(manifest, np.sort(KeyedRng(_SEED, "evaluate.clips").shuffled(manifest.records)[:clips]).tolist())
