"""Verdicts on sources, records or rejections: as objects, as JSON, and carried over to a new listing.

The verdicts of an unfinished data set remain valid for a new listing of its sources, in which some may be missing, new
or changed. A verdict is carried over to a source with the same path, label, part and metadata, whose files have the
same sizes and modification times as before they were decoded.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest, metadata_of
from vjepa_scale.shards.droid import LOG, METADATA, VIDEOS
from vjepa_scale.shards.remux import Cut
from vjepa_scale.shards.sources import Source
from vjepa_scale.shards.trajectories import Trajectory
from vjepa_scale.shards.transcode import Transcode
from vjepa_scale.video.inspect import VideoFacts

UNREADABLE = "unreadable"  # a reason. Such a source is probed again: a fixed permission does not change the file


@dataclass(frozen=True)
class Rejected:
    """A rejected source file. reason: a category, for counts; detail: the specific error."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One clip of the plan.

    path: relative to the sources' folder, or absolute; size, sha256: of the record's bytes; cut: set for a part
    trajectory: of a robot: the members stored with the video
    mtime_ns: modification time of a copied file, before it was probed
    transcode: the new video; size is then an estimate, and sha256 that of the source's sha256 and the part
    """

    path: str
    size: int
    label: str | None
    facts: VideoFacts
    sha256: str
    cut: Cut | None = None
    metadata: dict[str, Any] | None = None
    trajectory: Trajectory | None = None
    transcode: Transcode | None = None
    mtime_ns: int | None = None

    @property
    def part(self) -> tuple[float, float] | None:
        """The shown part, in seconds of the source; None for the whole source."""
        made = self.cut or self.transcode
        return None if made is None else (made.start_s, made.end_s)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one source. Several records where it is cut. stamp: of its files (``stamp_of``)"""

    records: list[Record]
    rejected: list[Rejected]
    stamp: str | None = None


def verdict_tree(number: int, verdict: Verdict) -> dict[str, Any]:
    """Returns a verdict as JSON. number: of the source in its chunk"""
    return {"n": number, **asdict(verdict)}


def record_of(tree: dict[str, Any]) -> Record:
    """Returns a record from its JSON."""
    cut = None if tree["cut"] is None else Cut(**tree["cut"])
    trajectory = None if tree["trajectory"] is None else Trajectory(**tree["trajectory"])
    transcode = None if tree["transcode"] is None else Transcode(**tree["transcode"])
    made = {"cut": cut, "trajectory": trajectory, "transcode": transcode}
    return Record(**{**tree, "facts": VideoFacts(**tree["facts"]), **made})


# -- found again for a new listing -----------------------------------------------------------------


def stamp_of(root: Path, source: Source) -> str:
    """Returns sizes and modification times of the files that a verdict on a source depends on."""
    if source.trajectory is None:
        return _stamp(root / source.path)
    folder = root / source.trajectory
    names = [*sorted(folder.glob(METADATA)), folder / LOG, *sorted((folder / VIDEOS).glob("*"))]
    return " ".join(f"{path.name!r} {_stamp(path)}" for path in names)


def _stamp(path: Path) -> str:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return "none"
    return f"{found.st_size} {found.st_mtime_ns}"


class KnownVerdicts:
    """The verdicts of unfinished work, by the lines of its listing. Memory: 8 bytes a source, 20 a verdict.

    folder: OUT/.work, as work.py describes it
    """

    def __init__(self, folder: Path) -> None:
        self._files: list[Path] = []
        listed, known, files, offsets = array("Q"), array("Q"), array("I"), array("Q")
        for path in sorted((folder / "sources").glob("*.jsonl")):
            digests = [_digest(line) for line in path.read_bytes().splitlines(keepends=True)]
            listed.extend(digests)
            done = folder / "probed" / path.name
            for part in [done] if done.exists() else sorted(done.parent.glob(f"{path.stem}.*.part")):
                self._files.append(part)
                for offset, tree in _verdicts(part):
                    known.append(digests[tree["n"]])
                    files.append(len(self._files) - 1)
                    offsets.append(offset)
        self._listed = np.sort(np.frombuffer(listed, np.uint64))
        found = np.frombuffer(known, np.uint64)
        order = np.argsort(found, kind="stable")
        self._known = found[order]
        self._places = np.frombuffer(files, np.uint32)[order], np.frombuffer(offsets, np.uint64)[order]
        self.kept = self.carried = 0

    @property
    def sources(self) -> int:
        """Number of listed sources."""
        return len(self._listed)

    def carry(self, root: Path, sources: Sequence[Source], lines: Sequence[str]) -> Iterator[str]:
        """Yields known verdicts on sources of the new listing, as lines for probed/. lines: of these sources"""
        digests = np.array([_digest(line.encode()) for line in lines], np.uint64)
        self.kept += int(_contains(self._listed, digests).sum())
        for number in np.flatnonzero(_contains(self._known, digests)).tolist():
            at = int(np.searchsorted(self._known, digests[number]))
            file, offset = (int(column[at]) for column in self._places)
            with open(self._files[file], "rb") as stream:
                stream.seek(offset)
                tree = json.loads(stream.readline())
            if tree["stamp"] == stamp_of(root, sources[number]):
                self.carried += 1
                yield json.dumps(tree | {"n": number}) + "\n"


