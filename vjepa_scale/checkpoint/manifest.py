"""manifest.json of a checkpoint; finds a stage's checkpoints by their names and manifests.

A manifest is written last, holds the size and SHA-256 of every other file, and ends with a checksum of itself.
A damaged checkpoint may be set aside as ``step_XXXXXXXX.damaged``. It no longer counts as a checkpoint, and is removed
when the step is saved again.

Only ``write_manifest`` imports PyTorch.
"""

import errno
import hashlib
import json
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vjepa_scale
from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import move_dir, parse_json, sha256_file, write_atomic
from vjepa_scale.core.ranks import usable_cores
from vjepa_scale.recipe.registry import STAGES, kind_of

MANIFEST = "manifest.json"
FORMAT = "vjepa_scale.checkpoint"
VERSION = 1
# Optional libraries; the manifest records the versions of those that this process uses.
_OPTIONAL_LIBRARIES = ("deepspeed", "flash_attn")
# Errors of a disk that cannot return the bytes (bad sectors, file system checksums): treated as damage.
_UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
NAME = re.compile(r"step_(\d{8,})")
_SET_ASIDE = re.compile(r"(step_(\d{8,}))\.damaged")
# A folder with one of these files holds weights of another format (formats/: consolidated, published, Hugging Face's).
FOREIGN_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt", "config.json")


def describe_file(path: Path) -> dict[str, Any]:
    """Returns the manifest's entry of a file: its size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(
    folder: Path,
    *,
    step: int,
    world_size: int,
    files: dict[str, Any],
    extra: dict[str, Any],
    mesh: dict[str, int] | None = None,
) -> None:
    """Writes manifest.json into a checkpoint folder.

    mesh:  processes along each dimension of the mesh that holds the tensors; None where they are not sharded
    extra: further keys and their JSON values
    """
    import torch

    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": world_size,
        "mesh": mesh or {},
        "libraries": {
            "vjepa_scale": vjepa_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: sys.modules[name].__version__ for name in _OPTIONAL_LIBRARIES if name in sys.modules},
        },
    }
    assert not extra.keys() & {*content, "files", "checksum"}, "extra has a reserved key"
    content |= extra | {"files": dict(sorted(files.items()))}
    write_atomic(folder / MANIFEST, _text(content | {"checksum": _checksum(content)}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest. Raises UserError where it is missing, damaged, or of another format."""
    path = checkpoint / MANIFEST
    unusable = "this checkpoint is unfinished or damaged: use another"
    try:
        raw = path.read_bytes()
        content = parse_json(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("file not found", where=path, fix="give a folder checkpoints/step_XXXXXXXX") from None
    except IsADirectoryError:
        raise UserError("a folder, not a file", where=path, fix=unusable) from None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise UserError(f"cannot be read: {reason_of(error)}", where=path, fix=unusable) from None
    except ValueError:  # not JSON, or not even text
        raise UserError("not valid JSON", where=path, fix=unusable) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"not a manifest of format {FORMAT}", where=path, fix=unusable)
    if content.get("version") != VERSION:
        raise UserError(f"version {content.get('version')}; this program reads {VERSION}", where=path)
    checksum = content.pop("checksum", None)
    # Compares bytes, so that any change in the file is detected, even of whitespace.
    if checksum != _checksum(content) or raw != _text(content | {"checksum": checksum}).encode():
        raise UserError("its checksum does not match its content", where=path, fix=unusable)
    files = content.get("files")
    if not isinstance(content.get("step"), int) or not isinstance(files, dict):
        raise UserError("it says no step, or no files", where=path, fix=unusable)
    if not all(isinstance(kept, dict) and kept.keys() >= {"bytes", "sha256"} for kept in files.values()):
        raise UserError("it does not say size and checksum of each file", where=path, fix=unusable)
    return content


def trained_kind(manifest: dict[str, Any], *, where: object) -> str:
    """Returns the kind of the stage that wrote a checkpoint. Raises UserError for an unknown kind."""
    section = manifest["recipe"].get(manifest["stage"])
    kind = kind_of(manifest["stage"], section.get("kind") if isinstance(section, dict) else None)
    if kind not in STAGES:
        raise UserError(
            f"it is of a stage {manifest['stage']!r} of no kind that is known here",
            where=where,
            fix="use the code that trained it, or a line for its kind in recipe/registry.py",
        )
    return kind


