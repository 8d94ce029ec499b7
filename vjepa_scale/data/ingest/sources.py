"""What shards are to be made of: the files below a folder, or the rows of a list.

    lines       path label          as the published code's lists: the last word is the label, "::" may divide too
    CSV         a header with a column ``path``; ``label``, ``start``, ``end`` and any other column
    JSON lines  objects with a key ``path``; ``label``, ``start``, ``end`` and any other key

start, end: the part of the video that is wanted, in seconds. Columns and keys but path and label are kept as they
are in the record's JSON, under ``metadata``. Paths are relative to the folder of the list.
"""

import csv
import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError


@dataclass(frozen=True)
class Source:
    """A file that is wanted, or a part of it.

    path: relative to the folder all sources share, or absolute; start_s, end_s: seconds, None for as far as it goes
    """

    path: str
    label: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    metadata: dict[str, Any] | None = None


def find_sources(videos: Path, out: Path) -> tuple[Path, list[Source]]:
    """The folder that paths are relative to, and all sources: of a folder by path, of a list in its order.

    Raises UserError where there are none, or a list cannot be read.
    """
    if videos.is_file():
        return videos.parent, read_list(videos)
    return videos, [folder_source(path) for path in list_sources(videos, out)]


def folder_source(path: str) -> Source:
    """A file below a folder. Its label is the folder that it is in, if any."""
    parent = Path(path).parent.as_posix()
    return Source(path, None if parent == "." else parent)


def list_sources(videos: Path, out: Path) -> list[str]:
    """All files under a folder, relative to it, sorted. Links are followed, each folder once.

    A folder that cannot be read stands in the list itself, so that it is rejected and not forgotten.
    """
    if not videos.is_dir():
        raise UserError("no such folder or list", where=videos, fix="give a folder of video files, or a list of them")
    if out.resolve().is_relative_to(videos.resolve()):
        raise UserError("OUT lies inside VIDEOS", where=out, fix="give a folder elsewhere")
    found, seen = list[str](), set[str]()

    def keep(error: OSError) -> None:
        found.append(os.path.relpath(error.filename, videos))

    for folder, below, names in os.walk(videos, followlinks=True, onerror=keep):
        below.sort()  # which of two ways to a folder comes first must not depend on the file system
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        found += [os.path.relpath(os.path.join(folder, name), videos) for name in names]
    if not found:
        raise UserError("no files in this folder or below it", where=videos, fix="give a folder of video files")
    return sorted(found)


# -- lists -----------------------------------------------------------------------------------------


def read_list(path: Path) -> list[Source]:
    """The rows of a list, whose form is told by its first line. Raises UserError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        fix = "give a folder of video files, or a text file with one path a line"
        raise UserError("neither a folder nor a list", where=path, fix=fix) from None
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        rows = _json_rows(path, lines)
    elif "path" in (columns := [name.strip() for name in next(csv.reader([first]), [])]) and "::" not in first:
        rows = _csv_rows(path, lines, columns)
    else:
        rows = _line_rows(path, lines)
    sources = [_source(f"{path}:{number}", row) for number, row in rows]
    if not sources:
        raise UserError("the list is empty", where=path, fix="one path a line, or CSV or JSON lines with a `path`")
    return sources


def _line_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if "::" in line:
            words = [word.strip() for word in line.rsplit("::", 1)]
        elif line.lstrip().startswith('"'):
            try:
                words = shlex.split(line)
            except ValueError as error:
                raise UserError(f"{error}", where=f"{path}:{number}", fix='write "path" label') from None
            if len(words) > 2:
                raise UserError(f"{len(words)} words", where=f"{path}:{number}", fix='write "path" label')
        else:
            words = line.strip().rsplit(None, 1)
        yield number, dict(zip(("path", "label"), words, strict=False))


def _csv_rows(path: Path, lines: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines)
    header = True
    for row in reader:
        if header or not row:
            header = header and not row
            continue
        if len(row) != len(columns):
            where = f"{path}:{reader.line_num}"
            raise UserError(
                f"{len(row)} cells under {len(columns)} columns", where=where, fix="quote cells with commas"
            )
        yield reader.line_num, {name: cell for name, cell in zip(columns, row, strict=True) if cell != ""}


def _json_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise UserError("not a JSON object", where=f"{path}:{number}", fix='write {"path": …}')
        yield number, row


def _source(where: str, row: dict[str, Any]) -> Source:
    path, label = row.get("path"), row.get("label")
    if not isinstance(path, str) or not path:
        raise UserError("no path", where=where, fix="give every row a `path`")
    if isinstance(label, bool) or not (label is None or isinstance(label, str | int)):
        raise UserError(f"label {label!r} is no text and no integer", where=where, fix="keep it under another name")
    start_s, end_s = (_seconds(where, name, row.get(name)) for name in ("start", "end"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise UserError(f"end {end_s} is not after start {start_s or 0.0}", where=where)
    metadata = {name: value for name, value in row.items() if name not in ("path", "label")}
    return Source(path, None if label is None else str(label), start_s, end_s, metadata or None)


def _seconds(where: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"{name} {value!r} is no time in seconds", where=where)
    return seconds
