"""Extracts features of a folder of videos, or of shards, to disk.

    OUT/extract.json                 settings, sources and model: written first
    OUT/parts/000123.safetensors     ``features`` of a range of the sources (missing where none of them is usable)
    OUT/parts/000123.rejected.jsonl  sources of this range that were rejected, and why
    OUT/parts/000123.jsonl           a line per chunk of a video: written last, so it exists only if the part is whole
    OUT/index.jsonl, rejected.jsonl  the parts' lines in order: they exist only if all parts do

A part is a function of its sources and the settings. So a killed run continues with the missing parts, jobs of a Slurm
array share the work by part number without writing the same file, and existing parts are never written again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vjepa_scale.checkpoint.safetensors_writer import write_safetensors
from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import read_json, read_jsonl, write_atomic, write_json
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.loader import Prefetched, past_lost_clips
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest, metadata_of
from vjepa_scale.data.substitution import Known
from vjepa_scale.data.watchdog import DecodeStatus
from vjepa_scale.inference.clips import Chunk, cropped, cut_chunks
from vjepa_scale.inference.model import Model
from vjepa_scale.shards.probe import probe_sources
from vjepa_scale.shards.records import Rejected
from vjepa_scale.shards.sources import folder_source, list_sources
from vjepa_scale.shards.work import Settings as ShardSettings
from vjepa_scale.video.container import DecodeError, Media
from vjepa_scale.video.stream import picture_count, stream_pictures

SETTINGS = "extract.json"
INDEX = "index.jsonl"
PARTS = "parts"

T = TypeVar("T")
Pool = Literal["mean", "time", "none"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Called with (parts done, number of parts).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """Settings that, with the sources and the model, determine the bytes of all parts.

    pool:   mean: a row per chunk, over its new tokens; time: a row per token step, over space; none: every token
    layers: block numbers, each through the final norm; None: the encoder's output
    chunk:  frames that the encoder sees together
    dtype:  of the features on disk
    batch:  chunks per forward pass
    part:   videos per file
    """

    pool: Pool
    layers: tuple[int, ...] | None
    chunk: int
    dtype: Literal["float32", "float16", "bfloat16"]
    batch: int
    part: int


@dataclass(frozen=True)
class Summary:
    """chunks, rejected: of this call's parts; missing: number of all parts that do not exist yet."""

    parts: int
    chunks: int
    rejected: int
    missing: int


@dataclass(frozen=True)
class _Video:
    """One usable source. known: fields of each of its index lines; record: its index in the shards."""

    source: str
    duration_s: float
    known: dict[str, Any]
    record: int = -1


class _Folder:
    """Video files below a folder. The label of a file is its folder."""

    def __init__(self, folder: Path, out: Path, *, everything: bool = False) -> None:
        self._folder = folder
        self._paths = list_sources(folder, out, everything=everything)
        self.count = len(self._paths)

    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for path in self._paths:
            file = self._folder / path
            listing.update(f"{path!r} {file.stat().st_size if file.is_file() else -1}\n".encode())
        return {"videos": self.count, "listing": listing.hexdigest()}

    def usable(self, numbers: range, workers: int) -> tuple[list[_Video], list[Rejected]]:
        """Returns the files that make_shards would accept, and the reasons to reject the others."""
        sources = [folder_source(self._paths[n]) for n in numbers]
        records, rejected = probe_sources(
            self._folder, sources, ShardSettings(), workers=workers, progress=lambda *_: None
        )
        return [_Video(r.path, r.facts.duration, {"source": r.path, "label": r.label}) for r in records], rejected

    def media(self, video: _Video) -> Media:
        return self._folder / video.source


def _folder(folder: Path, out: Path) -> _Folder:
    """Lists a folder's videos; includes files of file managers where an earlier version began OUT and included them."""
    videos = _Folder(folder, out)
    begun = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else None
    if isinstance(begun, dict) and begun.get("source") != videos.identity():
        earlier = _Folder(folder, out, everything=True)
        if begun.get("source") == earlier.identity():
            return earlier
    return videos


