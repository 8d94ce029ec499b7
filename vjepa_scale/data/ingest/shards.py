"""Videos and images -> WebDataset shards with a manifest. Three steps, so that each can be scaled alone:

    probe   (workers)      every file is decoded whole: facts, or a reason to reject it; long videos are cut
    plan    (one process)  duplicates are rejected; records are shuffled by the seed and dealt to shards;
                           written to OUT/.plan.json
    write   (workers)      each shard under a temporary name, then renamed; the manifest last

A shard is a pure function of the plan, so a run that was killed goes on with the shards that are missing.
One bad file never stops the run and is never dropped silently: it goes to rejected.jsonl.
"""

import hashlib
import json
import os
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
from vjepa_scale.data.decode import NOT_A_VIDEO, DecodeError
from vjepa_scale.data.ingest.cut import Cut, checked_cut, copy_cut, plan_cuts
from vjepa_scale.data.ingest.probe import Decoded, VideoFacts, decode_whole
from vjepa_scale.data.ingest.sources import Source, find_sources, folder_source
from vjepa_scale.data.ingest.summary import Summary, summarize
from vjepa_scale.data.ingest.tars import Sample, list_tar
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Shard, write_manifest
from vjepa_scale.data.processes import Crashed, map_in_workers

PLAN = ".plan.json"
PLAN_VERSION = 2

# Told (what is being done, how much is done, of how much).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is made of the sources.

    shard_records: clips per shard; or else shard_mb: a shard is full at this many megabytes of video
    images:        pictures are records too, as clips that stand still
    segment_s:     longer videos are cut into clips of up to this many seconds (see cut.py)
    min_s:         shorter clips are rejected
    """

    seed: int = 0
    shard_records: int | None = None
    shard_mb: int = 256
    images: bool = False
    segment_s: float | None = None
    min_s: float = 0.0


@dataclass(frozen=True)
class Rejected:
    """A source file that was left out. reason: one of few, to count by; detail: the particular."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One clip of the plan.

    path: relative to the sources' folder, or absolute; size, sha256: of the record's bytes; cut: where it is a part
    """

    path: str
    size: int
    label: str | None
    facts: VideoFacts
    sha256: str
    cut: Cut | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of all shards. source: see ``describe_source``."""

    source: dict[str, Any]
    shards: list[list[Record]]
    rejected: list[Rejected]


def make_shards(videos: Path, out: Path, settings: Settings, *, workers: int, progress: Progress) -> Summary:
    """Make the data set, or finish it, or find it finished.

    videos: a folder, or a list (see sources.py)
    Raises UserError, before anything is written, where there is nothing to make it from or where ``out``
    holds something else.
    """
    root, sources = find_sources(videos, out)
    source = describe_source(root, sources, settings)
    held = _held(out, source)
    if held == MANIFEST:
        _tidy(out)
        return summarize(out, existed=True)
    if held == PLAN:
        plan = _load_plan(out / PLAN)
    else:
        usable, rejected = probe_sources(root, sources, settings, workers=workers, progress=progress)
        if not usable:
            counts = Counter(r.reason for r in rejected)
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
            fix = "--images takes pictures as clips that stand still" if counts[NOT_A_VIDEO] else None
            raise UserError(f"none of {len(rejected)} files can be used: {reasons}", where=videos, fix=fix)
        plan = plan_shards(*without_duplicates(usable, rejected), source, settings)
        _save_plan(out / PLAN, plan)
    write_shards(root, out, plan, workers=workers, progress=progress)
    _tidy(out)
    return summarize(out)


def describe_source(root: Path, sources: Sequence[Source], settings: Settings) -> dict[str, Any]:
    """What identifies a data set before it is made: names and sizes of the files, and the settings."""
    listing = hashlib.sha256()
    for source in sources:
        path = root / source.path
        size = os.path.getsize(path) if os.path.exists(path) else -1
        asked = repr(source.path) if source == folder_source(source.path) else repr(source)
        listing.update(f"{asked} {size}\n".encode())
    plain = asdict(Settings())
    always = ("seed", "shard_records", "shard_mb")  # the others: so that data sets made before they existed are known
    chosen = {key: value for key, value in asdict(settings).items() if key in always or value != plain[key]}
    return {"files": len(sources), "listing": listing.hexdigest(), **chosen}


