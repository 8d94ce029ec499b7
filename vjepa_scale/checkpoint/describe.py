"""A checkpoint in a few lines of text."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.manifest import read_manifest


def describe(checkpoint: Path) -> Iterator[str]:
    """Lines: where it comes from, who computed it on what, what it holds, its recipe. Bytes of tensors are not read."""
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
    """``4 ranks: replicate 2 × shard 2``; a checkpoint from before meshes were written down says its ranks only."""
    mesh = " × ".join(f"{name} {size}" for name, size in manifest.get("mesh", {}).items())
    return f"{manifest['world_size']} ranks" + (f": {mesh}" if mesh else "")


def _engine(engine: dict[str, Any], attention: str | None) -> str:
    """What decides how numbers came about, in words."""
    words = [engine["kind"]]
    if engine["kind"] == "deepspeed":
        words.append(f"ZeRO {engine['zero_stage']}")
    words += [engine["precision"], f"activation checkpointing {engine['activation_checkpointing']}"]
    words += [key for key in ("compile", "deterministic") if engine[key]]
    words.append(f"{engine['threads']} threads on {engine['device']}")
    return ", ".join([*words, f"attention by {attention}"] if attention else words)
