"""The folder that a result is written into: all of its files at once, or none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import publish_dir


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
    temporary, old = (out.with_name(f".{out.name}.{word}") for word in ("tmp", "replaced"))
    if old.exists() and not out.exists():
        old.rename(out)  # killed between taking the old one away and putting the new one in place
    for left_by_a_kill in (temporary, old):
        if left_by_a_kill.exists():
            shutil.rmtree(left_by_a_kill)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            publish_dir(temporary, out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
    finally:
        for path in (temporary, old):
            if path.exists():
                shutil.rmtree(path)
