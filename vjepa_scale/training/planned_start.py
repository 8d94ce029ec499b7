"""Finds what a stage starts from by names and manifests: its first step, the order of its data, the source checkpoint.

Without PyTorch, so that launchers and dry runs are quick. Only foreign weights are opened, by the code that loads them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.manifest import (
    MANIFEST,
    is_checkpoint,
    is_foreign,
    last_name,
    name_of,
    newest_name,
    read_manifest,
    trained_kind,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.data.stage_data import data_order, open_data
from vjepa_scale.recipe import Phase, Recipe, Stage, load_recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.networks import refuse_other_model
from vjepa_scale.recipe.schedules import scheduled_after
from vjepa_scale.recipe.stage import CHECKPOINTS, UNTRAINED
from vjepa_scale.run.ledger import LEDGER, read_spikes
from vjepa_scale.training.spikes import SpikeLog


def load_for_training(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """``load_recipe`` for training: a started run keeps the recorded values of keys whose default has changed since."""
    recipe = load_recipe(path, overrides)
    kept = []
    for stage in stages_of(recipe).values():
        keys = [key for key in stage.kept_defaults if getattr(stage.config, key) is None]
        then = _recorded(stage) if keys else {}
        kept += [f"{stage.name}.{key}={then[key]}" for key in keys if then.get(key) is not None]
    return load_recipe(path, [*overrides, *kept]) if kept else recipe


def _recorded(stage: Stage) -> dict[str, Any]:
    """Returns a stage's section from its newest checkpoint, or else from the run's last launch; empty: neither."""
    own = newest_name(stage.checkpoints)
    if own is not None:
        return read_manifest(own)["recipe"].get(stage.name, {})
    launched = Path(stage.recipe.run.dir) / "recipe.yaml"
    with suppress(UserError):  # the next launch rewrites a damaged one
        if launched.is_file():
            return load_recipe(launched).model_dump(mode="json", exclude_none=True).get(stage.name, {})
    return {}


def planned_first(stage: Stage) -> int:
    """Returns the global step at which a stage begins, or began."""
    own = newest_name(stage.checkpoints)
    if own is not None:
        return read_manifest(own)["first"]
    before = stage.config.continue_from
    if before is None:
        return 0
    if before in stage.earlier:
        return end_of(stage.earlier[before])
    if is_foreign(before):
        return foreign_step(stage)
    return read_manifest(source_of(stage))["step"]


def planned_order(stage: Stage) -> tuple[list[Phase], DataOrder, dict[str, Manifest]]:
    """Returns a stage's phases, the order of its data, and the manifests, as they were or will be trained."""
    manifests = open_data(stage)
    phases = stage.phases_from(planned_first(stage))
    own = newest_name(stage.checkpoints)
    before = stage.config.continue_from
    if own is not None:
        base = read_manifest(own)["base"]
    elif before is None or (before not in stage.earlier and is_foreign(before)):
        base = {}
    elif before in stage.earlier:
        base = planned_order(stage.earlier[before])[1].drawn(phases[0].first)
    else:
        base = carried(stage, manifests, source_of(stage))
    spikes = SpikeLog(read_spikes(Path(stage.recipe.run.dir) / LEDGER, stage.name))
    return phases, data_order(stage, manifests, phases, base, left_out=spikes.left_out()), manifests


def end_of(stage: Stage) -> int:
    """Returns the global step at which a stage ends."""
    return stage.phases_from(planned_first(stage))[-1].end


def end_checkpoint(stage: Stage) -> Path:
    """Returns the path of a stage's last checkpoint, which need not exist."""
    return stage.checkpoints / name_of(end_of(stage))


def starts_elsewhere(stage: Stage) -> bool:
    """Returns whether the stage starts from foreign weights, which are not a training checkpoint of ours."""
    value = stage.starts_from
    return value is not None and value != UNTRAINED and value not in stage.earlier and is_foreign(value)


def foreign_step(stage: Stage) -> int:
    """``check_foreign``, imported late because it needs PyTorch."""
    from vjepa_scale.training.load_weights import check_foreign

    return check_foreign(stage)


def starts_from_the_same(done: Stage, today: Stage, origin: Mapping[str, Any]) -> bool:
    """Returns whether the stage's source is the one that it began with, even if it was moved or is spelled differently.

    done:   the stage by the recipe that it was trained with
    origin: the source of its initial weights, from the manifests of its checkpoints
    Checkpoints are compared by identity; foreign weights, which have none, by path.
    """
    then, now = str(done.starts_from), str(today.starts_from)
    if done.starts_by != today.starts_by or today.starts_from in (None, UNTRAINED):
        return False
    by_path = then not in (UNTRAINED, *done.earlier) and now not in today.earlier
    if by_path and Path(then).resolve() == Path(now).resolve():
        return True
    if "identity" not in origin:
        return False
    path = today.earlier[now].folder if now in today.earlier else Path(now)
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    return any(is_checkpoint(place, origin["identity"]) for place in (path, folder / name_of(origin["step"])))


