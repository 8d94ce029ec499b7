"""What can be decided before a stage's processes start: its first step, its data, whether it is finished or refused.

By names, manifests and recipes alone, without PyTorch, so that launchers and dry runs are quick. Only weights of
another format are opened, by the code that loads them.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vjepa_scale.checkpoint.manifest import (
    MANIFEST,
    identity,
    is_foreign,
    last_name,
    name_of,
    newest_first,
    newest_name,
    problems,
    read_manifest,
    size_of,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import count_replicas
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.selection import kept_records
from vjepa_scale.masking.draw import check_masks
from vjepa_scale.recipe import Phase, Recipe, resolve_phases
from vjepa_scale.recipe.folders import checkpoints_folder
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.networks import networks_from, refuse_other_model
from vjepa_scale.recipe.phases import MASKED, accumulation, kind_of, stage_sets
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.training.evaluated import is_evaluated
from vjepa_scale.training.recipe_changes import recipe_changes

UNTRAINED = "untrained"  # of a probe: its encoder is a fresh one, to compare with


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
    count_replicas(recipe.engine.replicate, world_size=world_size, per_node=recipe.launch.tasks_per_node)
    manifests = open_data(recipe, stage_name)
    stage = recipe.stages()[stage_name]
    own = newest_name(checkpoints_folder(recipe, stage_name))
    if own is not None:
        refuse_other_recipe(recipe, stage_name, own)
        refuse_other_data(manifests, own)
    else:
        for word, value in (("continue_from", stage.continue_from), ("init_from", stage.init_from)):
            if value is None or value in will_have_run or value == UNTRAINED:
                continue
            if value not in recipe.stages() and is_foreign(value):
                foreign_step(recipe, stage_name)
            else:
                source_of(recipe, stage_name, word, value)
    data_order(recipe, manifests, phases, {})


def planned_first(recipe: Recipe, stage_name: str) -> int:
    """The global step that a stage begins, or began, at, by names and manifests only."""
    own = newest_name(checkpoints_folder(recipe, stage_name))
    if own is not None:
        return read_manifest(own)["first"]
    before = recipe.stages()[stage_name].continue_from
    if before is None:
        return 0
    if before in recipe.stages():
        return _end_of(recipe, before)
    if is_foreign(before):
        return foreign_step(recipe, stage_name)
    return read_manifest(source_of(recipe, stage_name, "continue_from", before))["step"]


def planned_order(recipe: Recipe, stage_name: str) -> tuple[list[Phase], DataOrder, dict[str, Manifest]]:
    """The phases of a stage and the order of its data, as they were or will be trained; and the data."""
    manifests = open_data(recipe, stage_name)
    phases = resolve_phases(recipe, stage_name, first=planned_first(recipe, stage_name))
    own = newest_name(checkpoints_folder(recipe, stage_name))
    before = recipe.stages()[stage_name].continue_from
    if own is not None:
        base = read_manifest(own)["base"]
    elif before is None or (before not in recipe.stages() and is_foreign(before)):
        base = {}
    elif before in recipe.stages():
        base = planned_order(recipe, before)[1].drawn(phases[0].first)
    else:
        source = source_of(recipe, stage_name, "continue_from", before)
        base = carried(recipe, stage_name, manifests, source)
    return phases, data_order(recipe, manifests, phases, base), manifests


def is_finished(recipe: Recipe, stage_name: str) -> bool:
    """Does the stage have its last checkpoint, and a probe stage its result? (Looks at names and manifests only.)"""
    newest = newest_name(checkpoints_folder(recipe, stage_name))
    if newest is None:
        return False
    manifest = read_manifest(newest)
    end = resolve_phases(recipe, stage_name, first=manifest["first"])[-1].end
    return manifest["step"] == end and is_evaluated(recipe, stage_name, step=end)


def check_finished(recipe: Recipe, stage_name: str) -> None:
    """Refuse a recipe that a finished stage was not trained with: it would be taken for its result."""
    newest = newest_name(checkpoints_folder(recipe, stage_name))
    assert newest is not None, "is_finished said so"
    refuse_other_recipe(recipe, stage_name, newest)


@dataclass(frozen=True)
class Damage:
    """A finished stage's last checkpoint is damaged. good: the one before it, from which it can be trained again."""

    checkpoint: Path
    problem: str
    good: Path


def damage_of(recipe: Recipe, stage_name: str, *, say: Callable[[str], object]) -> Damage | None:
    """Read a finished stage's last checkpoint, every byte; of older ones only where it is damaged.

    Raises UserError where none of them is good. say: gets a line before the reading, which may take minutes
    """
    folder = checkpoints_folder(recipe, stage_name)
    last = newest_name(folder)
    assert last is not None, "is_finished said so"
    say(f"{stage_name} is complete: verifying {last.name} ({size_of(last) / 1e9:.2g} GB)")
    found = problems(last)
    if not found:
        return None
    every = newest_first(folder)
    good = next((other for other in every[every.index(last) + 1 :] if not problems(other)), None)
    if good is None:
        raise UserError(
            f"none of {len(every)} checkpoints is good; {last.name}: {found[0]}",
            where=folder,
            fix="restore one from a copy, or move the folder away to start again on purpose",
        )
    return Damage(last, found[0], good)


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


def end_checkpoint(recipe: Recipe, stage_name: str) -> Path:
    """Where a stage's last checkpoint is, or will be."""
    return checkpoints_folder(recipe, stage_name) / name_of(_end_of(recipe, stage_name))


class DamagedEndError(UserError):
    """The last checkpoint of a stage that another one starts from is damaged."""


