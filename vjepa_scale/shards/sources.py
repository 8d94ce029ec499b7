"""The sources of shards: the files below a folder, or the rows of a list.

    lines       path label          as in the published code's lists: the last word is the label; or with a tab or "::"
    CSV         a header with a column ``path``; ``label``, ``start``, ``end`` and any other column; the delimiter is a
                comma, semicolon, tab or bar. Without a header: path, label
    JSON        objects with a key ``path``; ``label``, ``start``, ``end`` and any other key: one a line, or an array
    Kinetics    its own CSV, whose rows have youtube_id, time_start and time_end in place of a path

start, end: the part of the video to use, in seconds. All columns and keys except path and label are copied to the
record's JSON, under ``metadata``. Paths are relative to the folder of the list.
"""

import csv
import heapq
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, writing
from vjepa_scale.core.installed import program

_NAMES_HELD = 500_000  # names of one folder in memory; more of them are sorted on disk
# Files that file managers and storage systems write into folders; they are no sources.
_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", "._*")
_SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", ".Spotlight-V100", ".Trashes", ".fseventsd", "$RECYCLE.BIN", "System Volume Information")
)
# Other names of the column ``path``, and of the column ``label`` with one of those.
_PATH_NAMES = ("video_path", "file_path", "filepath", "filename", "file_name", "file", "video", "video_name", "clip")
_LABEL_NAMES = ("label", "class", "class_name", "category", "action")
_KINETICS = ("youtube_id", "time_start", "time_end")
# Distinguishes a row from a header where a list has no header.
_MEDIA = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|mpe?g|ts|flv|wmv|3gp|ogv|gif|jpe?g|png|webp|tiff?|heic|avif)$", re.I)


@dataclass(frozen=True)
class Source:
    """A source file, or a part of one.

    path: relative to the common folder of all sources, or absolute; start_s, end_s: seconds, None: start or end of file
    trajectory: of a robot: its folder, as ``path`` (see trajectories.py)
    """

    path: str
    label: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    metadata: dict[str, Any] | None = None
    trajectory: str | None = field(default=None, repr=False)


def find_sources(videos: Path, out: Path, *, everything: bool = False) -> tuple[Path, Iterator[Source]]:
    """Returns the folder that paths are relative to, and all sources: of a folder by path, of a list in its order.

    everything: as in ``walk_sources``
    Sources are an iterator and never all in memory. Raises UserError where there are none, and during iteration where a
    list cannot be read.
    """
    if videos.is_file():
        return videos.parent, read_list(videos)
    return videos, map(folder_source, walk_sources(videos, out, everything=everything))


SIDES = ("train", "val")


def of_side(
    sources: Iterator[Source], root: Path, *, side: str, val: float, by: str, seed: int, where: Path
) -> Iterator[Source]:
    """Yields the sources of one side of a split. A source's side depends only on its group and the seed.

    val: fraction of all groups for validation
    by: the groups: ``source``, all parts of one file; ``folder``, all files of one folder; or the column or key of a
    list whose value is the group
    where: the folder or list. Raises UserError where this side has no source, or where a source has no group.
    """
    chosen = (s for s in sources if (_fraction_of(seed, _group(s, root, by, where)) < val) == (side == "val"))
    first = next(chosen, None)
    if first is None:
        fix = f"a {'larger' if side == 'val' else 'smaller'} fraction, or another --seed"
        raise UserError(f"no source falls into {side}", where=f"{program('make_shards')} --val", fix=fix)
    return chain([first], chosen)


def _group(source: Source, root: Path, by: str, where: Path) -> str:
    if by in ("source", "folder"):
        path = os.path.normpath(source.path)  # one name per file, independent of the folder's location
        if path.startswith(("..", "/")):
            path = os.path.relpath(os.path.join(root, path), root)
        return path if by == "source" else os.path.dirname(path)
    value = (source.metadata or {}).get(by)
    if value is None:
        fix = f"give every row of the list {by!r}, or split by source or folder"
        raise UserError(f"{source.path} has no {by!r} to split by", where=where, fix=fix)
    return str(value)


def _fraction_of(seed: int, group: str) -> float:
    """Returns the keyed random number in [0, 1) of a group."""
    name = f"{seed} {group}".encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(name, digest_size=6).digest()) / 2**48


def folder_source(path: str) -> Source:
    """Returns the source of a file below a folder. Its label is the file's folder, if any."""
    parent = os.path.dirname(path)
    return Source(path, parent or None)


def list_sources(videos: Path, out: Path, *, everything: bool = False) -> list[str]:
    """Returns ``walk_sources`` as a list."""
    return list(walk_sources(videos, out, everything=everything))


