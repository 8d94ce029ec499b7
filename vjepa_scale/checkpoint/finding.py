"""Finds a stage's checkpoints by their names, manifests and file sizes. Light: it does not import torch."""

import re
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.manifest import file_problem, read_manifest
from vjepa_scale.core.errors import UserError

NAME = re.compile(r"step_(\d{8,})")
# One of these in a folder: it holds weights of another format (formats/: consolidated, published, Hugging Face's).
FOREIGN_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt", "config.json")


def name_of(step: int) -> str:
    """Of the checkpoint after so many completed steps."""
    return f"step_{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """Finished checkpoints, good or not, by falling step."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that looks whole by its manifest and file sizes, and its manifest.

    Nothing is read, or said, beyond that.
    """
    for checkpoint in newest_first(folder):
        try:
            manifest = read_manifest(checkpoint)
        except UserError:
            continue
        if not any(file_problem(checkpoint, name, kept, read=False) for name, kept in manifest["files"].items()):
            return checkpoint, manifest
    return None


def newest_name(folder: Path) -> Path | None:
    """``newest`` without the manifest."""
    found = newest(folder)
    return found[0] if found else None


def is_foreign(value: str) -> bool:
    """Whether ``init_from`` or ``continue_from`` names weights of another format than our checkpoints."""
    path = Path(value)
    return path.is_file() or any((path / name).is_file() for name in FOREIGN_FILES)
