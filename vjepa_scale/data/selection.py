"""Which records of its data sets a stage draws from, where that is not all of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.labels import few_labels, labels_of
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.data.trajectory_clips import long_enough
from vjepa_scale.recipe import Phase, Recipe, resolve_phases


def kept_records(recipe: Recipe, phases: list[Phase], manifests: Mapping[str, Manifest]) -> dict[str, Ints]:
    """Record numbers, rising, by data set; a data set that is not here gives all.

    Of trajectories, those that last as long as the longest clip. Of labelled clips, ``probe.labels_per_class`` of each
    class, for each of ``probe.label_draws``.
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


def task_classes(recipe: Recipe, manifests: Mapping[str, Manifest]) -> list[str]:
    """The classes of the probe stage."""
    return task_of(resolve_phases(recipe, "probe"), manifests).classes


def keeps_tokens(recipe: Recipe, phase: Phase) -> bool:
    """Whether the steps of a phase need no clips, as the tokens of all were kept before."""
    return phase.kind == "probe" and recipe.probe is not None and recipe.probe.keep_tokens


def few_of(recipe: Recipe, manifest: Manifest, *, per_class: int | None, skip: int = 0) -> Ints:
    """Of a labelled data set, so many records of each class, by ``data.seed``; None: all."""
    labels = labels_of(manifest)
    if per_class is None:
        return np.arange(manifest.records)
    try:
        return few_labels(labels, per_class=per_class, seed=recipe.data.seed, skip=skip)
    except ValueError as error:
        fix = "fewer probe.labels_per_class, probe.label_draws or probe.choose_per_class, or more videos"
        raise UserError(str(error), where=manifest.folder / MANIFEST, fix=fix) from None


def records_of_draw(recipe: Recipe, manifest: Manifest, draw: int) -> Ints:
    """The records of one of a probe stage's draws of labels; where all are trained on, there is one draw."""
    assert recipe.probe is not None, "a stage of this kind"
    per_class = recipe.probe.labels_per_class
    return few_of(recipe, manifest, per_class=per_class, skip=draw * (per_class or 0))


def label_draws(recipe: Recipe, manifest: Manifest) -> Ints:
    """Of each record, the number of the draw that it is in; -1: in none."""
    assert recipe.probe is not None, "a stage of this kind"
    numbers = np.full(manifest.records, -1, np.int64)
    for draw in range(recipe.probe.label_draws):
        numbers[records_of_draw(recipe, manifest, draw)] = draw
    return numbers


def choice_records(recipe: Recipe, manifest: Manifest) -> Ints:
    """The records of a probe's training set that it is not trained on, but its setting chosen; none: not asked for."""
    assert recipe.probe is not None, "a stage of this kind"
    if recipe.probe.choose_per_class is None:
        return np.arange(0)
    skip = _trained_per_class(recipe) or 0
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
    kept = few_of(recipe, manifests[name], per_class=_trained_per_class(recipe))
    return kept if recipe.probe.labels_per_class else np.setdiff1d(kept, chosen_on)


def _trained_per_class(recipe: Recipe) -> int | None:
    """Records of each class that a probe stage trains on, over all its draws; None: all."""
    assert recipe.probe is not None, "a stage of this kind"
    few = recipe.probe.labels_per_class
    return None if few is None else few * recipe.probe.label_draws


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
