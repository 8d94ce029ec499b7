"""Where does a stage start? Fresh, from its own last checkpoint, or from another run's.

Three words that are never mixed: *resume* (this stage goes on from its own newest checkpoint, always tried
first), ``continue_from`` (weights, EMA, optimiser and step go on from another stage or checkpoint) and
``init_from`` (weights only, step 0).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.finding import name_of
from vjepa_scale.checkpoint.formats.source import refuse_other_model
from vjepa_scale.checkpoint.manifest import identity
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.kept import kept_records
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.masking import check_masks
from vjepa_scale.parallel.engine import check_installed
from vjepa_scale.recipe import Phase, Recipe, resolve_phases
from vjepa_scale.recipe.folders import checkpoints_folder
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.phases import MASKED, accumulation, kind_of, stage_sets
from vjepa_scale.training.evaluated import is_evaluated
from vjepa_scale.training.foreign import check_foreign, is_foreign
from vjepa_scale.training.initial import networks_from
from vjepa_scale.training.recipe_changes import recipe_changes

UNTRAINED = "untrained"  # of a probe: its encoder is a fresh one, to compare with


@dataclass(frozen=True)
class Start:
    """Where a stage starts.

    step:  the next global step, which is the number of completed ones
    first: the global step at which the stage began
    base:  clips that had been drawn from each data set when the stage began
    foreign: the checkpoint is not a training checkpoint of ours (training/foreign.py)
    """

    kind: Literal["fresh", "resume", "continue", "init"]
    checkpoint: Path | None = None
    step: int = 0
    first: int = 0
    base: dict[str, int] = field(default_factory=dict)
    foreign: bool = False


def find_start(recipe: Recipe, stage_name: str, manifests: Mapping[str, Manifest]) -> Start:
    """Decide where the stage starts. Every rank calls it and gets the same answer.

    manifests: of today's data sets. One that is not what a finished step was drawn from makes a resume
    impossible.
    Raises UserError where a checkpoint that was asked for is absent, unfinished or damaged: a stage never
    starts from scratch instead.
    """
    own = store.find_latest(checkpoints_folder(recipe, stage_name))
    if own is not None:
        refuse_other_recipe(recipe, stage_name, own)
        _refuse_other_data(manifests, own)
        manifest = store.read_manifest(own)
        return Start("resume", own, manifest["step"], manifest["first"], manifest["base"])
    stage = recipe.stages()[stage_name]
    elsewhere = stage.continue_from or stage.init_from
    if elsewhere is not None and elsewhere not in (UNTRAINED, *recipe.stages()) and is_foreign(elsewhere):
        step = check_foreign(recipe, stage_name)
        kind: Literal["continue", "init"] = "init" if stage.continue_from is None else "continue"
        return Start(kind, Path(elsewhere), step, step, foreign=True)
    if stage.continue_from is not None:
        source = _source(recipe, stage_name, "continue_from", stage.continue_from)
        step = store.read_manifest(source)["step"]
        return Start("continue", source, step, step, _carried(recipe, stage_name, manifests, source))
    if stage.init_from == UNTRAINED:
        return Start("fresh")
    if stage.init_from is not None:
        return Start("init", _source(recipe, stage_name, "init_from", stage.init_from))
    return Start("fresh")


def origin_of(start: Start) -> dict[str, Any]:
    """Where a stage's first weights came from, in words for its checkpoints: a resume has its own's. Empty: fresh."""
    if start.checkpoint is None:
        return {}
    if start.foreign:
        return {"path": str(start.checkpoint)}
    manifest = store.read_manifest(start.checkpoint)
    if start.kind == "resume":
        return manifest.get("origin", {})
    return {
        "path": str(start.checkpoint),
        "stage": manifest["stage"],
        "step": manifest["step"],
        "identity": identity(manifest),
    }


def _source(recipe: Recipe, stage_name: str, word: str, value: str, *, verify: bool = True) -> Path:
    """The checkpoint that ``continue_from`` or ``init_from`` names: a stage, a stage's folder or a checkpoint.

    verify: read every byte of it; without, only its manifest and the sizes of its files are looked at
    """
    key = f"{stage_name}.{word}"
    if value in recipe.stages():
        folder, must_end_at = checkpoints_folder(recipe, value), _end_of(recipe, value)
    else:
        path = Path(value)
        if (path / store.MANIFEST).exists():
            if verify:
                store.verify(path)
            _refuse_other_kind(stage_name, word, path)
            _refuse_other_model(recipe, stage_name, word, path)
            return path
        folder, must_end_at = (path if path.name == "checkpoints" else path / "checkpoints"), None
    latest = store.find_latest(folder) if verify else store.newest_name(folder)
    if latest is None:
        raise UserError(
            f"{value!r} has no checkpoint in {folder}",
            where=key,
            fix="run that stage first, or give a checkpoint's path",
        )
    if must_end_at is not None and (step := store.read_manifest(latest)["step"]) != must_end_at:
        raise UserError(
            f"stage {value!r} stands at step {step}, its end is {must_end_at}",
            where=key,
            fix=f"finish {value!r} first, or give {latest} itself to start from there",
        )
    _refuse_other_kind(stage_name, word, latest)
    _refuse_other_model(recipe, stage_name, word, latest)
    return latest


def _refuse_other_kind(stage_name: str, word: str, source: Path) -> None:
    """Only a stage of the same objective can go on with an optimiser's state."""
    then = store.read_manifest(source)["stage"]
    if word == "continue_from" and then != stage_name and not {then, stage_name} <= set(MASKED):
        raise UserError(
            f"{source} is of {then}: nothing of {stage_name} can go on from it",
            where=f"{stage_name}.continue_from",
            fix="init_from, which takes its weights",
        )


