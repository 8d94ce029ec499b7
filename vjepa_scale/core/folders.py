"""Folders that are whole or absent: a finished one gets its name, or takes the place of another.

.NAME.tmp        is being written
.NAME.replaced   was NAME until a moment ago; NAME again where a kill came before the new one had the name
.NAME.removing   is being removed
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import fsync_path


def publish_dir(temporary: Path, final: Path) -> None:
    """Give a finished folder its name: every file flushed, then one rename. ``final`` must not exist."""
    flush_dir(temporary)
    _rename(temporary, final)


def publish_first(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, unless another process has done so: then the temporary one is removed.

    For what many processes make alike and could make again: its files are not flushed.
    """
    try:
        _rename(temporary, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(temporary: Path, final: Path, *, old: Path | None = None) -> None:
    """Put a finished folder in the place of ``final``, which may exist and is removed.

    old: the name of the replaced folder meanwhile; default: ``.NAME.replaced``
    Where it fails, the replaced folder gets its name back. ``restore_dir`` does the same after a kill.
    """
    old = old or replaced_name(final)
    flush_dir(temporary)  # before: it takes long, and nothing has the name between the two renames
    if final.exists():
        move_dir(final, old)
    try:
        _rename(temporary, final)
    except BaseException:
        restore_dir(final, old=old)
        raise
    if old.exists():
        shutil.rmtree(old)


def restore_dir(final: Path, *, old: Path | None = None) -> None:
    """Give a replaced folder its name back where a kill came between the two renames of ``replace_dir``."""
    old = old or replaced_name(final)
    if old.exists() and not final.exists():
        os.rename(old, final)


def replaced_name(final: Path) -> Path:
    """The name of a folder while another takes its place."""
    return final.with_name(f".{final.name}.replaced")


def move_dir(path: Path, to: Path) -> None:
    """Give a folder another name; a folder that has it is removed."""
    if to.exists():
        shutil.rmtree(to)
    os.rename(path, to)


def remove_dir(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves no half folder under its name."""
    doomed = path.with_name(f".{path.name}.removing")
    move_dir(path, doomed)
    shutil.rmtree(doomed)


def flush_dir(folder: Path) -> None:
    """Make all that a folder holds survive a power cut."""
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)


def _rename(temporary: Path, final: Path) -> None:
    os.rename(temporary, final)
    fsync_path(final.parent)


# -- the folder of a command's --out -------------------------------------------------------------------


def content_of(out: Path) -> list[str]:
    """Names in a folder that may not be there. Raises UserError where it is a file."""
    if out.exists() and not out.is_dir():
        raise UserError("--out is a file", where=out, fix="give another --out")
    # What a kill left under a temporary name is nobody's.
    names = [path.name for path in out.iterdir()] if out.exists() else []
    return [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place at the end, or is removed where something fails."""
    out = out.resolve()  # of a link, the folder that it leads to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    restore_dir(out)
    temporary = out.with_name(f".{out.name}.tmp")
    for left_by_a_kill in (temporary, replaced_name(out)):
        if left_by_a_kill.exists():
            shutil.rmtree(left_by_a_kill)
    temporary.mkdir()
    try:
        yield temporary
        replace_dir(temporary, out)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