def _tidy(out: Path) -> None:
    """Remove what kills have left: the plan of a finished data set, and files under temporary names."""
    for left in (out / PLAN, *out.glob(".*.tmp"), *(out / "columns").glob(".*.tmp")):
        left.unlink(missing_ok=True)


def _held(out: Path, source: dict[str, Any]) -> str | None:
    """What of this data set ``out`` holds: the manifest, the plan, or nothing."""
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    for name in (MANIFEST, PLAN):
        if (out / name).exists():
            tree = read_json(out / name)
            if not isinstance(tree, dict) or tree.get("source") != source:
                raise UserError(
                    "OUT holds a data set of other videos, seed or shard size, or made otherwise",
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
    root: Path, sources: Sequence[Source], settings: Settings, *, workers: int, progress: Progress
) -> tuple[list[Record], list[Rejected]]:
    """Decode every file. Returns the usable and the rejected, each in the order of ``sources``."""
    verdicts: list[list[Record | Rejected]] = [[] for _ in sources]
    tasks = [(str(root), source, settings) for source in sources]
    for done, (index, found) in enumerate(map_in_workers(_probe, tasks, workers=workers), start=1):
        if isinstance(found, Crashed):
            found = [Rejected(sources[index].path, "crashes the decoder")]
        verdicts[index] = found
        progress("probing", done, len(sources))
    flat = [verdict for found in verdicts for verdict in found]
    return [v for v in flat if isinstance(v, Record)], [v for v in flat if isinstance(v, Rejected)]


def _probe(task: tuple[str, Source, Settings]) -> list[Record | Rejected]:
    """What becomes of one source: a record, or several where it is cut; or why not."""
    root, source, settings = task
    path = Path(root) / source.path
    if not path.is_file():  # a pipe would never end
        broken = "a broken link" if path.is_symlink() else "not a file" if path.exists() else "no such file"
        return [Rejected(source.path, "unreadable", broken)]
    try:
        decoded = decode_whole(path, images=settings.images)
        whole = (source.start_s, source.end_s, settings.segment_s) == (None, None, None)
        still = decoded.facts.duration == 0
        cuts = None
        if not (whole or still):
            cuts = plan_cuts(path, decoded, start_s=source.start_s, end_s=source.end_s, segment_s=settings.segment_s)
        if cuts is not None:
            return [_probe_cut(path, source, settings, decoded, cut) for cut in cuts]
        if not still and (short := _too_short(source.path, decoded.facts, settings)):
            return [short]
        digest, size = sha256_file(path), path.stat().st_size
        return [Record(source.path, size, source.label, decoded.facts, digest, None, source.metadata)]
    except OSError as error:
        return [Rejected(source.path, "unreadable", str(error.strerror))]
    except DecodeError as error:
        return [Rejected(source.path, error.reason, error.detail)]


def _probe_cut(path: Path, source: Source, settings: Settings, decoded: Decoded, cut: Cut) -> Record | Rejected:
    try:
        data, facts = checked_cut(path, decoded, cut)
    except DecodeError as error:
        part = f"from {cut.start_s:.3f} to {cut.end_s:.3f} s"
        return Rejected(source.path, error.reason, f"{part}: {error.detail}" if error.detail else part)
    digest = hashlib.sha256(data).hexdigest()
    short = _too_short(source.path, facts, settings, start_s=cut.start_s)
    return short or Record(source.path, len(data), source.label, facts, digest, cut, source.metadata)


def _too_short(path: str, facts: VideoFacts, settings: Settings, start_s: float | None = None) -> Rejected | None:
    if facts.duration >= settings.min_s:
        return None
    part = "" if start_s is None else f", from {start_s:.3f} s on"
    return Rejected(path, "too short", f"{facts.duration:.3f} s{part}")


# -- plan ------------------------------------------------------------------------------------------


