"""Plans the shards in one process: rejects duplicates, shuffles the other records and assigns them to shards.

    OUT/.work/plan/chunk.npy …     per record, in the order of the shards: position of its line, and its facts
    OUT/.work/plan/ends.npy        per shard, the number of its last record + 1
    OUT/.work/plan/classes.json    names of the classes, in the order of their numbers
    OUT/.work/plan/rejected.jsonl  the rejected.jsonl of OUT

Reads the lines once, in order, and writes columns of 76 bytes per record to disk. Planning then holds at most five
numbers of 8 bytes per record in memory (measured: 33 bytes, 0.7 GB for 20 million), and the names of classes.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import (
    fsync_path,
    open_atomic,
    publish_first,
    read_json,
    read_jsonl,
    temporary_beside,
    write_json,
    writing,
)
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.manifest import REJECTED
from vjepa_scale.shards.probe import probed
from vjepa_scale.shards.records import UNREADABLE, Record, Rejected, record_of
from vjepa_scale.shards.sources import first_line
from vjepa_scale.shards.work import DIGESTS, Settings, Work
from vjepa_scale.video.container import NOT_A_VIDEO

# Position of a record's line (chunk, offset in its file, number in the line), its size, the key of duplicates (the
# first 16 bytes of the SHA-256), and the columns of the manifest.
_ROW = np.dtype(
    [
        ("chunk", np.uint32),
        ("offset", np.int64),
        ("number", np.uint32),
        ("size", np.int64),
        ("digest", np.uint64),
        ("digest_2", np.uint64),
        ("duration", np.float64),
        ("fps", np.float64),
        ("frames", np.int64),
        ("width", np.int32),
        ("height", np.int32),
        ("label", np.int32),
    ]
)
_PLACE = ("chunk", "offset", "number")
_SHOWN = 80  # characters of a line in messages
FACTS = ("duration", "fps", "frames", "width", "height")


@dataclass(frozen=True)
class Plan:
    """A finished plan. Columns are memory-mapped: writing a shard reads only its own range."""

    work: Work
    classes: list[str]
    ends: npt.NDArray[np.int64]

    @classmethod
    def open(cls, work: Work) -> "Plan":
        """Opens the plan. Raises UserError where the work is not planned yet."""
        folder = planned(work)
        if not folder.is_dir():
            raise UserError("the shards are not planned yet", where=work.out, fix="finish probing, then plan")
        return cls(work, read_json(folder / "classes.json"), np.load(folder / "ends.npy"))

    @property
    def shards(self) -> int:
        return len(self.ends)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Returns one number per record, in the order of the shards."""
        return np.load(planned(self.work) / f"{name}.npy", mmap_mode="r")

    def records(self, shard: int) -> Iterator[tuple[int, Record]]:
        """Yields (number among all, record) of each record of one shard."""
        first, end = int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])
        places = zip(*(self.column(name)[first:end].tolist() for name in _PLACE), strict=True)
        for index, place in enumerate(places, start=first):
            yield index, _record_at(self.work, *place)


def planned(work: Work) -> Path:
    return work.folder / "plan"


def plan(work: Work) -> None:
    """Writes the plan, which determines the bytes of the shards, unless it exists.

    Raises UserError while a chunk is not probed, and where no source is usable; then it also removes the work.
    """
    if planned(work).is_dir():
        return
    missing = sum(not probed(work, chunk).exists() for chunk in range(work.chunks))
    if missing:
        what = f"{missing} of {work.chunks} stretches of the sources are not probed yet"
        raise UserError(what, where=work.out, fix="run the same command again, or the jobs that are missing")
    temporary = temporary_beside(planned(work))
    try:
        temporary.mkdir()
        with writing(temporary):
            labels = _gather(work, temporary)
            _decide(work, temporary, labels)
        publish_first(temporary, planned(work))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- the lines, as columns -------------------------------------------------------------------------


