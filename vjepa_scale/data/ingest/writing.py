"""The plan's shards, and the manifest at last.

    OUT/shard-000000.tar                     under a temporary name, then renamed
    OUT/.work/written/shard-000000.json      its receipt: bytes, sha256, and where its members lie

A shard is a function of the plan, so a run goes on with the shards that have no receipt, and two processes on one
shard write the same bytes. Held meanwhile: a block of one file per worker (a part that is cut, in whole).
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, sha256_file, temporary_beside, write_atomic
from vjepa_scale.data.decode import DecodeError
from vjepa_scale.data.ingest.cut import copy_cut
from vjepa_scale.data.ingest.droid import LOG
from vjepa_scale.data.ingest.encode import transcode
from vjepa_scale.data.ingest.planning import FACTS, Plan, planned
from vjepa_scale.data.ingest.records import Record
from vjepa_scale.data.ingest.summary import Summary, summarize
from vjepa_scale.data.ingest.sums import Sha256
from vjepa_scale.data.ingest.tars import Member, TarWriter
from vjepa_scale.data.ingest.trajectories import members, retimed_video
from vjepa_scale.data.ingest.transcode import Transcode, digest_of_part
from vjepa_scale.data.ingest.work import Part, Progress, Work, publish, tidy
from vjepa_scale.data.manifest import REJECTED, Shard, write_manifest
from vjepa_scale.data.processes import map_in_workers
from vjepa_scale.data.statistics import log_statistics, merged

_BLOCK = 2**22  # bytes of a file


def write(work: Work, part: Part, *, workers: int, progress: Progress) -> None:
    """Write this part's shards, but for those that a run before this one has written."""
    shards = range(part.index, Plan.open(work).shards, part.of)
    missing = [shard for shard in shards if not _is_written(work, shard)]
    done = len(shards) - len(missing)
    for index, result in map_in_workers(partial(_write_shard, work), missing, workers=workers):
        if not isinstance(result, Path):
            path = _shard(work, missing[index])
            raise UserError("the process that wrote this shard died", where=path, fix="run it again")
        done += 1
        progress("writing", done, len(shards))


def finish(work: Work) -> Summary:
    """Columns, rejected.jsonl, then the manifest; what the making needed is removed.

    Raises UserError while a shard is missing.
    """
    plan = Plan.open(work)
    missing = sum(not _is_written(work, shard) for shard in range(plan.shards))
    if missing:
        what = f"{missing} of {plan.shards} shards are not written yet"
        raise UserError(what, where=work.out, fix="run the same command again, or the jobs that are missing")
    temporary = temporary_beside(work.out / REJECTED)
    shutil.copyfile(planned(work) / REJECTED, temporary)
    publish(temporary, work.out / REJECTED)
    shards, places, trajectories = _receipts(work, plan)
    columns: dict[str, npt.NDArray[Any]] = {"key": keys(len(plan.column("label")))}
    for role, place in places.items():
        columns |= {f"{role}.offset": place[:, 0], f"{role}.size": place[:, 1]}
    columns |= {name: plan.column(name) for name in (*FACTS, "label")}
    write_manifest(
        work.out, shards=shards, classes=plan.classes, columns=columns, source=work.source, trajectories=trajectories
    )
    tidy(work.out)
    return summarize(work.out)


def keys(records: int) -> npt.NDArray[np.bytes_]:
    """The key of every record in its shard: its number, in nine digits or more."""
    width = max(9, len(str(records - 1)))
    digits = np.empty((records, width), np.uint8)
    number = np.arange(records)
    for place in reversed(range(width)):
        digits[:, place] = number % 10 + ord("0")
        number //= 10
    return digits.view(f"S{width}")[:, 0]


def _key(record: int) -> str:
    return f"{record:09d}"


def _shard(work: Work, shard: int) -> Path:
    return work.out / f"shard-{shard:06d}.tar"


def _receipt(work: Work, shard: int) -> Path:
    return work.folder / "written" / f"shard-{shard:06d}.json"


def _is_written(work: Work, shard: int) -> bool:
    return _receipt(work, shard).exists() and _shard(work, shard).exists()


def _receipts(work: Work, plan: Plan) -> tuple[list[Shard], dict[str, npt.NDArray[np.int64]], dict[str, Any] | None]:
    """The shards, where members lie in them (by role, offset and size [records, 2], zeros where there is none), and
    statistics of trajectories.

    16 bytes a record and role are held.
    """
    shards, places, first = list[Shard](), dict[str, npt.NDArray[np.int64]](), 0
    moved = list[dict[str, Any]]()
    for number, end in enumerate(plan.ends.tolist()):
        receipt, path = read_json(_receipt(work, number)), _shard(work, number)
        if path.stat().st_size != receipt["bytes"]:
            raise UserError("other bytes than were written", where=path, fix="remove it and run the command again")
        shards.append(Shard(path.name, end - first, receipt["bytes"], receipt["sha256"]))
        moved += [receipt["trajectories"]] if receipt["trajectories"] else []
        for role, place in receipt["members"].items():
            if role not in places:
                places[role] = np.zeros((int(plan.ends[-1]), 2), np.int64)
            places[role][first:end] = place
        first = end
    return shards, places, merged(moved) if moved else None


# -- one shard -------------------------------------------------------------------------------------