def walk_sources(videos: Path, out: Path, *, everything: bool = False) -> Iterator[str]:
    """Yields all files under a folder, relative to it, sorted. Follows links, each folder once.

    everything: include files of file managers (.DS_Store, Thumbs.db, …), as earlier versions did
    Yields an unreadable folder itself, so that it is rejected and not silently skipped. Memory holds the names of one
    folder (a part of them for a large one) for each level of depth, and a number per folder.
    """
    if not videos.is_dir():
        raise UserError("no such folder or list", where=videos, fix="give a folder of video files, or a list of them")
    if out.resolve().is_relative_to(videos.resolve()):
        raise UserError("OUT is inside VIDEOS", where=out, fix="give a folder elsewhere")
    found = _walk(videos, everything)
    first = next(found, None)
    if first is None:
        raise UserError("no files in this folder or below it", where=videos, fix="give a folder of video files")
    return chain([first], found)


def _walk(videos: Path, everything: bool) -> Iterator[str]:
    seen = set[tuple[int, int]]()
    levels = [iter(["./"])]  # an explicit stack: folders may be nested deeper than Python's recursion limit
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
            levels.append(_names(videos / path, everything))
            names.append(path)
        except OSError:
            yield path


def _names(folder: Path, everything: bool) -> Iterator[str]:
    """Yields the names in a folder, sorted; folders end with a slash, so that all paths are yielded in sorted order."""
    held, runs = list[str](), list[Iterator[str]]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not everything and _is_system(entry.name):
                continue
            held.append(entry.name + "/" * _is_folder(entry))
            if len(held) == _NAMES_HELD:
                runs.append(_on_disk(sorted(held)))
                held.clear()
    return heapq.merge(*runs, iter(sorted(held)))


def _is_system(name: str) -> bool:
    return name in _SYSTEM_FOLDERS or any(fnmatchcase(name.lower(), one.lower()) for one in _SYSTEM_FILES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a cycle of links
        return False


def _on_disk(names: list[str]) -> Iterator[str]:
    with writing(Path(tempfile.gettempdir())):
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as what reads it lives)
        file.writelines(json.dumps(name) + "\n" for name in names)
        file.seek(0)
    return map(json.loads, file)


# -- lists -----------------------------------------------------------------------------------------


def read_list(path: Path) -> Iterator[Source]:
    """Yields the rows of a list; its first line determines the format. Raises UserError naming the line."""
    rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = first_line(file)
            file.seek(0)
            for place, row in _rows(path, file, first):
                rows += 1
                yield _source(f"{path}:{place}", row)
    except UnicodeDecodeError:
        fix = "give a folder of video files, or a text file with one path a line"
        raise UserError("neither a folder nor a list", where=path, fix=fix) from None
    if not rows:
        raise UserError("the list is empty", where=path, fix="one path a line, or CSV or JSON with a `path`")


def first_line(lines: Iterable[str]) -> str:
    """Returns the first line of a list that is not blank."""
    return next((line for line in lines if line.strip()), "")


_Row = tuple[int | str, dict[str, Any]]  # its line or item number, and its content


def _rows(path: Path, file: TextIO, first: str) -> Iterator[_Row]:
    if re.match(r'\s*\[\s*($|[]{["])', first):
        return _array_rows(path, file.read())
    if first.lstrip().startswith("{"):
        return _json_rows(path, file)
    table = _table(path, first)
    if table is None:
        return _line_rows(path, file)
    rows = _csv_rows(path, file, table)
    return _kinetics_rows(path, rows) if set(_KINETICS) <= set(table.columns) else rows


@dataclass(frozen=True)
class _Table:
    """Format of a CSV list. header: whether its first row names the columns."""

    delimiter: str
    columns: list[str]
    header: bool


def _table(path: Path, first: str) -> _Table | None:
    """Returns the format of a CSV list, by its first line; None where it is no CSV. Raises UserError."""
    if "::" in first:
        return None
    for delimiter in ",;\t|":
        names = _cells(first, delimiter)
        if "path" in names or set(_KINETICS) <= set(names):
            return _Table(delimiter, names, header=True)
        if len(names) > 1 and "path" in (renamed := _renamed(f"{path}:1", names)):
            return _Table(delimiter, renamed, header=True)
    for delimiter in ",;":
        cells = _cells(first, delimiter)
        others = [word for cell in cells[1:] for word in cell.split()]  # in a path with commas, one ends like a file
        if len(cells) > 1 and _MEDIA.search(cells[0]) and not any(map(_MEDIA.search, others)):
            if len(cells) > 2:
                fix = f"begin the list with a line such as path{delimiter}label{delimiter}…"
                raise UserError(f"{len(cells)} cells, and no header that names them", where=f"{path}:1", fix=fix)
            return _Table(delimiter, ["path", "label"], header=False)
    return None


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _renamed(where: str, names: Sequence[str]) -> list[str]:
    """Renames columns or keys with known other names to ``path`` and ``label``. Unchanged where one is ``path``.

    Raises UserError where several columns match.
    """
    if "path" in names:
        return list(names)
    paths = [name for name in names if name.lower() in ("path", *_PATH_NAMES)]
    if not paths:
        return list(names)
    labels = ["label"] if "label" in names else [name for name in names if name.lower() in _LABEL_NAMES]
    for meant, found in (("path", paths), ("label", labels)):
        if len(found) > 1:
            fix = f"name one of them `{meant}`"
            raise UserError(f"which is the {meant}: {' or '.join(found)}?", where=where, fix=fix)
    new = {paths[0]: "path"} | dict.fromkeys(labels, "label")
    return [new.get(name, name) for name in names]