def _gather(work: Work, folder: Path) -> dict[str, int]:
    """Writes the lines to ``name.raw`` per column of _ROW, and the rejected. Returns preliminary class numbers."""
    labels: dict[str, int] = {}
    reasons = Counter[str]()
    found = 0
    files = {name: open(folder / f"{name}.raw", "wb") for name in _ROW.names or ()}  # noqa: SIM115
    try:
        with open(folder / REJECTED, "w") as rejected:
            for chunk in range(work.chunks):
                rows = []
                for offset, tree in _lines(work, chunk):
                    rows += [_row(chunk, offset, i, r, labels) for i, r in enumerate(tree["records"])]
                    for row in tree["rejected"]:
                        reasons[row["reason"]] += 1
                        rejected.write(json.dumps(row) + "\n")
                table = np.array(rows, _ROW)
                for name, file in files.items():
                    file.write(np.ascontiguousarray(table[name]).data)
                found += len(rows)
    finally:
        for file in files.values():
            file.close()
    if not found:
        first = next(read_jsonl(folder / REJECTED), None)
        work.remove()
        raise none_usable(work, reasons, first)
    return labels


def none_usable(work: Work, reasons: Counter[str], first: dict[str, Any] | None) -> UserError:
    """Returns the error that all sources were rejected. first: the first of them, as in rejected.jsonl"""
    what = f"none of {work.files} files can be used: " + ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    if first is not None:
        what += f"; the first is {work.root / first['path']}: {first['detail'] or first['reason']}"
    fix = "--images takes pictures as static clips" if reasons[NOT_A_VIDEO] else None
    if work.videos.is_file():
        with open(work.videos, encoding="utf-8-sig", errors="replace") as file:
            what += f"; the list's first line is {first_line(file).strip()[:_SHOWN]!r}"
        if reasons[UNREADABLE]:
            fix = "a list has `path label` lines, or CSV or JSON with a `path`; paths are relative to the list's folder"
    return UserError(what, where=work.videos, fix=fix)


