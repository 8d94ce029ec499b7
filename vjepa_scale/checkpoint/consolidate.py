"""From a sharded checkpoint to files that other tools load, one tensor in memory at a time."""

import json
import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.consolidated import ConsolidatedConfig, read_config, write_consolidated
from vjepa_scale.checkpoint.reader import CheckpointReader
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.load import validate_recipe

# Where a run's result is: the last stage that has checkpoints.
LAST_STAGE_FIRST = ("cooldown", "pretrain")

Weights = Literal["target", "context"]


def consolidate(source: Path, out: Path, *, weights: Weights = "target") -> Path:
    """Write ``out``/model.safetensors and config.json, each whole or not at all; returns ``out``.

    source:  a checkpoint, or a stage's or a run's folder, of which the newest good one is taken (of a run, the
             last stage's)
    out:     a new or empty folder, or one that holds this same result, which is written again
    weights: encoder.* is the EMA target encoder, or the context encoder that was trained

    Needs no process group; it holds at most one whole tensor and one shard of it at a time. Every file is
    verified before it is read. Raises UserError where there is nothing good to read, or ``out`` holds something else.
    """
    checkpoint = find_checkpoint(source)
    manifest = store.read_manifest(checkpoint)
    recipe = validate_recipe(manifest["recipe"], source=checkpoint / store.MANIFEST)
    config = ConsolidatedConfig(
        model=recipe.model,
        weights=weights,
        stage=manifest["stage"],
        step=manifest["step"],
        mean=recipe.data.augment.mean,
        std=recipe.data.augment.std,
        frames=manifest["frames"],
        size=tuple(manifest["size"]),
        fps=manifest["fps"],
        recipe=manifest["recipe"],
    )
    _refuse_other_content(out, config)
    reader = CheckpointReader(checkpoint)
    stored = reader.tensors()
    prefixes = {"encoder.": "target_encoder." if weights == "target" else "encoder.", "predictor.": "predictor."}
    names = {
        ours + name.removeprefix(theirs): name
        for ours, theirs in prefixes.items()
        for name in stored
        if name.startswith(theirs)
    }
    for theirs in prefixes.values():
        if not any(name.startswith(theirs) for name in names.values()):
            raise UserError(f"it holds no tensor {theirs}*", where=checkpoint, fix="give a pretraining checkpoint")
    write_consolidated(
        out,
        config,
        entries=[(ours, tuple(stored[name][0]), stored[name][1]) for ours, name in names.items()],
        read=lambda ours: read_tensor(reader, names[ours]),
    )
    return out


def _refuse_other_content(out: Path, config: ConsolidatedConfig) -> None:
    """Raise UserError unless ``out`` is new, empty or holds the result that ``config`` describes."""
    if out.exists() and not out.is_dir():
        raise UserError("--out is a file", where=out, fix="give another --out")
    # What a kill left under a temporary name is nobody's.
    if not out.exists() or all(path.name.startswith(".") and path.name.endswith(".tmp") for path in out.iterdir()):
        return
    fix = "give another --out, or remove this one"
    try:
        found = read_config(out)
    except UserError:
        raise UserError("not empty, and not a result of this program", where=out, fix=fix) from None
    if found != config:
        before, now = (f"the {c.weights} encoder of {c.stage} at step {c.step}" for c in (found, config))
        other = f", not {now}" if before != now else " of another run"
        raise UserError(f"holds {before}{other}", where=out, fix=fix)


def read_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """One whole tensor out of its shards."""
    shape, dtype = reader.tensors()[name]
    whole = {name: torch.empty(shape, dtype=dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as intended
        dcp.load(whole, storage_reader=reader, no_dist=True)
    return whole[name]


def find_checkpoint(source: Path, *, check: bool = True) -> Path:
    """The checkpoint that a path means: itself, or the newest good one of a stage or a run.

    check: verify the bytes of its files; False looks at manifests and sizes only. Raises UserError.
    """
    if not source.exists():
        raise UserError("no such folder", where=source, fix="give a run, a stage or a checkpoint folder")
    if (source / store.MANIFEST).exists() or source.name.startswith("step_"):
        _refuse_shards(source)
        if check:
            store.verify(source)
        return source
    stages = (source / stage / "checkpoints" for stage in LAST_STAGE_FIRST)
    for folder in (source, source / "checkpoints", *stages):
        found = store.find_latest(folder) if check else store.newest_name(folder)
        if found is not None:
            return found
    raise UserError("no checkpoint in it", where=source, fix="give a run, a stage or a checkpoint folder")


def _refuse_shards(folder: Path) -> None:
    """A folder of shards has a manifest.json too; it is not a damaged checkpoint."""
    try:
        content = json.loads((folder / store.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return  # the store says what is wrong with it
    if isinstance(content, dict) and content.keys() >= {"shards", "columns"}:
        raise UserError(
            "a folder of shards (training data)", where=folder, fix="give a run, a stage or a checkpoint folder"
        )
