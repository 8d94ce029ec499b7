"""Files that are either whole or absent."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_scale.core.errors import FULL, UserError

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
