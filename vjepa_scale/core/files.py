"""Files and folders that are either whole or absent, a lock on a file, and a file that another process writes.

A folder that is finished gets its name, or takes the place of another:

    .NAME.tmp        is being written
    .NAME.replaced   was NAME until a moment ago; NAME again where a kill came before the new one had the name
    .NAME.removing   is being removed
"""

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_scale.core.errors import FULL, UserError, reason_of

_RESERVE, _RESERVE_BYTES = ".reserve", 256 * 1024


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a write inside fails, raise the system's error with the path: ``write`` and ``fsync`` do not know it.

    PyTorch's writer raises a RuntimeError of its own after the system's, which is what is raised here then.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            cause = error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise
        if cause.filename is None:
            cause.filename = str(path)
        raise cause from None


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a rename inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """The name under which a file is written before it gets its own.

    Random: processes of several machines, each the first of its container, may write beside each other.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to be written whole: under a temporary name, then renamed. An error inside leaves nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with writing(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave what was there."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, of which every failure is a ValueError: of text nested too deeply it is a RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file; a UserError names the file where it is absent or damaged."""
    try:
        return parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError("file not found", where=path) from None
    except ValueError as error:  # bytes that are no text are one, too
        raise UserError(f"not valid JSON: {error}", where=path) from None


def append_jsonl(path: Path, row: dict[str, Any], *, durable: bool = False) -> None:
    """Append one JSON line with a single write, so that lines of several writers do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # by a kill: our line must not be part of it
        left = (b"\n" if torn else b"") + (json.dumps(row) + "\n").encode()
        while left:  # a disk that fills up takes a part, and says so the next time
            left = left[file.write(left) :]
        if durable:
            os.fsync(file.fileno())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file. A line cut short by a kill is left out: it was never finished."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if (row := row_of(line)) is not None:
                yield row


def row_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line with its end; None where the line is anything else."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def keep_reserve(folder: Path) -> None:
    """Have a file in a folder that ``write_last_words`` may give up. Raises OSError where there is no room for it."""
    path = folder / _RESERVE
    if not (path.exists() and path.stat().st_size == _RESERVE_BYTES):
        write_atomic(path, os.urandom(_RESERVE_BYTES))  # a file system that compresses would keep no room for zeros


def write_last_words(folder: Path, write: Callable[[], object]) -> None:
    """Call ``write``; where the disk is full, once more in the room of the folder's reserve."""
    try:
        write()
    except OSError as error:
        if error.errno not in FULL:
            raise
        (folder / _RESERVE).unlink(missing_ok=True)  # or another process has just done so
        write()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- a lock, and a file that grows -----------------------------------------------------------------


_POLL_S = 0.2


@contextmanager
def file_lock(path: Path, *, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock of a file, which is made where it is absent; yields whether this process has it.

    The kernel holds the lock, and releases it however its holder ends.

    patience_s: how long to wait for another holder; infinity: until it is free
    Raises UserError where the file system has no locks, OSError where the file cannot be opened.
    """
    with open(path, "a") as file:
        try:
            held = _lock(file.fileno(), patience_s)
        except OSError as error:
            raise UserError(
                f"this file system has no locks: {reason_of(error)}", where=path, fix="mount it with flock"
            ) from None
        yield held


def _lock(handle: int, patience_s: float) -> bool:
    if math.isinf(patience_s):
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)


class GrowingFile:
    """A text file that another process writes, read line by line as it grows.

    position: in bytes; the lines before it have been read
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path, self.position = path, position

    def lines(self, *, whole: bool = True) -> Iterator[bytes]:
        """The lines that have come since, each with its end; none while there is no file.

        whole: leave out a last line without its end, which is still being written
        A line counts as read when the next one is asked for: one whose reader failed comes again.
        """
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.position)
            for line in file:
                if whole and not line.endswith(b"\n"):
                    return
                yield line
                self.position += len(line)

    def skip_all(self) -> None:
        """Go on at the end of what there is now."""
        self.position = self.path.stat().st_size

    def skip_to_last(self, count: int, *, line_bytes: int = 200) -> None:
        """Go on with the last ``count`` lines of what there is now; with fewer where lines are longer than given."""
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - line_bytes * count)
            file.seek(begin)
            content = file.read(size - begin)
        lines = content.splitlines(keepends=True)
        if begin > 0 and len(lines) <= count:
            lines = lines[1:]  # its beginning is not in sight
        self.position = size - sum(map(len, lines[-count:]))


# -- folders ---------------------------------------------------------------------------------------


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


# -- the folder of a command's --out ---------------------------------------------------------------


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