def _refuse_other_model(recipe: Recipe, stage_name: str, word: str, source: Path) -> None:
    """Heads and positions have no tensors: only the models' words tell whether weights mean the same under both."""
    then = validate_recipe(store.read_manifest(source)["recipe"], source=source / store.MANIFEST).model
    networks = networks_from(recipe, stage_name)
    try:
        refuse_other_model(then, recipe.model, where=source, networks=networks)
    except UserError as error:
        raise UserError(error.what, where=f"{stage_name}.{word}: {error.where}", fix=error.fix) from None


def _carried(recipe: Recipe, stage_name: str, manifests: Mapping[str, Manifest], source: Path) -> dict[str, int]:
    """How many clips each data set has given before a stage that continues from ``source``.

    A data set whose order is another one now (other shards, seed or lanes) begins with its first epoch.
    """
    manifest = store.read_manifest(source)
    data = manifest["recipe"]["data"]
    if (data["seed"], data["lanes"]) != (recipe.data.seed, recipe.data.lanes):
        return {}
    if kind_of(stage_name) != "jepa":  # what it draws from may be other records now
        return {}
    return {
        name: manifest["drawn"][name]
        for name, data_set in manifests.items()
        if manifest["data"].get(name) == data_set.identity
    }


def planned_first(recipe: Recipe, stage_name: str) -> int:
    """The global step that a stage begins, or began, at, by names and manifests only."""
    own = store.newest_name(checkpoints_folder(recipe, stage_name))
    if own is not None:
        return store.read_manifest(own)["first"]
    before = recipe.stages()[stage_name].continue_from
    if before is None:
        return 0
    if before in recipe.stages():
        return _end_of(recipe, before)
    if is_foreign(before):
        return check_foreign(recipe, stage_name)
    return store.read_manifest(_source(recipe, stage_name, "continue_from", before, verify=False))["step"]


def planned_order(recipe: Recipe, stage_name: str) -> tuple[list[Phase], DataOrder, dict[str, Manifest]]:
    """The phases of a stage and the order of its data, as they were or will be trained; and the data."""
    manifests = open_data(recipe, stage_name)
    phases = resolve_phases(recipe, stage_name, first=planned_first(recipe, stage_name))
    own = store.newest_name(checkpoints_folder(recipe, stage_name))
    before = recipe.stages()[stage_name].continue_from
    if own is not None:
        base = store.read_manifest(own)["base"]
    elif before is None or (before not in recipe.stages() and is_foreign(before)):
        base = {}
    elif before in recipe.stages():
        base = planned_order(recipe, before)[1].drawn(phases[0].first)
    else:
        source = _source(recipe, stage_name, "continue_from", before, verify=False)
        base = _carried(recipe, stage_name, manifests, source)
    return phases, data_order(recipe, manifests, phases, base), manifests


def is_finished(recipe: Recipe, stage_name: str) -> bool:
    """Does the stage have its last checkpoint, and a probe stage its result? (Looks at names and manifests only.)"""
    newest = store.newest_name(checkpoints_folder(recipe, stage_name))
    if newest is None:
        return False
    manifest = store.read_manifest(newest)
    end = resolve_phases(recipe, stage_name, first=manifest["first"])[-1].end
    return manifest["step"] == end and is_evaluated(recipe, stage_name, step=end)


def check_finished(recipe: Recipe, stage_name: str) -> None:
    """Refuse a recipe that a finished stage was not trained with: it would be taken for its result."""
    newest = store.newest_name(checkpoints_folder(recipe, stage_name))
    assert newest is not None, "is_finished said so"
    refuse_other_recipe(recipe, stage_name, newest)


def open_data(recipe: Recipe, stage_name: str) -> dict[str, Manifest]:
    """The manifests of a stage's data sets, in the recipe's order. Raises UserError naming the key."""
    manifests = {}
    for name in stage_sets(recipe, stage_name):
        try:
            manifests[name] = Manifest.open(Path(recipe.data.sets[name].path))
        except UserError as error:
            raise UserError(error.what, where=f"data.sets.{name}.path: {error.where}", fix=error.fix) from None
    return manifests