class DamagedEndError(UserError):
    """The last checkpoint of a stage that another one starts from is damaged."""


def source_of(
    stage: Stage,
    *,
    newest: Callable[[Path], Path | None] = newest_name,
    last: Callable[[Path], Path | None] = last_name,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Returns the checkpoint that a stage starts from. Its key names a stage, a stage's folder or a checkpoint.

    newest, last, verify: find a folder's newest good checkpoint and its last one, and verify a checkpoint; the
                          defaults read only manifests and sizes of files
    Raises DamagedEndError if a stage of this recipe has reached its end, but its last checkpoint is damaged.
    """
    value, key = str(stage.starts_from), f"{stage.name}.{stage.starts_by}"
    before = stage.earlier.get(value)
    if before is not None:
        folder, must_end_at = before.checkpoints, end_of(before)
    else:
        path = Path(value)
        if not path.exists():
            raise UserError(
                "no such file or folder",
                where=f"{key}: {value}",
                fix="a stage's folder, a checkpoint or weights by path, or a stage: "
                f"{', '.join(stage.recipe.stages())}",
            )
        if (path / MANIFEST).exists():
            if verify is not None:
                verify(path)
            _refuse_unfit(stage, path)
            return path
        folder, must_end_at = (path if path.name == "checkpoints" else path / "checkpoints"), None
    latest = newest(folder) if must_end_at is not None else last(folder)
    if latest is None:
        raise UserError(
            f"{value!r} has no checkpoint in {folder}",
            where=key,
            fix="run that stage first, or give a checkpoint's path",
        )
    if before is not None and (step := read_manifest(latest)["step"]) != must_end_at:
        if (end := end_checkpoint(before)).is_dir():
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
    _refuse_unfit(stage, latest)
    return latest


def _refuse_unfit(stage: Stage, source: Path) -> None:
    """Raises UserError for another objective, for ``continue_from``; another model; or the middle of a schedule."""
    manifest = read_manifest(source)
    then = validate_recipe(manifest["recipe"], source=source / MANIFEST)
    if stage.starts_by == "continue_from" and trained_kind(manifest, where=source) != stage.kind:
        raise UserError(
            f"{source} is of stage {manifest['stage']}, with another objective: {stage.name} cannot continue from it",
            where=f"{stage.name}.continue_from",
            fix="init_from, which takes its weights",
        )
    try:
        # Heads and positions have no tensors, so shapes cannot show that they differ: compare the models' sections.
        refuse_other_model(then.model, stage.recipe.model, where=source, networks=stage.networks_at_start)
    except UserError as error:
        raise UserError(error.what, where=f"{stage.name}.{stage.starts_by}: {error.where}", fix=error.fix) from None
    if stage.starts_by == "continue_from" and stage.starts_from not in stage.earlier:
        _refuse_lost_schedules(stage, stages_of(then)[manifest["stage"]], manifest, source)


def _refuse_lost_schedules(stage: Stage, before: Stage, manifest: Mapping[str, Any], source: Path) -> None:
    """A checkpoint by path, whose scheduled values the constants of this recipe would replace without a word."""
    begins_with = {"weight_decay": stage.optimizer.weight_decay, "ema_momentum": stage.recipe.jepa.ema_momentum}
    for key, reached in scheduled_after(before, first=manifest["first"], step=manifest["step"]).items():
        given = getattr(stage.config.phases[0], key) or getattr(stage.config, key)
        says = (given is not None and given.start is not None) or (key == "weight_decay" and stage.config.optimizer)
        if not says and not math.isclose(reached, begins_with[key], rel_tol=1e-9):
            where = f"{stage.name}.{key}" if given is None else f"{stage.name}.{key}.start"
            raise UserError(
                f"{source} has come to {reached:g} by its schedule, and {stage.name} would go on with the recipe's "
                f"{begins_with[key]:g}",
                where=where,
                fix=f"{where}={reached:.12g}, or ={begins_with[key]:g} if that is meant",
            )


def carried(stage: Stage, manifests: Mapping[str, Manifest], source: Path) -> dict[str, int]:
    """Returns the number of clips drawn from each data set before a stage that continues from ``source``.

    A data set whose order has changed (other shards, seed or lanes) begins with its first epoch.
    """
    manifest = read_manifest(source)
    data = manifest["recipe"]["data"]
    if (data["seed"], data["lanes"]) != (stage.recipe.data.seed, stage.recipe.data.lanes):
        return {}
    if stage.draws_some_records:  # the records may have changed
        return {}
    return {
        name: manifest["drawn"][name]
        for name, data_set in manifests.items()
        if manifest["data"].get(name) == data_set.identity
    }