def _line_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        tabbed = [cell for cell in _cells(line, "\t") if cell]
        if "::" in line:
            words = [word.strip() for word in line.rsplit("::", 1)]
        elif len(tabbed) > 1:
            words = tabbed
            if len(words) > 2:
                fix = "write path, tab, label; or begin with a header that names the columns"
                raise UserError(f"{len(words)} cells between tabs", where=where, fix=fix)
        elif line.lstrip().startswith('"'):
            try:
                words = shlex.split(line)
            except ValueError as error:
                raise UserError(f"{error}", where=where, fix='write "path" label') from None
            if len(words) > 2:
                raise UserError(f"{len(words)} words", where=where, fix='write "path" label')
        else:
            words = line.strip().rsplit(None, 1)
        yield number, dict(zip(("path", "label"), words, strict=False))


def _csv_rows(path: Path, lines: Iterable[str], table: _Table) -> Iterator[_Row]:
    reader = csv.reader(lines, delimiter=table.delimiter)
    header, columns = table.header, table.columns
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
        if len(row) != len(columns) and (table.header or len(row) > 1):
            where = f"{path}:{reader.line_num}"
            raise UserError(
                f"{len(row)} cells under {len(columns)} columns",
                where=where,
                fix=f"quote cells that have a {table.delimiter!r} inside",
            )
        if not table.header:
            row = [cell.strip() for cell in row]
        yield reader.line_num, {name: cell for name, cell in zip(columns, row, strict=False) if cell != ""}


def _kinetics_rows(path: Path, rows: Iterator[_Row]) -> Iterator[_Row]:
    """Yields rows with the paths of videos cut and named as by Kinetics' downloaders: ID_000010_000020.mp4.

    Searches the folder of the list, and in it the folders of the row's split, class, or both. The row's times refer to
    the uncut video, so nothing is cut again.
    """
    for place, row in rows:
        try:
            times = [int(float(row[name])) for name in _KINETICS[1:]]
            name = f"{row['youtube_id']}_{times[0]:06d}_{times[1]:06d}.mp4"
        except (KeyError, ValueError, OverflowError):
            fix = f"give every row {', '.join(_KINETICS)}, or a column `path`"
            raise UserError("no row of Kinetics", where=f"{path}:{place}", fix=fix) from None
        split, label = row.get("split", ""), row.get("label", "")
        folders = ["", split, label, os.path.join(split, label)]
        found = (folder for folder in folders if os.path.exists(path.parent / folder / name))
        yield place, row | {"path": os.path.join(next(found, ""), name)}


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            fix = "one object a line, or one array of objects"
            raise UserError(f"not JSON: {error}", where=f"{path}:{number}", fix=fix) from None
        if not isinstance(row, dict):
            raise UserError("not a JSON object", where=f"{path}:{number}", fix='write {"path": …}')
        yield number, _keyed(f"{path}:{number}", row)


def _array_rows(path: Path, text: str) -> Iterator[_Row]:
    """Yields the items of one JSON array, which is held in memory: objects, or paths."""
    try:
        items = parse_json(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=path, fix="one array of objects, or one object a line") from None
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict | str):
            raise UserError("no object and no path", where=f"{path}:item {number}", fix='write {"path": …}')
        yield f"item {number}", {"path": item} if isinstance(item, str) else _keyed(f"{path}:item {number}", item)


def _keyed(where: str, row: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_renamed(where, list(row)), row.values(), strict=True))


def _source(where: str, row: dict[str, Any]) -> Source:
    path, label = row.get("path"), row.get("label")
    if not isinstance(path, str) or not path:
        keys = f" among {', '.join(row)}" if row else ""
        raise UserError(f"no path{keys}", where=where, fix="give every row a `path`")
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