def _write_shard(work: Work, shard: int) -> Path:
    """One shard and its receipt."""
    path, plan = _shard(work, shard), Plan.open(work)
    temporary = temporary_beside(path)
    members: dict[str, list[tuple[int, int]]] = {}
    moved: dict[str, Any] | None = None
    try:
        with open(temporary, "wb") as file:
            tar = TarWriter(file)
            for number, (index, record) in enumerate(plan.records(shard)):
                beside = _beside(work.root, record)
                if "states" in beside:
                    own = log_statistics(np.load(io.BytesIO(beside["states"]), allow_pickle=False))
                    moved = own if moved is None else merged([moved, own])
                for role, place in _add_sample(tar, work.root, index, record, beside).items():
                    places = members.setdefault(role, [])
                    places += [(0, 0)] * (number - len(places))
                    places.append((place.offset, place.size))
            tar.close()
        os.replace(temporary, path)  # the manifest makes it last through a power cut: one wait for all
    except OSError as error:
        raise UserError(f"cannot write the shard: {error.strerror}", where=path) from None
    finally:
        temporary.unlink(missing_ok=True)
    records = int(plan.ends[shard]) - (int(plan.ends[shard - 1]) if shard else 0)
    for places in members.values():
        places += [(0, 0)] * (records - len(places))
    receipt = {"bytes": tar.size, "sha256": tar.sha256, "members": members, "trajectories": moved}
    write_atomic(_receipt(work, shard), json.dumps(receipt))
    return path


def _add_sample(tar: TarWriter, root: Path, index: int, record: Record, beside: dict[str, bytes]) -> dict[str, Member]:
    """Write a record's members, in the order of their names. Returns where they lie, by role: video, json, states, …

    beside: further members, by role
    """
    known = {"path": record.path, "label": record.label, **asdict(record.facts)}
    if record.part is not None:
        known |= {"start": record.part[0], "end": record.part[1]}
    if record.metadata is not None:
        known["metadata"] = record.metadata
    if record.trajectory is not None:
        known["trajectory"] = record.trajectory.told()
    made = _made_as(record)
    text = json.dumps(known).encode()
    contents: dict[str, tuple[str, int, Iterable[bytes | memoryview]]] = {"json": ("json", len(text), [text])}
    if made is None:
        contents[_extension(record.path)] = "video", record.size, _file(root / record.path, record)
    else:
        clip = _made(root, record)
        contents[made] = "video", len(clip), [clip]
    contents |= {f"{role}.npy": (role, len(data), [data]) for role, data in beside.items()}
    return {
        role: tar.add(f"{_key(index)}.{name}", size, blocks) for name, (role, size, blocks) in sorted(contents.items())
    }


def _file(path: Path, record: Record) -> Iterator[memoryview]:
    """A file, block by block. Raises UserError at the end where it is not what it was.

    One of the same length and time of change is: hashing it once more would take as long as the rest of the writing.
    """
    digest, block, left = Sha256(), memoryview(bytearray(_BLOCK)), record.size
    with _readable(path), open(path, "rb", buffering=0) as file:
        touched = os.fstat(file.fileno()).st_mtime_ns != record.mtime_ns
        while n := file.readinto(block[: left + 1]):
            left -= n
            if left < 0:
                break
            if touched:
                digest.update(block[:n])
            yield block[:n]
            digest.wait()
        changing = not touched and os.fstat(file.fileno()).st_mtime_ns != record.mtime_ns
    if left or changing or (touched and digest.hexdigest() != record.sha256):
        raise _changed(path)


def _made_as(record: Record) -> str | None:
    """The extension of a clip that is made of its file; None where it is the file."""
    if record.transcode is not None:
        return "mp4"
    if record.cut is not None:
        return record.cut.extension
    return None if record.trajectory is None else record.trajectory.retimed


def _made(root: Path, record: Record) -> bytes:
    """A clip that is made of its file, whole. Raises UserError where it is not what it was."""
    path = root / record.path
    if record.transcode is not None:
        return _transcoded(path, record, record.transcode)
    with _readable(path):
        try:
            if record.trajectory is not None:
                data = retimed_video(path, root, record.trajectory)
            else:
                assert record.cut is not None
                data = copy_cut(path, record.cut)
        except DecodeError:
            raise _changed(path) from None
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _changed(path)
    return data


def _transcoded(path: Path, record: Record, part: Transcode) -> bytes:
    with _readable(path):
        now = path.stat()
        if digest_of_part(_source_sha256(path, now.st_size, now.st_mtime_ns), part) != record.sha256:
            raise _changed(path)
        try:
            return transcode(path, part)
        except DecodeError as error:
            raise UserError(str(error), where=path, fix="make the shards without this file") from None


@lru_cache
def _source_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Of a file, once for all its parts that a worker writes while it stays the same."""
    return sha256_file(path)


def _beside(root: Path, record: Record) -> dict[str, bytes]:
    """What a robot did, by role. Raises UserError where it is not what it was."""
    if record.trajectory is None:
        return {}
    log = root / record.trajectory.folder / LOG
    with _readable(log):
        try:
            return members(root, record.trajectory)
        except DecodeError:
            raise _changed(log) from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot be read any more: {error.strerror}", where=path, fix="restore it") from None


def _changed(path: Path) -> UserError:
    return UserError("the file has changed since it was probed", where=path, fix="remove OUT and run again")


def _extension(path: str) -> str:
    """The member's extension: the file's own, unless WebDataset would read it in another way."""
    suffix = Path(path).suffix[1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() and suffix != "json" else "video"
