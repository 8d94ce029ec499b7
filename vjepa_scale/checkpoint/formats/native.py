"""Our two formats: the sharded checkpoint of a run, and the consolidated file.

    OUT/
      model.safetensors   encoder.*, predictor.* or action_predictor.*: canonical names; by default the target
                          encoder's weights
      config.json         ConsolidatedConfig, the same JSON as in the file's metadata

model.safetensors also contains the configuration, so this file alone is enough.
"""

import json
import math
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats.source import (
    NETWORKS,
    ConsolidatedConfig,
    Network,
    Weights,
    WeightSource,
    parse_config,
)
from vjepa_scale.checkpoint.manifest import last_name, read_manifest, trained_kind
from vjepa_scale.checkpoint.safetensors_writer import DTYPES, Entry, write_safetensors
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, write_json
from vjepa_scale.core.installed import as_called
from vjepa_scale.recipe.load import load_recipe, validate_recipe
from vjepa_scale.recipe.registry import DEFAULT_KINDS, STAGES, class_of
from vjepa_scale.recipe.stage import CHECKPOINTS, EVALUATION, Stage, stages_of

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METADATA_KEY = "vjepa_scale"

# Canonical prefix → the checkpoint's.
_TRAINED: dict[Weights, dict[str, str]] = {
    "target": {"encoder.": "target_encoder.", "predictor.": "predictor."},
    "context": {"encoder.": "encoder.", "predictor.": "predictor."},
    "both": {"encoder.": "encoder.", "target_encoder.": "target_encoder.", "predictor.": "predictor."},
}


# -- a checkpoint in shards --------------------------------------------------------------------------


def find_checkpoint(source: Path, *, check: bool = True, networks: Container[Network] | None = None) -> Path:
    """Returns the checkpoint of a path: the path itself, or the last checkpoint of a stage or a run.

    check:    verify the bytes of its files; False checks manifests and sizes only
    networks: the requested networks, which select the stage of a run: an action predictor is in the action stage,
              everything else in the last of the stages before it; never a probe stage

    Raises UserError, also where the last checkpoint is damaged: an older one is used only by its own path.
    """
    if not source.exists():
        raise UserError("no such folder", where=source, fix="give a run, a stage or a checkpoint folder")
    if (source / store.MANIFEST).exists() or source.name.startswith("step_"):
        _refuse_shards(source)
        if check:
            store.verify(source)
        return source
    stages = _stages_last_first(source)
    acting = [name for name, stage in stages.items() if "action_predictor" in stage.networks]
    wants_action = networks is not None and "action_predictor" in networks
    # Where no stage of a run trains an encoder, its encoder is the frozen one of the action stage.
    meant = acting if wants_action else [*(name for name in stages if stages[name].has_target_encoder), *acting]
    for folder in (source, source / CHECKPOINTS, *(source / name / CHECKPOINTS for name in meant)):
        found = store.find_last(folder) if check else last_name(folder)
        if found is not None:
            return found
    if wants_action and any((source / name / CHECKPOINTS).is_dir() for name in stages):
        raise UserError(
            "no checkpoint of the action stage in it", where=source, fix="give a run with one, or run that stage"
        )
    probes = [name for name, stage in stages.items() if stage.trains_probes and (source / name / EVALUATION).is_file()]
    if probes:
        raise UserError(
            "no checkpoint of an encoder in it, only of a probe stage",
            where=source,
            fix=f"give {source / probes[0]}, and --to huggingface to export its classifier",
        )
    raise UserError("no checkpoint in it", where=source, fix="give a run, a stage or a checkpoint folder")


def _stages_last_first(run: Path) -> dict[str, type[Stage]]:
    """Returns the stages that a run may have, last first: those of its recipe, and the built-in ones."""
    kinds = dict(DEFAULT_KINDS)
    if (run / "recipe.yaml").is_file():
        kinds |= {name: stage.kind for name, stage in stages_of(load_recipe(run / "recipe.yaml")).items()}
    return {name: class_of(STAGES, kind) for name, kind in reversed(kinds.items())}


