"""Decides where a stage starts: fresh, from its own newest checkpoint, or from another one.

Three different terms: *resume* (the stage continues from its own newest checkpoint, always tried first),
``continue_from`` (weights, EMA, optimiser and step continue from another stage or checkpoint) and ``init_from``
(weights only, step 0).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.manifest import identity, set_aside
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.stage import UNTRAINED
from vjepa_scale.training.load_weights import check_foreign
from vjepa_scale.training.planned_start import DamagedEndError, carried, end_checkpoint, source_of, starts_elsewhere
from vjepa_scale.training.preflight import refuse_other_data, refuse_other_recipe

# All ranks decide together, and every byte is verified.
_read_source = partial(source_of, newest=store.find_latest, last=store.find_last, verify=store.verify)


@dataclass(frozen=True)
class Start:
    """Where a stage starts.

    step:  the next global step, which is the number of completed ones
    first: the global step at which the stage began
    base:  clips that had been drawn from each data set when the stage began
    foreign: the checkpoint is not a training checkpoint of ours (training/load_weights.py)
    """

    kind: Literal["fresh", "resume", "continue", "init"]
    checkpoint: Path | None = None
    step: int = 0
    first: int = 0
    base: dict[str, int] = field(default_factory=dict)
    foreign: bool = False

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the checkpoint, which must be a training checkpoint of ours. Read once."""
        assert self.checkpoint is not None and not self.foreign, "a training checkpoint of ours"  # noqa: PT018
        return store.read_manifest(self.checkpoint)


def find_start(stage: Stage, manifests: Mapping[str, Manifest]) -> Start:
    """Decides where the stage starts. Every rank calls it and gets the same result.

    manifests: of the present data sets; a resume needs the data sets from which the finished steps were drawn
    Raises UserError if a checkpoint of the recipe is absent, unfinished or damaged: a stage never starts fresh
    instead.
    """
    own = store.find_latest(stage.checkpoints)
    if own is not None:
        refuse_other_recipe(stage, own)
        refuse_other_data(manifests, own)
        manifest = store.read_manifest(own)
        return Start("resume", own, manifest["step"], manifest["first"], manifest["base"])
    if stage.starts_from in (None, UNTRAINED):
        return Start("fresh")
    kind: Literal["continue", "init"] = "continue" if stage.starts_by == "continue_from" else "init"
    if starts_elsewhere(stage):
        step = check_foreign(stage)
        return Start(kind, Path(str(stage.starts_from)), step, step, foreign=True)
    source = _verified_source(stage)
    if kind == "init":
        return Start("init", source)
    step = store.read_manifest(source)["step"]
    return Start("continue", source, step, step, carried(stage, manifests, source))


def _verified_source(stage: Stage) -> Path:
    """``source_of`` that verifies every byte. If the last checkpoint of an earlier stage is damaged, sets it aside:
    that stage is then not finished."""
    try:
        return _read_source(stage)
    except DamagedEndError:
        if process_group.is_main():
            set_aside(end_checkpoint(stage.earlier[str(stage.starts_from)]))
        raise


def origin_of(start: Start) -> dict[str, Any]:
    """Returns the source of a stage's initial weights, for its manifests; of a resume, as recorded. Empty: fresh."""
    if start.checkpoint is None:
        return {}
    if start.foreign:
        return {"path": str(start.checkpoint)}
    manifest = start.manifest
    if start.kind == "resume":
        return manifest.get("origin", {})
    return {
        "path": str(start.checkpoint),
        "stage": manifest["stage"],
        "step": manifest["step"],
        "identity": identity(manifest),
    }
