"""A checkpoint in a few lines of text."""

import math
from collections.abc import Iterator
from pathlib import Path

from vjepa_scale.checkpoint.manifest import read_manifest
from vjepa_scale.checkpoint.reader import CheckpointReader


def describe(checkpoint: Path) -> Iterator[str]:
    """Lines: where it comes from, what it was trained on, what it holds. Bytes of tensors are not read."""
    manifest = read_manifest(checkpoint)
    yield f"checkpoint  {checkpoint}"
    yield f"format      {manifest['format']} version {manifest['version']}"
    for key in ("stage", "phase"):
        if key in manifest:
            yield f"{key:<11} {manifest[key]}"
    yield f"step        {manifest['step']}"
    yield f"saved by    {manifest['world_size']} ranks; " + ", ".join(
        f"{name} {version}" for name, version in manifest["libraries"].items()
    )
    if "frames" in manifest:
        height, width = manifest["size"]
        yield f"clip        {manifest['frames']} frames, {height}×{width} px, {manifest['fps']:g} fps"
    model = manifest.get("recipe", {}).get("model", {})
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
