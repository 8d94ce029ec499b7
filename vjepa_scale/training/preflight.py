"""Checks before a stage's processes start: whether it is finished, and what would stop it.

Reads only names, manifests and recipes, without PyTorch, so that launchers and dry runs are quick. Limits of the nodes
(shared memory, open files) are checked by the ranks: data/host_limits.py.
"""

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vjepa_scale.checkpoint.manifest import (
    MANIFEST,
    identity,
    name_of,
    newest_first,
    newest_name,
    problems,
    read_manifest,
    size_of,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import count_replicas
from vjepa_scale.data.held_out import choose_held_out
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.stage_data import data_order, open_data
from vjepa_scale.recipe import Stage, stages_of
from vjepa_scale.recipe.evaluate_section import evaluation_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.rank_counts import refuse_uneven_batches
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage import UNTRAINED
from vjepa_scale.training.planned_start import (
    end_of,
    foreign_step,
    source_of,
    starts_elsewhere,
    starts_from_the_same,
)
from vjepa_scale.training.recipe_changes import recipe_changes


def preflight(stage: Stage, *, will_have_run: Collection[str]) -> None:
    """Raises UserError for everything about a stage that can be checked before a process starts.

    will_have_run: stages that this launch runs before it, whose checkpoints need not exist yet
    """
    refuse_uneven_batches([stage])
    stage.check_before_launch()
    check_installed(stage.recipe.engine)
    check_sinks_installed(stage.recipe.log.sinks)
    _refuse_absent_ranks(stage)
    count_replicas(stage.recipe.engine.replicate, world_size=stage.world_size, per_node=stage.launch.tasks_per_node)
    manifests = open_data(stage)
    if (evaluate := evaluation_of(stage)) is not None:
        choose_held_out(stage, evaluate)
    own = newest_name(stage.checkpoints)
    if own is not None:
        refuse_other_recipe(stage, own)
        refuse_other_data(manifests, own)
    elif stage.starts_from not in (None, UNTRAINED, *will_have_run):
        if starts_elsewhere(stage):
            foreign_step(stage)
        else:
            source_of(stage)
    data_order(stage, manifests, stage.phases, {})


def _refuse_absent_ranks(stage: Stage) -> None:
    """Raises UserError if ``profile.steps`` asks for ranks that the stage does not have."""
    profile, processes = stage.recipe.profile, stage.world_size
    absent = [rank for rank in profile.ranks if rank >= processes]
    if profile.steps is not None and absent:
        raise UserError(
            f"no rank {absent[0]}: {stage.name!r} has {processes} processes",
            where="profile.ranks",
            fix=f"numbers from 0 to {processes - 1}",
        )


def is_finished(stage: Stage) -> bool:
    """Returns whether the stage has its last checkpoint, and its evaluation if any. Reads names and manifests only."""
    newest = newest_name(stage.checkpoints)
    if newest is None:
        return False
    manifest = read_manifest(newest)
    end = stage.phases_from(manifest["first"])[-1].end
    return manifest["step"] == end and stage.is_complete(end)


def check_finished(stage: Stage) -> None:
    """Raises UserError if a finished stage was trained with another recipe, whose result it is."""
    newest = newest_name(stage.checkpoints)
    assert newest is not None, "the stage is finished"
    refuse_other_recipe(stage, newest)


@dataclass(frozen=True)
class Damage:
    """A finished stage's last checkpoint is damaged. good: the one before it, from which it can be trained again."""

    checkpoint: Path
    problem: str
    good: Path


def damage_of(stage: Stage, *, say: Callable[[str], object]) -> Damage | None:
    """Verifies every byte of a finished stage's last checkpoint; if it is damaged, of earlier ones too.

    say: gets a line before the verification, which may take minutes
    Raises UserError if none of them is good.
    """
    folder = stage.checkpoints
    last = newest_name(folder)
    assert last is not None, "the stage is finished"
    say(f"{stage.name} is complete: verifying {last.name} ({size_of(last) / 1e9:.2g} GB)")
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


def refuse_other_recipe(stage: Stage, path: Path) -> None:
    """Raises UserError with the differences if the recipe would have trained the finished steps differently.

    path: the stage's own checkpoint
    Later steps may change (a stage may become longer), and so may values that do not affect results.
    """
    manifest = read_manifest(path)
    _refuse_other_origin(stage, path)
    done = validate_recipe(manifest["recipe"], source=path / MANIFEST)
    then, step = stages_of(done)[stage.name], manifest["step"]
    same = starts_from_the_same(then, stage, manifest.get("origin", {}))
    if changed := recipe_changes(then, stage, first=manifest["first"], step=step, same_source=same):
        more = [f"and {len(changed) - 4} more"] if len(changed) > 4 else []
        raise UserError(
            f"the recipe differs from the one that trained {path}: {'; '.join(changed[:4] + more)}",
            where="resume",
            fix="put it back, choose another run.dir, or start another run with init_from or continue_from",
        )


def _refuse_other_origin(stage: Stage, path: Path) -> None:
    """Raises UserError if the stage before no longer ends with the checkpoint that this stage started from."""
    manifest, name = read_manifest(path), str(stage.starts_from)
    origin = manifest.get("origin", {})
    # With init_from, ``first`` is 0; the origin has the step of the weights.
    began = manifest["first"] if stage.config.continue_from is not None else origin.get("step")
    before = stage.earlier.get(name)
    if before is None or began is None:
        return
    again = f"move {path.parent.parent} away to run {stage.name!r} again"
    if (end := end_of(before)) != began:
        raise UserError(
            f"{path} goes back to step {began} of {name!r}, which now ends at {end}",
            where=stage.name,
            fix=f"put {name}.steps back, or {again}",
        )
    then, now = origin.get("identity"), before.checkpoints / name_of(began)
    if then is not None and (now / MANIFEST).exists() and identity(read_manifest(now)) != then:
        raise UserError(
            f"{path} goes back to another {now}: {name!r} has been trained again since",
            where=stage.name,
            fix=f"put the first one back, or {again}",
        )


def refuse_other_data(manifests: Mapping[str, Manifest], path: Path) -> None:
    trained_on = read_manifest(path)["data"]
    for name, data_set in manifests.items():
        if trained_on.get(name) != data_set.identity:
            raise UserError(
                f"not the shards that {path} was trained on",
                where=f"data.sets.{name}.path",
                fix="put them back, or start another run with continue_from or init_from",
            )


def check_installed(cfg: EngineConfig) -> None:
    """Raises UserError if the engine's library is not installed. Does not import it: this runs before a job starts."""
    if cfg.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed", where="engine.kind", fix="pip install 'vjepa_scale[deepspeed]', or kind: fsdp"
        )


def check_sinks_installed(sinks: Collection[str]) -> None:
    """Raise UserError where the package of one (``LogConfig.sinks``) is not installed. Nothing is imported."""
    for sink in sinks:
        found = importlib.util.find_spec(sink)
        if found is None or found.origin is None:  # without a file: a folder of that name, such as W&B makes
            raise UserError(f"{sink} is not installed", where=f"log.{sink}", fix=f"pip install 'vjepa_scale[{sink}]'")
