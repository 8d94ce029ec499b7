"""Finds a stage's checkpoints by their names, manifests and file sizes. Light: it does not import torch.

A checkpoint whose bytes were found damaged may be set aside as ``step_XXXXXXXX.damaged``. It is no checkpoint then,
until the step is saved again, which replaces it.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.manifest import MANIFEST, file_problem, read_manifest
from vjepa_scale.core.errors import UserError

NAME = re.compile(r"step_(\d{8,})")
_SET_ASIDE = re.compile(r"(step_(\d{8,}))\.damaged")
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


def last_name(folder: Path) -> Path | None:
    """``newest_name``, where that is the last checkpoint that was saved; else UserError (``refuse_older``)."""
    saved = newest_first(folder) + aside(folder)  # before: a run at work may save another one meanwhile
    found = newest_name(folder)
    refuse_older(found, saved, where=folder)
    return found


def refuse_older(found: Path | None, saved: list[Path], *, where: Path) -> None:
    """Raise UserError where ``found``, the newest good one, is not the last of all checkpoints that were saved.

    An older one is used only where its own path is given.
    """
    last = max(saved, key=_step, default=found)
    if last is None or (found is not None and _step(last) <= _step(found)):
        return
    older = f", or give {found} to use that one" if found is not None else ""
    raise UserError(
        f"its last checkpoint, {last.name}, is damaged",
        where=where,
        fix=f"launch that run again, which trains from the good one before it, or restore it from a copy{older}",
    )


def problems(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, in words, by its manifest and every byte of its files; empty: nothing.

    rank, world_size: look at every world_size-th file from this one on, for processes that share the work
    """
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return [f"{MANIFEST}: {error.what}"]
    share = sorted(manifest["files"].items())[rank::world_size]
    # Ranks are as many as cores; a process alone may take them all (hashing releases the GIL).
    with ThreadPoolExecutor(os.cpu_count() if world_size == 1 else 1) as pool:
        found = [problem for problem in pool.map(lambda entry: file_problem(checkpoint, *entry), share) if problem]
    named = NAME.fullmatch(checkpoint.name)
    if named and int(named[1]) != manifest["step"]:
        found.append(f"{MANIFEST} is of step {manifest['step']}")
    return found


def size_of(checkpoint: Path) -> int:
    """Bytes of a checkpoint's files, by its manifest."""
    return sum(recorded["bytes"] for recorded in read_manifest(checkpoint)["files"].values())


# -- set aside -----------------------------------------------------------------------------------------


def set_aside(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of the sequence: renamed, so that nothing starts from it, and nothing is lost."""
    place = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if place.exists():
        shutil.rmtree(place)
    os.rename(checkpoint, place)
    return place


def aside(folder: Path) -> list[Path]:
    """The damaged checkpoints that were set aside and have not been saved again."""
    if not folder.is_dir():
        return []
    found = ((path, match) for path in folder.iterdir() if (match := _SET_ASIDE.fullmatch(path.name)))
    return [path for path, match in found if not (folder / match[1]).exists()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removesuffix(".damaged").removeprefix("step_"))


def is_foreign(value: str) -> bool:
    """Whether ``init_from`` or ``continue_from`` names weights of another format than our checkpoints."""
    path = Path(value)
    return path.is_file() or any((path / name).is_file() for name in FOREIGN_FILES)