def source_of(
    recipe: Recipe,
    stage_name: str,
    word: str,
    value: str,
    *,
    newest: Callable[[Path], Path | None] = newest_name,
    last: Callable[[Path], Path | None] = last_name,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """The checkpoint that ``continue_from`` or ``init_from`` names: a stage, a stage's folder or a checkpoint.

    newest, last, verify: how a folder's newest good checkpoint, and its last one, are found and a checkpoint is
                          checked; by default only its manifest and the sizes of its files are looked at
    Raises DamagedEndError where a stage of this recipe has come to its end, and its last checkpoint is damaged.
    """
    key = f"{stage_name}.{word}"
    if value in recipe.stages():
        folder, must_end_at = checkpoints_folder(recipe, value), _end_of(recipe, value)
    else:
        path = Path(value)
        if not path.exists():
            raise UserError(
                "no such file or folder",
                where=f"{key}: {value}",
                fix=f"a stage's folder, a checkpoint or weights by path, or a stage: {', '.join(recipe.stages())}",
            )
        if (path / MANIFEST).exists():
            if verify is not None:
                verify(path)
            _refuse_other_kind(stage_name, word, path)
            _refuse_other_model(recipe, stage_name, word, path)
            return path
        folder, must_end_at = (path if path.name == "checkpoints" else path / "checkpoints"), None
    latest = newest(folder) if must_end_at is not None else last(folder)
    if latest is None:
        raise UserError(
            f"{value!r} has no checkpoint in {folder}",
            where=key,
            fix="run that stage first, or give a checkpoint's path",
        )
    if must_end_at is not None and (step := read_manifest(latest)["step"]) != must_end_at:
        if (end := end_checkpoint(recipe, value)).is_dir():
            raise DamagedEndError(
                f"the last checkpoint of {value!r}, {end}, is damaged",
                where=key,
                fix=f"launch {value!r} again, which trains it from {latest.name} on, or restore it from a copy",
            )
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
    then = read_manifest(source)["stage"]
    if word == "continue_from" and then != stage_name and not {then, stage_name} <= set(MASKED):
        raise UserError(
            f"{source} is of {then}: nothing of {stage_name} can go on from it",
            where=f"{stage_name}.continue_from",
            fix="init_from, which takes its weights",
        )


def _refuse_other_model(recipe: Recipe, stage_name: str, word: str, source: Path) -> None:
    """Heads and positions have no tensors: only the models' words tell whether weights mean the same under both."""
    then = validate_recipe(read_manifest(source)["recipe"], source=source / MANIFEST).model
    networks = networks_from(recipe, stage_name)
    try:
        refuse_other_model(then, recipe.model, where=source, networks=networks)
    except UserError as error:
        raise UserError(error.what, where=f"{stage_name}.{word}: {error.where}", fix=error.fix) from None


def carried(recipe: Recipe, stage_name: str, manifests: Mapping[str, Manifest], source: Path) -> dict[str, int]:
    """How many clips each data set has given before a stage that continues from ``source``.

    A data set whose order is another one now (other shards, seed or lanes) begins with its first epoch.
    """
    manifest = read_manifest(source)
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


def refuse_other_recipe(recipe: Recipe, stage_name: str, path: Path) -> None:
    """Resume must continue what was trained: the steps done must be the same under today's recipe.

    path: the stage's own checkpoint. Later steps may change (a stage may be made longer), and so may what no
    number depends on. Raises UserError with what differs.
    """
    manifest = read_manifest(path)
    _refuse_other_origin(recipe, stage_name, path)
    done = validate_recipe(manifest["recipe"], source=path / MANIFEST)
    if changed := recipe_changes(done, recipe, stage_name, first=manifest["first"], step=manifest["step"]):
        more = [f"and {len(changed) - 4} more"] if len(changed) > 4 else []
        raise UserError(
            f"the recipe differs from the one that trained {path}: {'; '.join(changed[:4] + more)}",
            where="resume",
            fix="put it back, choose another run.dir, or start another run with init_from or continue_from",
        )


def _refuse_other_origin(recipe: Recipe, stage_name: str, path: Path) -> None:
    """What a stage began with must still be how the stage before it ends."""
    manifest, stage = read_manifest(path), recipe.stages()[stage_name]
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
    if then is not None and (now / MANIFEST).exists() and identity(read_manifest(now)) != then:
        raise UserError(
            f"{path} goes back to another {now}: {before!r} has been trained again since",
            where=stage_name,
            fix=f"put the first one back, or {again}",
        )


def _end_of(recipe: Recipe, stage_name: str) -> int:
    return resolve_phases(recipe, stage_name, first=planned_first(recipe, stage_name))[-1].end


def refuse_other_data(manifests: Mapping[str, Manifest], path: Path) -> None:
    trained_on = read_manifest(path)["data"]
    for name, data_set in manifests.items():
        if trained_on.get(name) != data_set.identity:
            raise UserError(
                f"not the shards that {path} was trained on",
                where=f"data.sets.{name}.path",
                fix="put them back, or start another run with continue_from or init_from",
            )


def foreign_step(recipe: Recipe, stage_name: str) -> int:
    """``check_foreign``, whose reading of weights needs PyTorch."""
    from vjepa_scale.training.load_weights import check_foreign

    return check_foreign(recipe, stage_name)


def check_installed(cfg: EngineConfig) -> None:
    """Raise UserError where the engine's library is not installed. Nothing is imported: for before a job starts."""
    if cfg.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed", where="engine.kind", fix="pip install 'vjepa_scale[deepspeed]', or kind: fsdp"
        )