def _lines(work: Work, chunk: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (offset, verdict) of every line of a chunk."""
    offset = 0
    with open(probed(work, chunk), "rb") as file:
        for line in file:
            yield offset, json.loads(line)
            offset += len(line)


def _row(chunk: int, offset: int, number: int, record: dict[str, Any], labels: dict[str, int]) -> tuple:
    label = -1 if record["label"] is None else labels.setdefault(record["label"], len(labels))
    digest = int(record["sha256"][:16], 16), int(record["sha256"][16:32], 16)
    return chunk, offset, number, record["size"], *digest, *(record["facts"][name] for name in FACTS), label


def _record_at(work: Work, chunk: int, offset: int, number: int) -> Record:
    with open(probed(work, chunk), "rb") as file:
        file.seek(offset)
        return record_of(json.loads(file.readline())["records"][number])


# -- decisions -------------------------------------------------------------------------------------


def _decide(work: Work, folder: Path, labels: dict[str, int]) -> None:
    """Writes the plan from the raw columns."""

    raw = {name: np.memmap(folder / f"{name}.raw", _ROW[name], "r") for name in _ROW.names or ()}
    copies, firsts = duplicates(raw["digest"], raw["digest_2"])
    kept = np.ones(len(raw["size"]), bool)
    if work.settings.side == "val":
        kept[_of_train(work, raw)] = False
    with open(folder / REJECTED, "a") as rejected:
        for index in np.flatnonzero(~kept):
            record = _record_at(work, *(int(raw[name][index]) for name in _PLACE))
            row = Rejected(_path_of(record), "duplicate", f"of a clip in train{_part_of(record)}")
            rejected.write(json.dumps(asdict(row)) + "\n")
        outside = kept[copies]  # the others are rejected already
        for row in _copies(work, raw, copies[outside], firsts[outside]):
            rejected.write(json.dumps(asdict(row)) + "\n")
    kept[copies] = False
    if not kept.any():
        first = next(read_jsonl(folder / REJECTED), None)
        reasons = Counter(row["reason"] for row in read_jsonl(folder / REJECTED))
        work.remove()
        raise none_usable(work, reasons, first)
    if work.settings.side == "train":
        with open_atomic(work.out.parent / DIGESTS) as file:
            np.save(file, np.stack([raw["digest"][kept], raw["digest_2"][kept]], axis=1))
    order = np.flatnonzero(kept)
    order = order[KeyedRng(work.settings.seed, "shards.deal").shuffled(len(order))]
    np.save(folder / "ends.npy", shard_ends(raw["size"][order], work.settings))
    classes, label = used_classes(raw["label"][order], labels)
    write_json(folder / "classes.json", classes)
    np.save(folder / "label.npy", label)
    for name in (*_PLACE, *FACTS):
        np.save(folder / f"{name}.npy", raw[name][order])
    for name in _ROW.names or ():
        (folder / f"{name}.raw").unlink()
    fsync_path(folder)


def duplicates(
    digest: npt.NDArray[np.uint64], digest_2: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the records that equal an earlier one, in order, and for each the first equal record.

    digest, digest_2: two words [records], equal only for equal bytes
    """
    order = np.argsort(digest)
    ordered = digest[order]
    same = ordered[1:] == ordered[:-1]
    suspect = np.zeros(len(order), bool)
    suspect[1:] |= same
    suspect[:-1] |= same
    suspects = np.sort(order[suspect])  # few: the first word of all others is unique
    del order, ordered, same, suspect
    by_digest = np.lexsort((suspects, digest_2[suspects], digest[suspects]))
    suspects = suspects[by_digest]
    begins = np.ones(len(suspects), bool)
    begins[1:] = (digest[suspects[1:]] != digest[suspects[:-1]]) | (digest_2[suspects[1:]] != digest_2[suspects[:-1]])
    firsts = suspects[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(suspects) else suspects
    copies, firsts = suspects[~begins], firsts[~begins]
    order = np.argsort(copies)
    return copies[order], firsts[order]


def _copies(
    work: Work, raw: dict[str, np.memmap], copies: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64]
) -> Iterator[Rejected]:
    for copy, first in zip(copies, firsts, strict=True):
        record, original = (_record_at(work, *(int(raw[name][i]) for name in _PLACE)) for i in (copy, first))
        path, detail = _path_of(record), f"of {original.path}{_part_of(record)}"
        if record.label != original.label:  # it is unknown which label is right
            detail += f", whose label is {original.label!r}; this one's is {record.label!r}"
            yield Rejected(path, "duplicate with another label", detail)
        else:
            yield Rejected(path, "duplicate", detail)


def _of_train(work: Work, raw: dict[str, np.memmap]) -> npt.NDArray[np.int64]:
    """Returns records of val whose bytes are also in train, in order. Raises UserError where train is not planned."""
    path = work.out.parent / DIGESTS
    if not path.exists():
        raise UserError("not there: what val must not share with train", where=path, fix="make both sides again")
    train = np.load(path)
    suspects = np.flatnonzero(np.isin(raw["digest"], train[:, 0]))
    same = set(map(tuple, train[np.isin(train[:, 0], raw["digest"][suspects])].tolist()))
    found = [i for i in suspects.tolist() if (int(raw["digest"][i]), int(raw["digest_2"][i])) in same]
    return np.array(found, np.int64)


def _path_of(record: Record) -> str:
    return record.path if record.trajectory is None else record.trajectory.folder


def _part_of(record: Record) -> str:
    return "" if record.part is None else f", from {record.part[0]:.3f} s on"


def shard_ends(sizes: npt.NDArray[np.int64], settings: Settings) -> npt.NDArray[np.int64]:
    """Fills shards one after the other; returns the end of each, in records. sizes: bytes [records], in order"""
    n = len(sizes)
    if settings.shard_records is not None:
        return np.append(np.arange(settings.shard_records, n, settings.shard_records), n)
    filled = np.cumsum(sizes)
    ends = [0]
    while ends[-1] < n:
        before = filled[ends[-1] - 1] if ends[-1] else 0
        end = np.searchsorted(filled, before + settings.shard_mb * 10**6, side="right")
        ends.append(max(ends[-1] + 1, int(end)))
    return np.array(ends[1:], np.int64)


def used_classes(found: npt.NDArray[Any], labels: dict[str, int]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Returns the sorted names of the used classes, and the class of every record (-1 for none).

    found: the class of every record, as a number of ``labels``
    """
    used = np.zeros(len(labels) + 1, bool)
    used[found] = True  # -1, no class, sets the last element
    classes = sorted(name for name, number in labels.items() if used[number])
    numbers = np.full(len(labels) + 1, -1, np.int64)
    for number, name in enumerate(classes):
        numbers[labels[name]] = number
    return classes, numbers[found]
