"""Writes the plan's shards, and finally the manifest.

    OUT/shard-000000.tar                     under a temporary name, then renamed
    OUT/.work/written/shard-000000.json      its receipt: bytes, sha256, positions of its members, rejected records

A shard is a function of the plan, so a run continues with the shards that have no receipt, and two processes on one
shard write the same bytes. A record that cannot be encoded is rejected while its shard is written; the shard then has
fewer records. Memory holds a block of one file per worker (a cut part as a whole).
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import read_json, read_jsonl, sha256_file, temporary_beside, write_atomic
from vjepa_scale.core.worker_pool import map_in_workers
from vjepa_scale.data.manifest import REJECTED, Shard, write_manifest
from vjepa_scale.data.trajectories import log_statistics, merged
from vjepa_scale.shards.droid import LOG
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.plan import FACTS, Plan, none_usable, planned, used_classes
from vjepa_scale.shards.records import Record, Rejected
from vjepa_scale.shards.remux import copy_cut
from vjepa_scale.shards.tars import Member, Sha256, TarWriter
from vjepa_scale.shards.trajectories import members, retimed_video
from vjepa_scale.shards.transcode import Transcode, digest_of_part
from vjepa_scale.shards.work import Part, Progress, Work, publish, tidy
from vjepa_scale.video.container import DecodeError

_BLOCK = 2**22  # bytes of a file


def write(work: Work, part: Part, *, workers: int, progress: Progress) -> None:
    """Writes this part's shards, except those that an earlier run has written."""
    shards = range(part.index, Plan.open(work).shards, part.of)
    missing = [shard for shard in shards if not _is_written(work, shard)]
    done = len(shards) - len(missing)
    for index, result in map_in_workers(partial(_write_shard, work), missing, workers=workers):
        if not isinstance(result, Path):
            path = _shard(work, missing[index])
            raise UserError("the process that wrote this shard died", where=path, fix="run it again")
        done += 1
        progress("writing", done, len(shards))


def finish(work: Work) -> None:
    """Writes columns, rejected.jsonl, then the manifest; removes the work.

    Raises UserError while a shard is missing.
    """
    plan = Plan.open(work)
    missing = sum(not _is_written(work, shard) for shard in range(plan.shards))
    if missing:
        what = f"{missing} of {plan.shards} shards are not written yet"
        raise UserError(what, where=work.out, fix="run the same command again, or the jobs that are missing")
    written = _receipts(work, plan)
    if not written.shards:
        rejected = list(read_jsonl(planned(work) / REJECTED)) + written.rejected
        work.remove()
        raise none_usable(work, Counter(row["reason"] for row in rejected), rejected[0] if rejected else None)
    temporary = temporary_beside(work.out / REJECTED)
    shutil.copyfile(planned(work) / REJECTED, temporary)
    with open(temporary, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in written.rejected)
    publish(temporary, work.out / REJECTED)
    columns: dict[str, npt.NDArray[Any]] = {"key": keys(len(plan.column("label")))}
    columns |= {name: plan.column(name) for name in (*FACTS, "label")}
    classes = plan.classes
    if written.left_out:
        columns = {name: np.delete(column, written.left_out) for name, column in columns.items()}
        classes, columns["label"] = used_classes(columns["label"], {name: i for i, name in enumerate(classes)})
    for role, place in written.places.items():
        columns |= {f"{role}.offset": place[:, 0], f"{role}.size": place[:, 1]}
    write_manifest(
        work.out,
        shards=written.shards,
        classes=classes,
        columns=columns,
        source=work.source,
        trajectories=written.trajectories,
    )
    tidy(work.out)


def keys(records: int) -> npt.NDArray[np.bytes_]:
    """Returns the key of every record in its shard: its number, in nine digits or more."""
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
    if not _receipt(work, shard).exists():
        return False
    return _shard(work, shard).exists() or not read_json(_receipt(work, shard))["bytes"]


@dataclass(frozen=True)
class _Written:
    """All written shards. places: by role, offset and size of members [records, 2], zeros where there is none.

    left_out: numbers of rejected records of the plan; rejected: their rows in rejected.jsonl
    """

    shards: list[Shard]
    places: dict[str, npt.NDArray[np.int64]]
    trajectories: dict[str, Any] | None
    left_out: list[int]
    rejected: list[dict[str, Any]]


