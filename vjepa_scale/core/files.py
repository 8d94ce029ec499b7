"""Atomic writes of files and folders, a lock on a file, and reading a file that another process writes.

A folder is written under a temporary name. When it is finished, it is renamed to NAME, or replaces NAME:

    .NAME.tmp        is being written
    .NAME.replaced   the earlier NAME during a replacement; renamed back to NAME after a kill during it
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
    """If a write inside fails, raises the system's error with the path, which ``write`` and ``fsync`` do not know.

    PyTorch's writer replaces the system's error by a RuntimeError; here the system's error is raised.
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
    """Flushes a file's bytes, or the renames inside a folder, to disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """Returns the temporary name of a file that is being written.

    The name is random: processes of several containers may have the same pid and write to one folder.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Opens a file under a temporary name, and renames it at the end. An error inside leaves no file."""
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
    """Writes a whole file. If that fails, the earlier file stays as it was."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` that raises ValueError for every failure, also for too deep nesting (there a RecursionError)."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises UserError naming the file if it is absent or damaged."""
    try:
        return parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError("file not found", where=path) from None
    except ValueError as error:  # also for bytes that are not text
        raise UserError(f"not valid JSON: {error}", where=path) from None


def append_jsonl(path: Path, row: dict[str, Any], *, durable: bool = False) -> None:
    """Appends one JSON line with a single write, so that lines of several writers do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # a kill left half a line: start a new one
        left = (b"\n" if torn else b"") + (json.dumps(row) + "\n").encode()
        while left:  # a disk that becomes full writes a part of the line and raises at the next write
            left = left[file.write(left) :]
        if durable:
            os.fsync(file.fileno())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON-lines file. Skips a line that a kill has cut short."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if (row := row_of(line)) is not None:
                yield row


def row_of(line: bytes) -> dict[str, Any] | None:
    """Returns the JSON object of a line that ends with a line break; None for any other line."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def keep_reserve(folder: Path) -> None:
    """Reserves disk space in a folder for ``write_last_words``, as a file. Raises OSError if there is no space."""
    path = folder / _RESERVE
    if not (path.exists() and path.stat().st_size == _RESERVE_BYTES):
        write_atomic(path, os.urandom(_RESERVE_BYTES))  # a file system that compresses would reserve nothing for zeros


def write_last_words(folder: Path, write: Callable[[], object]) -> None:
    """Calls ``write``. If the disk is full, deletes the folder's reserve and calls ``write`` once more."""
    try:
        write()
    except OSError as error:
        if error.errno not in FULL:
            raise
        (folder / _RESERVE).unlink(missing_ok=True)  # missing: another process has just deleted it
        write()


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- a lock, and a file that grows -----------------------------------------------------------------


_POLL_S = 0.2


@contextmanager
def file_lock(path: Path, *, patience_s: float = 0.0) -> Iterator[bool]:
    """Takes the lock of a file, which is created if absent. Yields whether this process holds the lock.

    The kernel releases the lock when its holder ends, in whatever way.

    patience_s: seconds to wait while another process holds it; infinity: until it is free
    Raises UserError if the file system has no locks, OSError if the file cannot be opened.
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
        """Yields the lines after ``position``, each with its line break; none while there is no file.

        whole: leave out a last line without a line break, which is still being written
        A line counts as read when the next one is requested: after an exception in the loop it is yielded again.
        """
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.position)
            for line in file:
                if whole and not line.endswith(b"\n"):
                    return
                yield line
                self.position += len(line)

    def skip_all(self) -> None:
        """Moves ``position`` to the end of the file."""
        self.position = self.path.stat().st_size

    def skip_to_last(self, count: int, *, line_bytes: int = 200) -> None:
        """Moves ``position`` to the last ``count`` lines; to fewer lines if they are longer than ``line_bytes``."""
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - line_bytes * count)
            file.seek(begin)
            content = file.read(size - begin)
        lines = content.splitlines(keepends=True)
        if begin > 0 and len(lines) <= count:
            lines = lines[1:]  # its beginning was not read
        self.position = size - sum(map(len, lines[-count:]))


# -- folders ---------------------------------------------------------------------------------------


def publish_dir(temporary: Path, final: Path) -> None:
    """Flushes every file of a finished folder, then renames it to ``final``, which must not exist."""
    flush_dir(temporary)
    _rename(temporary, final)


def publish_first(temporary: Path, final: Path) -> None:
    """Renames a finished folder to ``final``. If another process was first, removes the temporary folder.

    For content that many processes produce identically and could produce again: its files are not flushed.
    """
    try:
        _rename(temporary, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(temporary: Path, final: Path, *, old: Path | None = None) -> None:
    """Replaces ``final``, which may exist, by a finished folder, and removes the earlier one.

    old: the temporary name of the replaced folder; default: ``.NAME.replaced``
    If it fails, the replaced folder gets its name back. ``restore_dir`` does the same after a kill.
    """
    old = old or replaced_name(final)
    flush_dir(temporary)  # before the renames, because it takes long and ``final`` is absent between them
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
    """Gives a replaced folder its name back after a kill between the two renames of ``replace_dir``."""
    old = old or replaced_name(final)
    if old.exists() and not final.exists():
        os.rename(old, final)


def replaced_name(final: Path) -> Path:
    """Returns the temporary name of a folder that is being replaced."""
    return final.with_name(f".{final.name}.replaced")


def move_dir(path: Path, to: Path) -> None:
    """Renames a folder. Removes a folder that has the new name."""
    if to.exists():
        shutil.rmtree(to)
    os.rename(path, to)


def remove_dir(path: Path) -> None:
    """Removes a folder. A kill during it leaves no partial folder under its name."""
    doomed = path.with_name(f".{path.name}.removing")
    move_dir(path, doomed)
    shutil.rmtree(doomed)


def flush_dir(folder: Path) -> None:
    """Flushes everything in a folder to disk."""
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)


def _rename(temporary: Path, final: Path) -> None:
    os.rename(temporary, final)
    fsync_path(final.parent)


# -- the folder of a command's --out ---------------------------------------------------------------


def content_of(out: Path) -> list[str]:
    """Returns the names in a folder; none if it does not exist. Raises UserError if it is a file."""
    if out.exists() and not out.is_dir():
        raise UserError("--out is a file", where=out, fix="give another --out")
    # Temporary names that a kill has left do not count.
    names = [path.name for path in out.iterdir()] if out.exists() else []
    return [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``out`` at the end, or is removed if something fails."""
    out = out.resolve()  # if it is a link, its target is replaced
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