class _Shards:
    """Records of shards, which make_shards has checked."""

    def __init__(self, folder: Path) -> None:
        self._manifest = Manifest.open(folder)
        self.count = self._manifest.records

    def identity(self) -> dict[str, Any]:
        return {"videos": self.count, "shards": self._manifest.identity}

    def usable(self, numbers: range, workers: int) -> tuple[list[_Video], list[Rejected]]:
        videos = [self._video(record) for record in numbers]
        moving = [video for video in videos if video.duration_s > 0]
        still = [Rejected(video.source, "a picture") for video in videos if not video.duration_s > 0]
        return moving, still

    def _video(self, record: int) -> _Video:
        manifest = self._manifest
        label = int(manifest.column("label")[record])
        # Shards made by other tools may have no JSON for a record, or none with its source.
        metadata = metadata_of(manifest, record)
        path = metadata.get("path") or f"{manifest.shard_of(record).name}:{manifest.key(record)}"
        known = {
            "source": path,
            "shard": manifest.shard_of(record).name,
            "key": manifest.key(record),
            "label": None if label < 0 else manifest.classes[label],
        }
        return _Video(path, float(manifest.column("duration")[record]), known, record)

    def media(self, video: _Video) -> Media:
        return self._manifest.read(video.record)


def extract(
    source: Path,
    out: Path,
    model: Model,
    settings: Settings,
    *,
    share: tuple[int, int] = (0, 1),
    workers: int,
    progress: Progress,
) -> Summary:
    """Writes every n-th part from number i on, ``share`` being (i, n), and the merged index once no part is missing.

    Raises UserError, before anything is written, where there is nothing to read or ``out`` holds something else; and at
    the end where no video could be used.
    """
    videos = _Shards(source) if (source / MANIFEST).is_file() else _folder(source, out)
    _claim(out, {"source": videos.identity(), "model": _identity(model), **asdict(settings)})
    parts = -(-videos.count // settings.part)
    mine = range(share[0], parts, share[1])
    for done, part in enumerate(mine, start=1):
        if not _part(out, part, ".jsonl").exists():
            numbers = range(part * settings.part, min((part + 1) * settings.part, videos.count))
            _write_part(out, part, videos, numbers, model, settings, workers)
        progress(done, len(mine))
    missing = sum(not _part(out, part, ".jsonl").exists() for part in range(parts))
    if not missing:
        _merge(out, parts)
    return Summary(
        parts=len(mine),
        chunks=sum(1 for part in mine for _ in read_jsonl(_part(out, part, ".jsonl"))),
        rejected=sum(1 for part in mine for _ in read_jsonl(_part(out, part, f".{REJECTED}"))),
        missing=missing,
    )


def _identity(model: Model) -> dict[str, Any]:
    """Returns what identifies a model: its input, and a digest of all its biases and norms, which training changes."""
    digest = hashlib.sha256()
    for name, parameter in model.encoder.named_parameters():
        if parameter.ndim == 1:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    config = model.config
    return {
        "weights": digest.hexdigest(),
        "model": config.model.model_dump(mode="json"),  # the weights do not show heads and positions
        "mean": list(config.mean),
        "std": list(config.std),
        "fps": config.fps,
        "size": list(config.size),
        "compute": str(model.dtype).removeprefix("torch."),
    }


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes ``settings`` into ``out`` unless they are there. Raises UserError where it holds anything else."""
    settings = json.loads(json.dumps(settings))
    path = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    if not path.exists():
        foreign = out.is_dir() and any(not child.name.startswith(f".{SETTINGS}.") for child in out.iterdir())
        # Checked again, because jobs of an array start at the same time.
        if foreign and not path.exists():
            raise UserError("OUT is not empty, and not of this program", where=out, fix="give a new or empty folder")
        if not path.exists():
            write_json(path, settings)
    found = read_json(path)
    differs = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
    if differs:
        raise UserError(
            f"OUT holds features of another {', '.join(differs)}",
            where=path,
            fix="give another OUT, or remove this one",
        )


def _part(out: Path, number: int, suffix: str) -> Path:
    return out / PARTS / f"{number:06d}{suffix}"


def _merge(out: Path, parts: int) -> None:
    """Merges all parts' lines in order. Any job that finds all parts may do it; two jobs write the same bytes."""
    for suffix, name in ((f".{REJECTED}", REJECTED), (".jsonl", INDEX)):
        write_atomic(out / name, b"".join(_part(out, part, suffix).read_bytes() for part in range(parts)))
    if not (out / INDEX).stat().st_size:
        reasons = Counter(row["reason"] for row in read_jsonl(out / REJECTED))
        named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UserError(f"none of {reasons.total()} videos can be used: {named}", where=out / REJECTED)


# -- one part --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Successive chunks of one video, of one length, decoded together. first: number of the first picture."""

    video: _Video
    chunks: list[Chunk[int]]

    @property
    def first(self) -> int:
        return self.chunks[0].frames[0]


def _write_part(
    out: Path, number: int, videos: _Folder | _Shards, numbers: range, model: Model, settings: Settings, workers: int
) -> None:
    """Writes the three files of a part, the index last."""
    for left in (out / PARTS).glob(f".{number:06d}.*.tmp"):  # left by a killed process
        left.unlink(missing_ok=True)
    usable, rejected = videos.usable(numbers, workers)
    jobs = [job for video in usable for job in _jobs(video, model, settings)]
    limit_s = ShardSettings().decode_timeout_s  # the limit of the check of a folder's videos
    rows, failed = _encode(jobs, _decoded(videos, jobs, model, workers, limit_s), model, settings)
    rejected = [*rejected, *failed.values()]
    lines, features, at = list[dict[str, Any]](), list[Tensor](), 0
    for video, chunk, value in rows:
        if video.source in failed:  # reject the whole video
            continue
        start_s, end_s = chunk.first / model.config.fps, (chunk.first + chunk.real) / model.config.fps
        where = {"file": f"{PARTS}/{number:06d}.safetensors", "row": at, "rows": len(value)}
        lines.append({**video.known, "start_s": start_s, "end_s": min(end_s, video.duration_s), **where})
        features.append(value)
        at += len(value)
    if features:
        whole = torch.cat(features)
        entry = ("features", tuple(whole.shape), whole.dtype)
        write_safetensors(_part(out, number, ".safetensors"), [entry], lambda _: whole, {"format": "pt"})
    write_atomic(_part(out, number, f".{REJECTED}"), _jsonl(asdict(r) for r in rejected))
    write_atomic(_part(out, number, ".jsonl"), _jsonl(lines))


def _jsonl(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _jobs(video: _Video, model: Model, settings: Settings) -> Iterator[_Job]:
    pictures = picture_count(video.duration_s, model.config.fps)
    chunks = list(cut_chunks(range(pictures), chunk=settings.chunk, tubelet=model.config.model.tubelet))
    for i in range(0, len(chunks), settings.batch):
        yield _Job(video, chunks[i : i + settings.batch])


def _decoded(
    videos: _Folder | _Shards, jobs: Sequence[_Job], model: Model, workers: int, limit_s: float
) -> Iterator[list[Tensor] | Rejected]:
    """Yields ``_decode`` of each job in order, by workers. A video that crashes its worker is rejected too.

    limit_s: time limit for one picture
    """

    def start(given: int, lost: Known) -> Prefetched[tuple[int, _Job], list[Tensor] | Rejected]:
        sources = {place: jobs[place.slot].video.source for place in lost}
        rejected = {source: Rejected(source, *lost[place]) for place, source in sources.items()}
        board = DecodeStatus([""], workers) if workers else None
        load = partial(_decode, videos, model.config.fps, model.config.size, board, rejected)
        waiting = list(enumerate(jobs))[given:]
        return Prefetched(load, waiting, workers=workers, prefetch=2, board=board, limit_s=limit_s)

    return past_lost_clips(start, len(jobs))


def _decode(
    videos: _Folder | _Shards,
    fps: float,
    size: tuple[int, int],
    board: DecodeStatus | None,
    lost: Mapping[str, Rejected],
    numbered: tuple[int, _Job],
) -> list[Tensor] | Rejected:
    """Decodes the clip of each chunk, uint8 [3, T, H, W]; runs in a worker.

    board: records every picture;  lost: videos to reject without an attempt
    """
    number, job = numbered
    if job.video.source in lost:
        return lost[job.video.source]
    last = job.chunks[-1]
    count = last.first + last.real - job.first
    rejected = partial(Rejected, job.video.source)
    try:
        pictures = stream_pictures(videos.media(job.video), fps=fps, start_s=job.first / fps)
        # Crops one by one, because full pictures of several chunks would take gigabytes.
        recorded = _recorded(board, ClipRef(0, number, "", 0, (), fps), pictures)
        clips = [cropped(picture, size) for picture in islice(recorded, count)]
    except DecodeError as error:
        return rejected(error.reason, error.detail)
    except OSError as error:
        return rejected("unreadable", reason_of(error))
    if len(clips) < count:
        return rejected("does not decode to the end", f"{job.first + len(clips)} of {job.first + count} pictures")
    return [torch.cat([clips[n - job.first] for n in chunk.frames], dim=1) for chunk in job.chunks]


def _recorded(board: DecodeStatus | None, ref: ClipRef, pictures: Iterator[T]) -> Iterator[T]:
    """Yields the pictures, and records each on the board while it is decoded."""
    while True:
        with board.decoding(ref) if board is not None else nullcontext():
            picture = next(pictures, None)
        if picture is None:
            return
        yield picture


def _encode(
    jobs: Sequence[_Job], loaded: Iterator[list[Tensor] | Rejected], model: Model, settings: Settings
) -> tuple[list[tuple[_Video, Chunk[int], Tensor]], dict[str, Rejected]]:
    """Returns (video, chunk, its rows) of all chunks in order, and the videos that failed to decode."""
    rows: list[tuple[_Video, Chunk[int], Tensor]] = []
    failed: dict[str, Rejected] = {}
    waiting: list[tuple[_Video, Chunk[int], Tensor]] = []

    def run() -> None:
        if waiting:
            tokens = model.encode_clips(model.normalise(torch.stack([clip for _, _, clip in waiting])), settings.layers)
            for (video, chunk, _), of_clip in zip(waiting, tokens, strict=True):
                rows.append((video, chunk, _pooled(of_clip, chunk, model, settings)))
            waiting.clear()

    for job, clips in zip(jobs, loaded, strict=True):
        if isinstance(clips, Rejected):
            failed.setdefault(clips.path, clips)
            continue
        for chunk, clip in zip(job.chunks, clips, strict=True):
            # A batch has clips of one length, of any videos. Its composition depends on nothing else.
            if len(waiting) == settings.batch or (waiting and waiting[0][2].shape != clip.shape):
                run()
            waiting.append((job.video, chunk, clip))
    run()
    return rows, failed


def _pooled(tokens: Tensor, chunk: Chunk[int], model: Model, settings: Settings) -> Tensor:
    """Pools tokens [N, D] or [L, N, D] of a chunk; returns its new rows on the CPU: [1, …] for mean, else [steps, …].

    The other dimensions are [D] or [L, D]; without pooling [h, w, D] or [h, w, L, D].
    """
    shape = model.config.model
    height, width = (side // shape.patch for side in model.config.size)
    steps = chunk.new // shape.tubelet
    new = tokens[..., -steps * height * width :, :].unflatten(-2, (steps, height, width))
    if settings.layers is not None:
        new = new.movedim(0, -2)
    if settings.pool == "mean":
        new = new.flatten(0, 2).mean(0, keepdim=True)
    elif settings.pool == "time":
        new = new.flatten(1, 2).mean(1)
    return new.to(DTYPES[settings.dtype]).cpu()