def data_order(
    recipe: Recipe,
    manifests: Mapping[str, Manifest],
    phases: list[Phase],
    base: Mapping[str, int],
    kept: Mapping[str, Ints] | None = None,
) -> DataOrder:
    """kept: as kept_records says, which is asked where it is not given"""
    kept = kept_records(recipe, phases, manifests) if kept is None else kept
    return DataOrder(
        seed=recipe.data.seed,
        sets=[(name, manifest.records_of_shards(kept.get(name))) for name, manifest in manifests.items()],
        phases=phases,
        base=base,
        lanes=recipe.data.lanes,
        kept=kept,
    )


def preflight(recipe: Recipe, stage_name: str, *, world_size: int, will_have_run: set[str]) -> None:
    """Everything about a stage that can be refused before a process starts.

    will_have_run: stages that this same launch runs before, whose checkpoints need not exist yet.
    """
    phases = resolve_phases(recipe, stage_name)
    for phase in phases:
        accumulation(phase, dp_world_size=world_size)
        for frames in phase.geometries if phase.kind == "jepa" else ():
            grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=frames)
            check_masks(recipe.masks, grid=grid)
    check_installed(recipe.engine)
    if world_size % recipe.engine.replicate:
        raise UserError(
            f"{world_size} processes do not divide into {recipe.engine.replicate} replicas",
            where="engine.replicate",
            fix="a divisor of launch.nodes × launch.tasks_per_node",
        )
    manifests = open_data(recipe, stage_name)
    stage = recipe.stages()[stage_name]
    own = store.newest_name(checkpoints_folder(recipe, stage_name))
    if own is not None:
        refuse_other_recipe(recipe, stage_name, own)
        _refuse_other_data(manifests, own)
    else:
        for word, value in (("continue_from", stage.continue_from), ("init_from", stage.init_from)):
            if value is None or value in will_have_run or value == UNTRAINED:
                continue
            if value not in recipe.stages() and is_foreign(value):
                check_foreign(recipe, stage_name)
            else:
                _source(recipe, stage_name, word, value, verify=False)
    data_order(recipe, manifests, phases, {})


def refuse_other_recipe(recipe: Recipe, stage_name: str, path: Path) -> None:
    """Resume must continue what was trained: the steps done must be the same under today's recipe.

    path: the stage's own checkpoint. Later steps may change (a stage may be made longer), and so may what no
    number depends on. Raises UserError with what differs.
    """
    manifest = store.read_manifest(path)
    _refuse_other_origin(recipe, stage_name, path)
    done = validate_recipe(manifest["recipe"], source=path / store.MANIFEST)
    if changed := recipe_changes(done, recipe, stage_name, first=manifest["first"], step=manifest["step"]):
        more = [f"and {len(changed) - 4} more"] if len(changed) > 4 else []
        raise UserError(
            f"the recipe differs from the one that trained {path}: {'; '.join(changed[:4] + more)}",
            where="resume",
            fix="put it back, choose another run.dir, or start another run with init_from or continue_from",
        )


def _refuse_other_origin(recipe: Recipe, stage_name: str, path: Path) -> None:
    """What a stage began with must still be how the stage before it ends."""
    manifest, stage = store.read_manifest(path), recipe.stages()[stage_name]
    origin = manifest.get("origin", {})
    before, began = stage.continue_from, manifest["first"]
    if before is None:  # a frozen encoder, too, is that of one step
        before, began = stage.init_from, origin.get("step")
    if before not in recipe.stages() or began is None:
        return
    again = f"move {path.parent.parent} away to run {stage_name!r} again"
    if (end := _end_of(recipe, before)) != began:
        raise UserError(
            f"{path} goes back to step {began} of {before!r}, which now ends at {end}",
            where=stage_name,
            fix=f"put {before}.steps back, or {again}",
        )
    then, now = origin.get("identity"), checkpoints_folder(recipe, before) / name_of(began)
    if then is not None and (now / store.MANIFEST).exists() and identity(store.read_manifest(now)) != then:
        raise UserError(
            f"{path} goes back to another {now}: {before!r} has been trained again since",
            where=stage_name,
            fix=f"put the first one back, or {again}",
        )


def _end_of(recipe: Recipe, stage_name: str) -> int:
    return resolve_phases(recipe, stage_name, first=planned_first(recipe, stage_name))[-1].end


def _refuse_other_data(manifests: Mapping[str, Manifest], path: Path) -> None:
    trained_on = store.read_manifest(path)["data"]
    for name, data_set in manifests.items():
        if trained_on.get(name) != data_set.identity:
            raise UserError(
                f"not the shards that {path} was trained on",
                where=f"data.sets.{name}.path",
                fix="put them back, or start another run with continue_from or init_from",
            )
