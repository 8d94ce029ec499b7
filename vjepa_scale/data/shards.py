"""A folder of videos -> WebDataset shards with a manifest. Three steps, so that each can be scaled alone:

    probe   (workers)      every file is decoded whole: facts, or a reason to reject it
    plan    (one process)  records are shuffled by the seed and dealt to shards; written to OUT/.plan.json
    write   (workers)      each shard under a temporary name, then renamed; the manifest last

A shard is a pure function of the plan, so a run that was killed goes on with the shards that are missing.
One bad file never stops the run and is never dropped silently: it goes to rejected.jsonl.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from webdataset import TarWriter

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import fsync_dir, read_json, sha256_file, write_atomic, write_json
from vjepa_scale.core.keyed import Draws
from vjepa_scale.data.decode import DecodeError
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest, Shard, write_manifest
from vjepa_scale.data.probe import VideoFacts, probe_video
from vjepa_scale.data.processes import Crashed, map_in_workers

PLAN = ".plan.json"

# Told (what is being done, how much is done, of how much).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """shard_records: clips per shard; or else shard_mb: a shard is full at this many megabytes of video."""

    seed: int = 0
    shard_records: int | None = None
    shard_mb: int = 256


@dataclass(frozen=True)
class Rejected:
    """A source file that was left out. reason: one of few, to count by; detail: the particular."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One clip of the plan. path: relative to VIDEOS; size: bytes; label: the folder it is in, if any."""

    path: str
    size: int
    label: str | None
    facts: VideoFacts


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of all shards. source: see ``describe_source``."""

    source: dict[str, Any]
    shards: list[list[Record]]
    rejected: list[Rejected]


@dataclass(frozen=True)
class Summary:
    """What was made. existed: the finished data set was there already, and nothing was done."""

    clips: int
    shards: int
    hours: float
    bytes: int
    rejected: dict[str, int]
    existed: bool = False


def make_shards(videos: Path, out: Path, settings: Settings, *, workers: int, progress: Progress) -> Summary:
    """Make the data set, or finish it, or find it finished.

    Raises UserError, before anything is written, where there is nothing to make it from or where ``out``
    holds something else.
    """
    sources = list_sources(videos, out)
    source = describe_source(videos, sources, settings)
    if _held(out, source) == MANIFEST:
        return _summary(out, existed=True)
    if (out / PLAN).exists():
        plan = _load_plan(out / PLAN)
    else:
        usable, rejected = probe_sources(videos, sources, workers=workers, progress=progress)
        if not usable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in rejected).most_common())
            raise UserError(f"none of {len(rejected)} files can be used: {reasons}", where=videos)
        plan = plan_shards(usable, rejected, source, settings)
        _save_plan(out / PLAN, plan)
    write_shards(videos, out, plan, workers=workers, progress=progress)
    return _summary(out)


def list_sources(videos: Path, out: Path) -> list[str]:
    """All files under a folder, relative to it, sorted. Links are followed, each folder once."""
    if not videos.is_dir():
        raise UserError("no such folder", where=videos, fix="give a folder of video files")
    if out.resolve().is_relative_to(videos.resolve()):
        raise UserError("OUT lies inside VIDEOS", where=out, fix="give a folder elsewhere")
    found, seen = [], set()
    for folder, below, names in os.walk(videos, followlinks=True):
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


def describe_source(videos: Path, sources: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What identifies a data set before it is made: names and sizes of the files, and the settings."""
    listing = hashlib.sha256()
    for path in sources:
        size = os.path.getsize(videos / path) if os.path.exists(videos / path) else -1
        listing.update(f"{path!r} {size}\n".encode())
    return {"files": len(sources), "listing": listing.hexdigest(), **asdict(settings)}