def without_duplicates(usable: Sequence[Record], rejected: Sequence[Rejected]) -> tuple[list[Record], list[Rejected]]:
    """Of records with the same bytes the first is kept; the others join the rejected."""
    first: dict[str, Record] = {}
    copies = []
    for record in usable:
        if first.setdefault(record.sha256, record) is not record:
            part = "" if record.cut is None else f", from {record.cut.start_s:.3f} s on"
            copies.append(Rejected(record.path, "duplicate", f"of {first[record.sha256].path}{part}"))
    return list(first.values()), [*rejected, *copies]


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
    write_json(path, {"version": PLAN_VERSION, **asdict(plan)})


def _load_plan(path: Path) -> Plan:
    tree = read_json(path)
    if tree.get("version") != PLAN_VERSION:
        raise UserError(
            "begun by another version of make_shards", where=path, fix="remove this folder, or give another"
        )
    return Plan(
        tree["source"],
        [[_record(r) for r in shard] for shard in tree["shards"]],
        [Rejected(**r) for r in tree["rejected"]],
    )


def _record(tree: dict[str, Any]) -> Record:
    cut = None if tree["cut"] is None else Cut(**tree["cut"])
    return Record(**{**tree, "facts": VideoFacts(**tree["facts"]), "cut": cut})


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
    classes, columns = record_columns(
        [_key(i) for i in range(len(records))],
        np.concatenate([written[i][1] for i in range(len(tasks))]),
        [record.facts for record in records],
        [record.label for record in records],
    )
    shards = [written[i][0] for i in range(len(tasks))]
    write_manifest(out, shards=shards, classes=classes, columns=columns, source=plan.source)
    (out / PLAN).unlink()


def record_columns(
    keys: Sequence[str], places: npt.NDArray[np.int64], facts: Sequence[VideoFacts], labels: Sequence[str | None]
) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """The classes, and the manifest's columns (see manifest.py). places: int64 [records, 4], as _PLACES."""
    classes = sorted({label for label in labels if label is not None})
    number = {name: i for i, name in enumerate(classes)}
    return classes, {
        "key": np.array([key.encode() for key in keys], "S"),
        **{name: places[:, i] for i, name in enumerate(_PLACES)},
        "duration": np.array([f.duration for f in facts], np.float64),
        "fps": np.array([f.fps for f in facts], np.float64),
        "frames": np.array([f.frames for f in facts], np.int64),
        "width": np.array([f.width for f in facts], np.int32),
        "height": np.array([f.height for f in facts], np.int32),
        "label": np.array([-1 if label is None else number[label] for label in labels], np.int64),
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
    samples = list_tar(path).samples
    if [sample.key for sample in samples] != [_key(task.first + i) for i in range(len(task.records))]:
        raise UserError("this shard is not of this data set", where=path, fix="remove it, or give another OUT")
    shard = Shard(path.name, len(samples), path.stat().st_size, sha256_file(path))
    return shard, np.array([_place(sample) for sample in samples], np.int64)


def _place(sample: Sample) -> list[int]:
    """Offset and size of video and JSON, as _PLACES."""
    (video,) = (member for extension, member in sample.members.items() if extension != "json")
    known = sample.members["json"]
    return [video.offset, video.size, known.offset, known.size]


def _sample(root: Path, index: int, record: Record) -> dict[str, Any]:
    source = root / record.path
    changed = UserError("the file has changed since it was probed", where=source, fix="remove OUT and run again")
    try:
        data = source.read_bytes() if record.cut is None else copy_cut(source, record.cut)
    except OSError as error:
        raise UserError(f"cannot be read any more: {error.strerror}", where=source, fix="restore it") from None
    except DecodeError:
        raise changed from None
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise changed
    known = {"path": record.path, "label": record.label, **asdict(record.facts)}
    if record.cut is not None:
        known |= {"start": record.cut.start_s, "end": record.cut.end_s}
    if record.metadata is not None:
        known["metadata"] = record.metadata
    extension = _extension(record.path) if record.cut is None else record.cut.extension
    return {"__key__": _key(index), extension: data, "json": json.dumps(known).encode()}


def _extension(path: str) -> str:
    """The member's extension: the file's own, unless WebDataset would read it in another way."""
    suffix = Path(path).suffix[1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() and suffix != "json" else "video"