def identity(manifest: dict[str, Any]) -> str:
    """Returns what distinguishes checkpoints of the same step: a SHA-256 over the checksums of its tensor files."""
    sums = [files["sha256"] for name, files in sorted(manifest["files"].items()) if name.endswith(".distcp")]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def is_checkpoint(path: Path, wanted: str) -> bool:
    """Returns whether the checkpoint with the ``identity`` ``wanted`` is in this folder."""
    return (path / MANIFEST).is_file() and identity(read_manifest(path)) == wanted


def file_problem(checkpoint: Path, name: str, recorded: dict[str, Any], *, read: bool = True) -> str | None:
    """Describes what is wrong with one file of a checkpoint; None if nothing. read: check the bytes too"""
    path = checkpoint / name
    try:
        size = path.stat().st_size if path.is_file() else None
    except FileNotFoundError:  # removed at this moment
        size = None
    if size is None:
        return f"{name} is missing"
    if size != recorded["bytes"]:
        return f"{name} has {size} bytes instead of {recorded['bytes']}"
    try:
        if read and sha256_file(path) != recorded["sha256"]:
            return f"{name} does not have the bytes that were written (SHA-256)"
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return f"{name} cannot be read: {reason_of(error)}"
    return None


def size_of(checkpoint: Path) -> int:
    """Returns the total bytes of a checkpoint's files, from its manifest."""
    return sum(recorded["bytes"] for recorded in read_manifest(checkpoint)["files"].values())


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


# -- finding checkpoints ----------------------------------------------------------------------------


def name_of(step: int) -> str:
    """Returns the folder name of the checkpoint after ``step`` completed steps."""
    return f"step_{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """Returns all finished checkpoints, good or damaged, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest checkpoint that is complete by its manifest and file sizes, and its manifest.

    Reads no tensors, and logs nothing.
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
    """Returns ``newest`` without the manifest."""
    found = newest(folder)
    return found[0] if found else None


def last_name(folder: Path) -> Path | None:
    """Returns ``newest_name``. Raises UserError where it is not the last saved checkpoint (``refuse_older``)."""
    saved = newest_first(folder) + aside(folder)  # listed first, because a running job may save another one meanwhile
    found = newest_name(folder)
    refuse_older(found, saved, where=folder)
    return found


def refuse_older(found: Path | None, saved: list[Path], *, where: Path) -> None:
    """Raises UserError where ``found``, the newest good checkpoint, is not the last one that was saved.

    An older checkpoint is used only where the user gives its own path.
    """
    last = max(saved, key=step_of, default=found)
    if last is None or (found is not None and step_of(last) <= step_of(found)):
        return
    older = f", or give {found} to use that one" if found is not None else ""
    raise UserError(
        f"its last checkpoint, {last.name}, is damaged",
        where=where,
        fix=f"launch that run again, which trains from the good one before it, or restore it from a copy{older}",
    )


def problems(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """Describes what is wrong with a checkpoint, by its manifest and every byte of its files; empty: nothing.

    rank, world_size: check every world_size-th file from number rank on, for processes that share the work
    """
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return [f"{MANIFEST}: {error.what}"]
    share = sorted(manifest["files"].items())[rank::world_size]
    # With several ranks each uses one thread; a single process uses all cores (hashing releases the GIL).
    with ThreadPoolExecutor(usable_cores() if world_size == 1 else 1) as pool:
        found = [problem for problem in pool.map(lambda entry: file_problem(checkpoint, *entry), share) if problem]
    named = NAME.fullmatch(checkpoint.name)
    if named and int(named[1]) != manifest["step"]:
        found.append(f"{MANIFEST} is of step {manifest['step']}")
    return found


# -- set aside -------------------------------------------------------------------------------------


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that no run starts from it and its files are kept. Returns the new path."""
    place = checkpoint.with_name(f"{checkpoint.name}.damaged")
    move_dir(checkpoint, place)
    return place


def aside(folder: Path) -> list[Path]:
    """Returns the damaged checkpoints that were set aside and not saved again."""
    if not folder.is_dir():
        return []
    found = ((path, match) for path in folder.iterdir() if (match := _SET_ASIDE.fullmatch(path.name)))
    return [path for path, match in found if not (folder / match[1]).exists()]


def step_of(checkpoint: Path) -> int:
    """Returns the number of completed steps of a checkpoint, by its name."""
    return int(checkpoint.name.removesuffix(".damaged").removeprefix("step_"))


def is_foreign(value: str) -> bool:
    """Returns whether ``init_from`` or ``continue_from`` names weights in a format other than our checkpoints."""
    path = Path(value)
    return path.is_file() or any((path / name).is_file() for name in FOREIGN_FILES)