def _held(out: Path, source: dict[str, Any]) -> str | None:
    """What of this data set ``out`` holds: the manifest, the plan, or nothing."""
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    for name in (MANIFEST, PLAN):
        if (out / name).exists():
            tree = read_json(out / name)
            if not isinstance(tree, dict) or tree.get("source") != source:
                raise UserError(
                    "OUT holds a data set of other videos, seed or shard size",
                    where=out / name,
                    fix="give another folder, or remove this one",
                )
            return name
    if out.is_dir() and any(out.glob("*.tar")):
        raise UserError("OUT holds shards of unknown origin", where=out, fix="give a new or empty folder")
    own = f".{PLAN}."  # of a plan that a kill left under its temporary name
    if out.is_dir() and (foreign := sorted(path.name for path in out.iterdir() if not path.name.startswith(own))):
        raise UserError(
            f"OUT is not empty: {foreign[0]}" + (f" and {len(foreign) - 1} more" if foreign[1:] else ""),
            where=out,
            fix="give a new or empty folder",
        )
    return None


# -- probe -----------------------------------------------------------------------------------------


def probe_sources(
    videos: Path, sources: Sequence[str], *, workers: int, progress: Progress
) -> tuple[list[Record], list[Rejected]]:
    """Decode every file. Returns the usable and the rejected, each in the order of ``sources``."""
    verdicts: list[Record | Rejected | None] = [None] * len(sources)
    tasks = [(str(videos), path) for path in sources]
    for done, (index, verdict) in enumerate(map_in_workers(_probe, tasks, workers=workers), start=1):
        if isinstance(verdict, Crashed):
            verdict = Rejected(sources[index], "crashes the decoder")
        verdicts[index] = verdict
        progress("probing", done, len(sources))
    return [v for v in verdicts if isinstance(v, Record)], [v for v in verdicts if isinstance(v, Rejected)]


def _probe(task: tuple[str, str]) -> Record | Rejected:
    videos, path = task
    if not (Path(videos) / path).is_file():  # a pipe would never end
        return Rejected(path, "unreadable", "not a file")
    try:
        data = (Path(videos) / path).read_bytes()
        facts = probe_video(data)
    except OSError as error:
        return Rejected(path, "unreadable", str(error.strerror))
    except DecodeError as error:
        return Rejected(path, error.reason, error.detail)
    parent = Path(path).parent.as_posix()
    return Record(path, len(data), None if parent == "." else parent, facts)


# -- plan ------------------------------------------------------------------------------------------


def plan_shards(
    usable: Sequence[Record], rejected: Sequence[Rejected], source: dict[str, Any], settings: Settings
) -> Plan:
    """Shuffle the records by the seed and fill one shard after the other."""
    shards: list[list[Record]] = [[]]
    held = 0  # bytes in the last shard
    for index in Draws(settings.seed, "shards.deal").shuffled(len(usable)):
        record = usable[index]
        if settings.shard_records is not None:
            full = len(shards[-1]) >= settings.shard_records
        else:
            full = bool(shards[-1]) and held + record.size > settings.shard_mb * 10**6
        if full:
            shards.append([])
            held = 0
        shards[-1].append(record)
        held += record.size
    return Plan(source, shards, list(rejected))


def _save_plan(path: Path, plan: Plan) -> None:
    write_json(path, asdict(plan))


def _load_plan(path: Path) -> Plan:
    tree = read_json(path)
    shards = [[Record(**{**r, "facts": VideoFacts(**r["facts"])}) for r in shard] for shard in tree["shards"]]
    return Plan(tree["source"], shards, [Rejected(**r) for r in tree["rejected"]])


# -- write -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardTask:
    videos: str
    path: str
    first: int
    records: list[Record]