def _verdicts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (offset, verdict) of every complete line that can be carried over."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                tree = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:  # truncated by a kill
                tree = {}
            if tree.get("stamp") and all(row["reason"] != UNREADABLE for row in tree["rejected"]):
                yield offset, tree
            offset += len(line)


def _digest(line: bytes) -> int:
    return int.from_bytes(blake2b(line, digest_size=8).digest())


def _contains(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns which elements of ``wanted`` are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(wanted), bool)
    return ordered[np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)] == wanted


# -- differences between a data set and the request --------------------------------------------------

_COMPARED = 100_000  # sources: with more, the differing one is not searched


def what_differs(made: Any, asked: dict[str, Any], out: Path, root: Path, sources: Iterable[Source]) -> str:
    """Describes how a data set, unfinished or finished in ``out``, differs from the requested one.

    made, asked: identity of each (``source`` in its manifest); root, sources: the current listing
    """
    if not isinstance(made, dict) or "listing" not in made or "indexed" in made:
        return "it was not made from videos by make_shards"
    names = sorted((made.keys() | asked.keys()) - {"files", "listing"})
    settings = [f"{n} {made.get(n)}, now {asked.get(n)}" for n in names if made.get(n) != asked.get(n)]
    found = [f"settings differ: {'; '.join(settings)}"] if settings else []
    if made["files"] != asked["files"]:
        found.append(f"{made['files']} sources, now {asked['files']}")
    if made["listing"] != asked["listing"]:
        found.append(_differing_source(out, root, sources) if asked["files"] <= _COMPARED else "other sources")
    return "; ".join(found)


def _differing_source(out: Path, root: Path, sources: Iterable[Source]) -> str:
    """Describes the first source that is new, missing or changed."""
    try:
        before, gone = _sources_of(out), dict.fromkeys(_sources_of(out))
    except (OSError, UserError, ValueError, KeyError):  # the data set may be damaged
        return "the sources differ"
    changed = ""
    for source in sources:
        gone.pop(source.path, None)
        if source.path not in before:
            return f"{source.path} is new"
        labels, size = before[source.path]
        now = os.stat(root / source.path).st_size if size is not None and (root / source.path).is_file() else size
        if labels and source.label not in labels:
            changed = changed or f"{source.path} has label {source.label!r}, before {' or '.join(map(repr, labels))}"
        elif size != now:
            changed = changed or f"{source.path} has {now} bytes, before {size}"
    return f"{next(iter(gone))} is gone" if gone else changed or "the order, a size, a part or metadata of the sources"


_Known = dict[str, tuple[list[str | None], int | None]]


def _sources_of(out: Path) -> _Known:
    """Returns labels and bytes, as far as known, of the sources of an unfinished or finished data set, by path."""
    found: _Known = {}
    if not (out / MANIFEST).exists():
        for path in sorted(out.glob(".work/sources/*.jsonl")):
            for row in read_jsonl(path):
                found.setdefault(row["path"], ([], None))[0].append(row.get("label"))
        return found
    manifest = Manifest.open(out, look=False)
    found = {row["path"]: ([], None) for row in read_jsonl(out / REJECTED)}
    for record in range(min(manifest.records, _COMPARED)):
        known = metadata_of(manifest, record)
        whole = "start" not in known and "transcode" not in manifest.source and "trajectory" not in known
        path = known.get("trajectory", {}).get("folder", known["path"])
        labels = found[path][0] if path in found else []
        found[path] = [*labels, known["label"]], manifest.place(record, "video")[1] if whole else None
    return found