def _refuse_shards(folder: Path) -> None:
    """Raises UserError for a folder of shards, whose manifest.json would look like a damaged checkpoint."""
    try:
        content = parse_json((folder / store.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return  # the store reports what is wrong with it
    if isinstance(content, dict) and content.keys() >= {"shards", "columns"}:
        raise UserError(
            "a folder of shards (training data)", where=folder, fix="give a run, a stage or a checkpoint folder"
        )


def open_checkpoint(checkpoint: Path, *, weights: Weights) -> WeightSource:
    """Opens a checkpoint of ours without verifying it again. Needs no process group.

    For action and probe stages, encoder.* is the frozen encoder, a target encoder; the probes are left out.
    """
    manifest = store.read_manifest(checkpoint)
    recipe = validate_recipe(manifest["recipe"], source=checkpoint / store.MANIFEST)
    stage: type[Stage] = class_of(STAGES, trained_kind(manifest, where=checkpoint))
    prefixes = _TRAINED[weights]
    if not stage.has_target_encoder:  # its only encoder is frozen, and a former target encoder
        if weights == "context":
            raise UserError("it holds the target encoder only, frozen", where=checkpoint, fix="ask for target")
        weights, prefixes = "target", {f"{network}.": f"{network}." for network in stage.networks}
    config = ConsolidatedConfig(
        model=recipe.model,
        weights=weights,
        networks=tuple(network for network in NETWORKS if f"{network}." in prefixes),
        stage=manifest["stage"],
        step=manifest["step"],
        mean=recipe.data.augment.mean,
        std=recipe.data.augment.std,
        frames=manifest["frames"],
        size=tuple(manifest["size"]),
        fps=manifest["fps"],
        recipe=manifest["recipe"],
    )
    reader = CheckpointReader(checkpoint)
    stored = reader.tensors()
    names = {
        ours + name.removeprefix(theirs): name
        for ours, theirs in prefixes.items()
        for name in stored
        if name.startswith(theirs)
    }
    for theirs in prefixes.values():
        if not any(name.startswith(theirs) for name in names.values()):
            other = "give the checkpoint of another stage"
            fix = "give a pretraining checkpoint" if stage.has_target_encoder else other
            raise UserError(f"it holds no tensor {theirs}*", where=checkpoint, fix=fix)
    return WeightSource(
        where=checkpoint,
        config=config,
        entries=[(ours, tuple(stored[name][0]), stored[name][1]) for ours, name in names.items()],
        read=lambda ours: _read_sharded(reader, names[ours]),
        kind="a checkpoint",
    )


def _read_sharded(reader: CheckpointReader, name: str) -> Tensor:
    """Reads one whole tensor from its shards; holds it and one shard in memory."""
    shape, dtype = reader.tensors()[name]
    whole = {name: torch.empty(shape, dtype=dtype)}
    reader.fill(whole, alone=True)
    return whole[name]


# -- the consolidated file ---------------------------------------------------------------------------


def write_consolidated(
    folder: Path, config: ConsolidatedConfig, entries: Iterable[Entry], read: Callable[[str], Tensor]
) -> None:
    """Writes both files of a consolidated checkpoint, one tensor in memory at a time.

    entries, read: as for write_safetensors; names start with a network's, such as ``encoder.``
    """
    content = config.model_dump(mode="json")
    # transformers and other readers of safetensors require format: pt.
    write_safetensors(folder / WEIGHTS_FILE, entries, read, {"format": "pt", METADATA_KEY: json.dumps(content)})
    write_json(folder / CONFIG_FILE, content)


def read_native_config(file: Path) -> ConsolidatedConfig:
    """Reads the configuration in a consolidated file. Raises UserError for other files."""
    with open_safetensors(file) as archive:
        metadata = archive.metadata() or {}
    if METADATA_KEY not in metadata:
        raise UserError(
            f"a safetensors file, but not of this project: no {METADATA_KEY!r} in its metadata",
            where=file,
            fix=as_called("give a file written by tools/consolidate.py, or a Hugging Face folder with its config.json"),
        )
    try:
        content = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(
            f"not valid JSON: {error}", where=f"{file}:{METADATA_KEY}", fix="consolidate the checkpoint again"
        ) from None
    return parse_config(content, f"{file}:{METADATA_KEY}")


def open_consolidated(file: Path) -> WeightSource:
    config = read_native_config(file)
    return WeightSource(
        where=file,
        config=config,
        entries=safetensors_entries(file),
        read=lambda name: read_safetensors(file, name),
        kind="a consolidated checkpoint",
    )


# -- safetensors files -------------------------------------------------------------------------------


def open_safetensors(file: Path) -> Any:
    """Opens a file with safetensors' reader. Raises UserError for a damaged file."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"not a whole safetensors file: {error}",
            where=file,
            fix=as_called("copy it again, or consolidate the checkpoint again with tools/consolidate.py"),
        ) from None


def safetensors_entries(file: Path) -> list[Entry]:
    """Reads names, shapes and types from the header only. Raises UserError for types that are not of weights."""
    dtypes = {word: dtype for dtype, word in DTYPES.items()}
    entries: list[Entry] = []
    with open_safetensors(file) as archive:
        for name in archive.keys():  # noqa: SIM118 (safe_open is no mapping)
            piece = archive.get_slice(name)
            if (word := piece.get_dtype()) not in dtypes:
                raise UserError(f"{name} is of type {word}", where=file, fix="give weights in float32 or bfloat16")
            entries.append((name, tuple(piece.get_shape()), dtypes[word]))
    return entries


def read_safetensors(file: Path, name: str) -> Tensor:
    with open_safetensors(file) as archive:
        return archive.get_tensor(name)


# -- a checkpoint in a few lines of text -----------------------------------------------------------


def describe_checkpoint(checkpoint: Path) -> Iterator[str]:
    """Yields lines on a checkpoint's origin, software and hardware, content, and recipe. Reads no tensors."""
    manifest = read_manifest(checkpoint)
    recipe = manifest.get("recipe", {})
    yield f"checkpoint  {checkpoint}"
    yield f"format      {manifest['format']} version {manifest['version']}"
    for key in ("stage", "phase"):
        if key in manifest:
            yield f"{key:<11} {manifest[key]}"
    yield f"step        {manifest['step']}"
    yield f"saved by    {_saved_by(manifest)}"
    if "engine" in recipe:
        yield f"engine      {_engine(recipe['engine'], manifest.get('attention'))}"
    yield "libraries   " + ", ".join(f"{name} {version}" for name, version in manifest["libraries"].items())
    if "frames" in manifest:
        height, width = manifest["size"]
        yield f"clip        {manifest['frames']} frames, {height}×{width} px, {manifest['fps']:g} fps"
    model = recipe.get("model", {})
    if "encoder" in model:
        yield "encoder     " + ", ".join(f"{key} {value}" for key, value in model["encoder"].items())
    if "rope" in model:
        yield f"rope        {model['rope']['layout']}"
    for name, clips in manifest.get("drawn", {}).items():
        yield f"drawn       {name}: {clips} clips"
    for name, identity in manifest.get("data", {}).items():
        yield f"data        {name}: {identity}"
    groups: dict[str, list[int]] = {}
    for name, (shape, dtype) in CheckpointReader(checkpoint).tensors().items():
        network = ".".join(name.split(".")[: 2 if name.startswith("optimizer.") else 1])
        groups.setdefault(network, []).append(math.prod(shape) * dtype.itemsize)
    for network, sizes in sorted(groups.items()):
        yield f"tensors     {network}: {len(sizes)}, {sum(sizes) / 1e6:.1f} MB"
    if recipe:
        yield "recipe"
        for line in yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None).splitlines():
            yield f"  {line}"


def _saved_by(manifest: dict[str, Any]) -> str:
    """Returns ``4 ranks: replicate 2 × shard 2``; only the ranks for checkpoints of versions without a mesh entry."""
    mesh = " × ".join(f"{name} {size}" for name, size in manifest.get("mesh", {}).items())
    return f"{manifest['world_size']} ranks" + (f": {mesh}" if mesh else "")


def _engine(engine: dict[str, Any], attention: str | None) -> str:
    """Describes the settings of the engine that affect numbers."""
    words = [engine["kind"]]
    if engine["kind"] == "deepspeed":
        words.append(f"ZeRO {engine['zero_stage']}")
    words += [engine["precision"], f"activation checkpointing {engine['activation_checkpointing']}"]
    words += [key for key in ("compile", "deterministic") if engine[key]]
    words.append(f"{engine['threads']} threads on {engine['device']}")
    return ", ".join([*words, f"attention by {attention}"] if attention else words)