def _receipts(work: Work, plan: Plan) -> _Written:
    """Reads the receipts of all shards.

    Holds 16 bytes per record and role in memory.
    """
    shards, places, first, begin = list[Shard](), dict[str, npt.NDArray[np.int64]](), 0, 0
    moved, left_out, rejected = list[dict[str, Any]](), list[int](), list[dict[str, Any]]()
    for number, end in enumerate(plan.ends.tolist()):
        receipt, path = read_json(_receipt(work, number)), _shard(work, number)
        lost = receipt.get("left_out", [])
        left_out += [index for index, _ in lost]
        rejected += [row for _, row in lost]
        records, begin = end - begin - len(lost), end
        if not records:
            continue
        if path.stat().st_size != receipt["bytes"]:
            raise UserError("other bytes than were written", where=path, fix="remove it and run the command again")
        shards.append(Shard(path.name, records, receipt["bytes"], receipt["sha256"]))
        moved += [receipt["trajectories"]] if receipt["trajectories"] else []
        for role, place in receipt["members"].items():
            if role not in places:
                places[role] = np.zeros((int(plan.ends[-1]), 2), np.int64)
            places[role][first : first + records] = place
        first += records
    held = {role: place[:first] for role, place in places.items()}
    return _Written(shards, held, merged(moved) if moved else None, left_out, rejected)


# -- one shard -------------------------------------------------------------------------------------


def _write_shard(work: Work, shard: int) -> Path:
    """Writes one shard, unless all its records are rejected, and its receipt. Returns the shard's path."""
    path, plan = _shard(work, shard), Plan.open(work)
    temporary = temporary_beside(path)
    members: dict[str, list[tuple[int, int]]] = {}
    moved: dict[str, Any] | None = None
    records, left_out = 0, list[tuple[int, dict[str, Any]]]()
    try:
        with open(temporary, "wb") as file:
            tar = TarWriter(file)
            for index, record in plan.records(shard):
                beside = _beside(work.root, record)
                try:
                    added = _add_sample(tar, work.root, index, record, beside)
                except DecodeError as error:
                    left_out.append((index, asdict(Rejected(record.path, error.reason, error.detail))))
                    continue
                if "states" in beside:
                    own = log_statistics(np.load(io.BytesIO(beside["states"]), allow_pickle=False))
                    moved = own if moved is None else merged([moved, own])
                for role, place in added.items():
                    places = members.setdefault(role, [])
                    places += [(0, 0)] * (records - len(places))
                    places.append((place.offset, place.size))
                records += 1
            tar.close()
        work.check()
        if records:
            os.replace(temporary, path)  # not synced here: writing the manifest syncs the folder once for all
    except _SourceChanged:
        work.source_changed()
        raise
    except OSError as error:
        raise UserError(f"cannot write the shard: {reason_of(error)}", where=path) from None
    finally:
        temporary.unlink(missing_ok=True)
    for places in members.values():
        places += [(0, 0)] * (records - len(places))
    receipt = {"bytes": tar.size if records else 0, "sha256": tar.sha256, "members": members, "trajectories": moved}
    receipt |= {"left_out": left_out} if left_out else {}
    write_atomic(_receipt(work, shard), json.dumps(receipt))
    return path


def _add_sample(tar: TarWriter, root: Path, index: int, record: Record, beside: dict[str, bytes]) -> dict[str, Member]:
    """Writes a record's members, sorted by name. Returns their positions, by role: video, json, states, …

    beside: further members, by role
    Raises DecodeError, with nothing written, where it cannot be encoded.
    """
    known = {"path": record.path, "label": record.label, **asdict(record.facts)}
    if record.part is not None:
        known |= {"start": record.part[0], "end": record.part[1]}
    if record.metadata is not None:
        known["metadata"] = record.metadata
    if record.trajectory is not None:
        known["trajectory"] = record.trajectory.as_json()
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
    """Yields a file block by block. Raises UserError at the end where it has changed since it was probed.

    Compares length and modification time: hashing it again would take as long as the rest of the writing.
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
    """Returns the extension of a clip that is made from its file; None where the clip is the file itself."""
    if record.transcode is not None:
        return "mp4"
    if record.cut is not None:
        return record.cut.extension
    return None if record.trajectory is None else record.trajectory.retimed


def _made(root: Path, record: Record) -> bytes:
    """Makes a clip from its file. Raises UserError where the file has changed since it was probed; DecodeError."""
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
        return transcode(path, part)


@lru_cache
def _source_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Returns the SHA-256 of a file; cached, so that a worker hashes it once for all parts while it is unchanged."""
    return sha256_file(path)


def _beside(root: Path, record: Record) -> dict[str, bytes]:
    """Returns the robot's members, by role. Raises UserError where the log has changed since it was probed."""
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
        fix = "restore it; or run the command again to leave it out"
        raise UserError(f"cannot be read any more: {reason_of(error)}", where=path, fix=fix) from None


class _SourceChanged(UserError):
    """A file has changed since it was probed."""


def _changed(path: Path) -> UserError:
    fix = "run the command again: it reuses the results of the others"
    return _SourceChanged("the file has changed since it was probed", where=path, fix=fix)


def _extension(path: str) -> str:
    """Returns the member's extension: the file's own, unless WebDataset would interpret it differently."""
    suffix = Path(path).suffix[1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() and suffix != "json" else "video"
