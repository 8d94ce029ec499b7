"""What shards are to be made of: the files below a folder, or the rows of a list.

    lines       path label          as the published code's lists: the last word is the label, "::" may divide too
    CSV         a header with a column ``path``; ``label``, ``start``, ``end`` and any other column
    JSON lines  objects with a key ``path``; ``label``, ``start``, ``end`` and any other key

start, end: the part of the video that is wanted, in seconds. Columns and keys but path and label are kept as they
are in the record's JSON, under ``metadata``. Paths are relative to the folder of the list.
"""

import csv
import heapq
import json
import math
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, writing

_NAMES_HELD = 500_000  # of one folder; more of them are sorted on disk


@dataclass(frozen=True)
class Source:
    """A file that is wanted, or a part of it.

    path: relative to the folder all sources share, or absolute; start_s, end_s: seconds, None for as far as it goes
    trajectory: of a robot's: its folder, as path (see trajectories.py)
    """

    path: str
    label: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    metadata: dict[str, Any] | None = None
    trajectory: str | None = field(default=None, repr=False)


def find_sources(videos: Path, out: Path) -> tuple[Path, Iterator[Source]]:
    """The folder that paths are relative to, and all sources: of a folder by path, of a list in its order.

    Sources come one after the other and are never held. Raises UserError where there are none, or (as they come)
    where a list cannot be read.
    """
    if videos.is_file():
        return videos.parent, read_list(videos)
    return videos, map(folder_source, walk_sources(videos, out))


def folder_source(path: str) -> Source:
    """A file below a folder. Its label is the folder that it is in, if any."""
    parent = os.path.dirname(path)
    return Source(path, parent or None)


def list_sources(videos: Path, out: Path) -> list[str]:
    """``walk_sources`` as a list."""
    return list(walk_sources(videos, out))


def walk_sources(videos: Path, out: Path) -> Iterator[str]:
    """All files under a folder, relative to it, sorted. Links are followed, each folder once.

    A folder that cannot be read stands among them itself, so that it is rejected and not forgotten. Held meanwhile:
    names of one folder (of a larger one, those of a stretch) for each level of depth, and a number per folder.
    """
    if not videos.is_dir():
        raise UserError("no such folder or list", where=videos, fix="give a folder of video files, or a list of them")
    if out.resolve().is_relative_to(videos.resolve()):
        raise UserError("OUT lies inside VIDEOS", where=out, fix="give a folder elsewhere")
    found = _walk(videos)
    first = next(found, None)
    if first is None:
        raise UserError("no files in this folder or below it", where=videos, fix="give a folder of video files")
    return chain([first], found)


def _walk(videos: Path) -> Iterator[str]:
    seen = set[tuple[int, int]]()
    levels = [iter(["./"])]  # a stack of our own: folders may lie deeper than Python's calls may
    names = [""]
    while levels:
        name = next(levels[-1], None)
        if name is None:
            levels.pop()
            names.pop()
            continue
        path = os.path.normpath(os.path.join(names[-1], name))
        if not name.endswith("/"):
            yield path
            continue
        try:
            status = os.stat(videos / path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            levels.append(_names(videos / path))
            names.append(path)
        except OSError:
            yield path


def _names(folder: Path) -> Iterator[str]:
    """What is in a folder, sorted; folders end with a slash, so that their files come where their paths belong."""
    held, runs = list[str](), list[Iterator[str]]()
    with os.scandir(folder) as entries:
        for entry in entries:
            held.append(entry.name + "/" * _is_folder(entry))
            if len(held) == _NAMES_HELD:
                runs.append(_on_disk(sorted(held)))
                held.clear()
    return heapq.merge(*runs, iter(sorted(held)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a ring of links
        return False


def _on_disk(names: list[str]) -> Iterator[str]:
    with writing(Path(tempfile.gettempdir())):
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as what reads it lives)
        file.writelines(json.dumps(name) + "\n" for name in names)
        file.seek(0)
    return map(json.loads, file)


# -- lists -----------------------------------------------------------------------------------------


def read_list(path: Path) -> Iterator[Source]:
    """The rows of a list, whose form is told by its first line. Raises UserError naming the line."""
    rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            for number, row in _rows(path, file, first):
                rows += 1
                yield _source(f"{path}:{number}", row)
    except UnicodeDecodeError:
        fix = "give a folder of video files, or a text file with one path a line"
        raise UserError("neither a folder nor a list", where=path, fix=fix) from None
    if not rows:
        raise UserError("the list is empty", where=path, fix="one path a line, or CSV or JSON lines with a `path`")


def _rows(path: Path, lines: Iterable[str], first: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its line, what it says) of every row."""
    if first.lstrip().startswith("{"):
        return _json_rows(path, lines)
    if "path" in (columns := [name.strip() for name in next(csv.reader([first]), [])]) and "::" not in first:
        return _csv_rows(path, lines, columns)
    return _line_rows(path, lines)


def _line_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _csv_rows(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines)
    header = True
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from None
        if row is None:
            return
        if header or not row:
            header = header and not row
            continue
        if len(row) != len(columns):
            where = f"{path}:{reader.line_num}"
            raise UserError(
                f"{len(row)} cells under {len(columns)} columns", where=where, fix="quote cells with commas"
            )
        yield reader.line_num, {name: cell for name, cell in zip(columns, row, strict=True) if cell != ""}


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
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
