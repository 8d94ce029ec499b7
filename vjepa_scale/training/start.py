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
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.masking import check_masks
from vjepa_scale.recipe import Phase, Recipe, resolve_phases
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.phases import accumulation


@dataclass(frozen=True)
class Start:
    """Where a stage starts.

    step:  the next global step, which is the number of completed ones
    first: the global step at which the stage began
    base:  clips that had been drawn from each data set when the stage began
    """

    kind: Literal["fresh", "resume", "continue", "init"]
    checkpoint: Path | None = None
    step: int = 0
    first: int = 0
    base: dict[str, int] = field(default_factory=dict)


def stage_folder(recipe: Recipe, stage: str) -> Path:
    return Path(recipe.run.dir) / stage


def checkpoints_folder(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / "checkpoints"


def find_start(recipe: Recipe, stage_name: str, manifests: Mapping[str, Manifest]) -> Start:
    """Decide where the stage starts. Every rank calls it and gets the same answer.

    manifests: of today's data sets. One that is not what a finished step was drawn from makes a resume
    impossible; a stage that continues from elsewhere counts such a data set from its first epoch.
    Raises UserError where a checkpoint that was asked for is absent, unfinished or damaged: a stage never
    starts from scratch instead.
    """
    own = store.find_latest(checkpoints_folder(recipe, stage_name))
    if own is not None:
        _refuse_rewritten_history(recipe, stage_name, manifests, own)
        manifest = store.read_manifest(own)
        return Start("resume", own, manifest["step"], manifest["first"], manifest["base"])
    stage = recipe.stages()[stage_name]
    if stage.continue_from is not None:
        source = _source(recipe, stage_name, "continue_from", stage.continue_from)
        manifest = store.read_manifest(source)
        base = {
            name: manifest["drawn"][name]
            for name, data_set in manifests.items()
            if manifest["data"].get(name) == data_set.identity
        }
        return Start("continue", source, manifest["step"], manifest["step"], base)
    if stage.init_from is not None:
        return Start("init", _source(recipe, stage_name, "init_from", stage.init_from))
    return Start("fresh")


def _source(recipe: Recipe, stage_name: str, word: str, value: str, *, verify: bool = True) -> Path:
    """The checkpoint that ``continue_from`` or ``init_from`` names: a stage, a stage's folder or a checkpoint.

    verify: read every byte of it; without, only its manifest and the sizes of its files are looked at
    """
    key = f"{stage_name}.{word}"
    if value in recipe.stages():
        folder, must_end_at = checkpoints_folder(recipe, value), resolve_phases(recipe, value)[-1].end
    else:
        path = Path(value)
        if (path / store.MANIFEST).exists():
            if verify:
                store.verify(path)
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
    return latest


def stage_phases(recipe: Recipe, stage_name: str, start: Start) -> list[Phase]:
    return resolve_phases(recipe, stage_name, first=start.first)


def is_finished(recipe: Recipe, stage_name: str) -> bool:
    """Does the stage have its last checkpoint? (Looks at names and manifests only.)"""
    newest = store.newest_name(checkpoints_folder(recipe, stage_name))
    if newest is None:
        return False
    manifest = store.read_manifest(newest)
    return manifest["step"] == resolve_phases(recipe, stage_name, first=manifest["first"])[-1].end


def open_data(recipe: Recipe) -> dict[str, Manifest]:
    """The manifests of all data sets, in the recipe's order. Raises UserError naming the key."""
    manifests = {}
    for name, config in recipe.data.sets.items():
        try:
            manifests[name] = Manifest.open(Path(config.path))
        except UserError as error:
            raise UserError(error.what, where=f"data.sets.{name}.path: {error.where}", fix=error.fix) from None
    return manifests


def data_order(recipe: Recipe, manifests: dict[str, Manifest], phases: list[Phase], base: dict[str, int]) -> DataOrder:
    return DataOrder(
        seed=recipe.data.seed,
        sets=[(name, manifest.records_per_shard) for name, manifest in manifests.items()],
        phases=phases,
        base=base,
        lanes=recipe.data.lanes,
    )


def preflight(recipe: Recipe, stage_name: str, *, world_size: int, will_have_run: set[str]) -> None:
    """Everything about a stage that can be refused before a process starts.

    will_have_run: stages that this same launch runs before, whose checkpoints need not exist yet.
    """
    phases = resolve_phases(recipe, stage_name)
    for phase in phases:
        accumulation(phase, dp_world_size=world_size)
        check_masks(recipe.masks, grid=phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet))
    if world_size % recipe.engine.replicate:
        raise UserError(
            f"{world_size} processes do not divide into {recipe.engine.replicate} replicas",
            where="engine.replicate",
            fix="a divisor of launch.nodes × launch.tasks_per_node",
        )
    manifests = open_data(recipe)
    stage = recipe.stages()[stage_name]
    own = store.newest_name(checkpoints_folder(recipe, stage_name))
    if own is not None:
        _refuse_rewritten_history(recipe, stage_name, manifests, own)
    else:
        for word, value in (("continue_from", stage.continue_from), ("init_from", stage.init_from)):
            if value is not None and value not in will_have_run:
                _source(recipe, stage_name, word, value, verify=False)
    data_order(recipe, manifests, phases, {})


def _refuse_rewritten_history(recipe: Recipe, stage_name: str, manifests: Mapping[str, Manifest], path: Path) -> None:
    """Resume must continue what was trained: the steps done must be the same under today's recipe and data.

    path: the stage's own checkpoint. Later steps may change (a stage may be made longer), and so may what no
    number depends on. Raises UserError with what differs.
    """
    manifest = store.read_manifest(path)
    done = validate_recipe(manifest["recipe"], source=path / store.MANIFEST)
    changed = []
    for section in ("model", "masks", "jepa", "optimizer"):
        if getattr(done, section) != getattr(recipe, section):
            changed.append(section)
    if done.run.seed != recipe.run.seed:
        changed.append("run.seed")
    if done.engine.precision != recipe.engine.precision:
        changed.append("engine.precision")
    elsewhere = {"workers", "prefetch", "sets"}  # what no number depends on; sets: by identity and mixture, below
    if done.data.model_dump(exclude=elsewhere) != recipe.data.model_dump(exclude=elsewhere):
        changed.append("data")
    if list(done.data.sets) != list(recipe.data.sets):
        changed.append("names or order of data.sets")
    step, first = manifest["step"], manifest["first"]
    if _trained(resolve_phases(done, stage_name, first=first), step) != _trained(
        resolve_phases(recipe, stage_name, first=first), step
    ):
        changed.append(f"{stage_name} (steps 0 to {step - 1})")
    if changed:
        raise UserError(
            f"the recipe differs from the one that trained {path}: {', '.join(changed)}",
            where="resume",
            fix="put it back, choose another run.dir, or start another run with init_from or continue_from",
        )
    for name, data_set in manifests.items():
        if manifest["data"].get(name) != data_set.identity:
            raise UserError(
                f"not the shards that {path} was trained on",
                where=f"data.sets.{name}.path",
                fix="put them back, or start another run with continue_from or init_from",
            )


def _trained(phases: list[Phase], step: int) -> list[tuple[Any, ...]]:
    """What the steps before ``step`` were trained with."""
    out = []
    for phase in phases:
        if phase.first >= step:
            break
        last = min(phase.end, step) - 1
        geometry = (phase.frames, phase.size, phase.global_batch, tuple(phase.mixture.items()))
        out.append((phase.first, last, phase.lr(phase.first), phase.lr(last), *geometry))
    return out