def write_shards(videos: Path, out: Path, plan: Plan, *, workers: int, progress: Progress) -> None:
    """Write the shards that are missing, then columns and manifest."""
    tasks, first = [], 0
    for number, records in enumerate(plan.shards):
        tasks.append(_ShardTask(str(videos), str(out / f"shard-{number:06d}.tar"), first, records))
        first += len(records)
    written: dict[int, tuple[Shard, npt.NDArray[np.int64]]] = {}
    for index, result in map_in_workers(_write_shard, tasks, workers=workers):
        if isinstance(result, Crashed):
            raise UserError("the process that wrote this shard died", where=tasks[index].path, fix="run it again")
        written[index] = result
        progress("writing", len(written), len(tasks))
    rows = "".join(json.dumps(asdict(r)) + "\n" for r in plan.rejected)
    write_atomic(out / REJECTED, rows)
    records = [record for shard in plan.shards for record in shard]
    classes = sorted({record.label for record in records if record.label is not None})
    write_manifest(
        out,
        shards=[written[i][0] for i in range(len(tasks))],
        classes=classes,
        columns=_columns(records, classes, np.concatenate([written[i][1] for i in range(len(tasks))])),
        source=plan.source,
    )
    (out / PLAN).unlink()


def _columns(
    records: Sequence[Record], classes: Sequence[str], places: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    number = {name: i for i, name in enumerate(classes)}
    facts = [record.facts for record in records]
    return {
        "key": np.array([_key(i) for i in range(len(records))], "S"),
        **{name: places[:, i] for i, name in enumerate(_PLACES)},
        "duration": np.array([f.duration for f in facts], np.float64),
        "fps": np.array([f.fps for f in facts], np.float64),
        "frames": np.array([f.frames for f in facts], np.int64),
        "width": np.array([f.width for f in facts], np.int32),
        "height": np.array([f.height for f in facts], np.int32),
        "label": np.array([-1 if r.label is None else number[r.label] for r in records], np.int64),
    }


_PLACES = ("video.offset", "video.size", "json.offset", "json.size")


def _key(index: int) -> str:
    return f"{index:09d}"


def _write_shard(task: _ShardTask) -> tuple[Shard, npt.NDArray[np.int64]]:
    """One shard, unless a run before this one has written it. Returns it and where its members lie."""
    path = Path(task.path)
    if not path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                with TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="") as tar:
                    for index, record in enumerate(task.records, start=task.first):
                        tar.write(_sample(Path(task.videos), index, record))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_dir(path.parent)
        except OSError as error:
            raise UserError(f"cannot write the shard: {error.strerror}", where=path) from None
    places = _index_shard(path)
    expected = [_key(task.first + i) for i in range(len(task.records))]
    if list(places) != expected:
        raise UserError("this shard is not of this data set", where=path, fix="remove it, or give another OUT")
    shard = Shard(path.name, len(places), path.stat().st_size, sha256_file(path))
    return shard, np.array(list(places.values()), np.int64)


def _sample(videos: Path, index: int, record: Record) -> dict[str, Any]:
    source = videos / record.path
    try:
        data = source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read any more: {error.strerror}", where=source, fix="restore it") from None
    if len(data) != record.size:
        raise UserError("the file has changed since it was probed", where=source, fix="remove OUT and run again")
    known = {"path": record.path, "label": record.label, **asdict(record.facts)}
    return {"__key__": _key(index), _extension(record.path): data, "json": json.dumps(known).encode()}


def _extension(path: str) -> str:
    """The member's extension: the file's own, unless WebDataset would read it in another way."""
    suffix = Path(path).suffix[1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() and suffix != "json" else "video"


def _index_shard(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Offset and size of each record's video and JSON in a tar, by key, in order."""
    places: dict[str, dict[str, int]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            role = "json" if extension == "json" else "video"
            places.setdefault(key, {}).update({f"{role}.offset": member.offset_data, f"{role}.size": member.size})
    return {key: tuple(found[name] for name in _PLACES) for key, found in places.items()}  # type: ignore[misc]


def _summary(out: Path, existed: bool = False) -> Summary:
    manifest = Manifest.open(out)
    with open(out / REJECTED) as file:
        rejected = Counter(json.loads(line)["reason"] for line in file)
    return Summary(
        clips=manifest.records,
        shards=len(manifest.shards),
        hours=float(manifest.column("duration").sum()) / 3600,
        bytes=sum(shard.bytes for shard in manifest.shards),
        rejected=dict(rejected.most_common()),
        existed=existed,
    )
