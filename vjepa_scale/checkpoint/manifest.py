"""manifest.json of a checkpoint: what is inside, and how to know that it still is.

It is written last, holds the size and SHA-256 of every other file, and ends with a checksum of itself.
Light: who only reads one does not import torch.
"""

import errno
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import vjepa_scale
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, sha256_file, write_atomic

MANIFEST = "manifest.json"
FORMAT = "vjepa_scale.checkpoint"
VERSION = 1
# Written down where this process uses them.
_OPTIONAL_LIBRARIES = ("deepspeed", "flash_attn")
# A disk that cannot give the bytes back (bad sectors, a checksum of the file system's): damage like any other.
_UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a file."""
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
    """Write manifest.json into a checkpoint folder.

    mesh:  processes along each dimension of the mesh that holds the tensors; None where they are not sharded
    extra: JSON values under keys of their own
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
    assert not extra.keys() & {*content, "files", "checksum"}, "a key of the manifest's own"
    content |= extra | {"files": dict(sorted(files.items()))}
    write_atomic(folder / MANIFEST, _text(content | {"checksum": _checksum(content)}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises UserError where it is absent, not whole, or of another format."""
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
        raise UserError(f"cannot be read: {error.strerror}", where=path, fix=unusable) from None
    except ValueError:  # not JSON, or not even text
        raise UserError("not valid JSON", where=path, fix=unusable) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"not a manifest of format {FORMAT}", where=path, fix=unusable)
    if content.get("version") != VERSION:
        raise UserError(f"version {content.get('version')}; this program reads {VERSION}", where=path)
    checksum = content.pop("checksum", None)
    # Byte for byte, so that a change anywhere in the file is seen, even in what does not matter.
    if checksum != _checksum(content) or raw != _text(content | {"checksum": checksum}).encode():
        raise UserError("its checksum does not match its content", where=path, fix=unusable)
    files = content.get("files")
    if not isinstance(content.get("step"), int) or not isinstance(files, dict):
        raise UserError("it says no step, or no files", where=path, fix=unusable)
    if not all(isinstance(kept, dict) and kept.keys() >= {"bytes", "sha256"} for kept in files.values()):
        raise UserError("it does not say size and checksum of each file", where=path, fix=unusable)
    return content


def identity(manifest: dict[str, Any]) -> str:
    """What tells a checkpoint from another one of the same step: a SHA-256 of all checksums of files with tensors."""
    sums = [files["sha256"] for name, files in sorted(manifest["files"].items()) if name.endswith(".distcp")]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def file_problem(checkpoint: Path, name: str, recorded: dict[str, Any], *, read: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint, in words; None if nothing. ``read``: check the bytes too."""
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
        return f"{name} cannot be read: {error.strerror}"
    return None


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()
