"""Which records of its data sets a stage draws from, where that is not all of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.labels import few_labels, labels_of
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.data.trajectory_clips import long_enough
from vjepa_scale.recipe import Phase, Recipe


def kept_records(recipe: Recipe, phases: list[Phase], manifests: Mapping[str, Manifest]) -> dict[str, Ints]:
    """Record numbers, rising, by data set; a data set that is not here gives all.

    Of trajectories, those that last as long as the longest clip. Of labelled clips, ``probe.labels_per_class`` of each.
    Every rank computes the same. Raises UserError naming the data set's key where it cannot serve the stage.
    """
    if phases[0].kind == "jepa":
        return {}
    drawn = {name for phase in phases for name in phase.mixture}
    of_kind = _trajectories if phases[0].kind == "action" else _labelled
    return {name: of_kind(recipe, phases, name, manifests) for name in manifests if name in drawn}


def task_of(phases: list[Phase], manifests: Mapping[str, Manifest]) -> Manifest:
    """Whose classes a probe stage tells apart: its first data set's."""
    return manifests[next(iter(phases[0].mixture))]


def few_of(recipe: Recipe, manifest: Manifest, *, per_class: int | None, skip: int = 0) -> Ints:
    """Of a labelled data set, so many records of each class, by ``data.seed``; None: all."""
    labels = labels_of(manifest).numpy()
    if per_class is None:
        return np.arange(manifest.records)
    try:
        return few_labels(labels, per_class=per_class, seed=recipe.data.seed, skip=skip)
    except ValueError as error:
        fix = "fewer probe.labels_per_class or probe.choose_per_class, or more videos"
        raise UserError(str(error), where=manifest.folder / MANIFEST, fix=fix) from None


def choice_records(recipe: Recipe, manifest: Manifest) -> Ints:
    """The records of a probe's training set that it is not trained on, but its setting chosen; none: not asked for."""
    assert recipe.probe is not None, "a stage of this kind"
    if recipe.probe.choose_per_class is None:
        return np.arange(0)
    skip = recipe.probe.labels_per_class or 0
    return few_of(recipe, manifest, per_class=recipe.probe.choose_per_class, skip=skip)


def _labelled(recipe: Recipe, phases: list[Phase], name: str, manifests: Mapping[str, Manifest]) -> Ints:
    assert recipe.probe is not None, "a stage of this kind"
    task = task_of(phases, manifests)
    if len(task.classes) < 2:
        raise UserError(
            f"{len(task.classes)} class{'es' * (len(task.classes) != 1)}: there is nothing to tell apart",
            where=task.folder / MANIFEST,
            fix="a data set with at least two classes",
        )
    if manifests[name].identity == manifests[recipe.probe.evaluate_on].identity:
        raise UserError(
            f"the same shards as data.sets.{recipe.probe.evaluate_on}, on which the probes are evaluated",
            where=f"data.sets.{name}.path: {manifests[name].folder}",
            fix="held-out videos of their own",
        )
    for needed in (name, recipe.probe.evaluate_on):
        labels_of(manifests[needed], task.classes)  # all there, and of the task
    chosen_on = choice_records(recipe, manifests[name])
    kept = few_of(recipe, manifests[name], per_class=recipe.probe.labels_per_class)
    return kept if recipe.probe.labels_per_class else np.setdiff1d(kept, chosen_on)


def _trajectories(recipe: Recipe, phases: list[Phase], name: str, manifests: Mapping[str, Manifest]) -> Ints:
    manifest, fix = manifests[name], "make shards with tools/make_shards.py DROID OUT --trajectories droid"
    where = f"data.sets.{name}.path: {Path(manifest.folder)}"
    if "states.size" not in manifest.described:
        raise UserError("these shards have no trajectories", where=where, fix=fix)
    kept = long_enough(manifest, frames=longest_clip(phases, name), fps=recipe.data.fps_of(name))
    fixes = {"states": fix}
    if recipe.model.action_predictor.extrinsics:
        fixes["extrinsics"] = "model.action_predictor.extrinsics=false, or a data set in which all have them"
    for member, fix in fixes.items():
        column = f"{member}.size"
        sizes = manifest.column(column)[kept] if column in manifest.described else np.zeros(len(kept))
        if lacking := int((sizes == 0).sum()):
            what = f"{lacking} of its {len(kept)} trajectories that are long enough have no {member}"
            raise UserError(what, where=where, fix=fix)
    return kept


def longest_clip(phases: list[Phase], name: str) -> int:
    """Frames of the longest clips that the phases draw from a data set."""
    return max(phase.frames_of(name) for phase in phases if name in phase.mixture)
