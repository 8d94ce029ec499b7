"""The manifest of a folder of shards: its records, and the offset and size of each member.

    OUT/shard-000000.tar …   WebDataset: <key>.<ext> (the video), <key>.json (its metadata)
    OUT/manifest.json        shards, classes, columns, checksums: written last, so it exists only if all else does
    OUT/columns/*.npy        one number per record, in shard order, memory-mapped
    OUT/rejected.jsonl       source files that were rejected, and why

Columns: ``key`` (bytes), ``video.offset``, ``video.size``, ``json.offset``, ``json.size`` (in its tar),
``duration`` (s), ``fps``, ``frames``, ``width``, ``height``, ``label`` (index into classes, -1 for none). Where records
have other members (trajectories.py), also ``states.offset``, ``states.size`` and so on; size 0: the record has none.
Record r is the r-th of all shards' records, in the order of the shards.
"""

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import PassingError, UserError, reason_of
from vjepa_scale.core.files import open_atomic, parse_json, read_json, write_json
from vjepa_scale.core.installed import as_called
from vjepa_scale.core.rng import KeyedRng

VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"

_BLOCK = 2**20  # values


@dataclass(frozen=True)
class Shard:
    """One tar. bytes: of the file; sha256: of the file, hexadecimal."""

    name: str
    records: int
    bytes: int
    sha256: str


class Manifest:
    """An opened folder of shards. Pickles as its path: another process opens the folder again."""

    described: dict[str, dict[str, str]]  # dtype, file and checksum of each column

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.folder = folder
        self.records: int = tree["records"]
        self.classes: list[str] = tree["classes"]
        self.identity: str = tree["identity"]
        self.source: dict[str, Any] = tree["source"]
        self.trajectories: dict[str, Any] | None = tree.get("trajectories")  # statistics of states and actions
        self.shards = [Shard(**shard) for shard in tree["shards"]]
        self.described = {column["name"]: column for column in tree["columns"]}
        self._mapped: dict[str, npt.NDArray[Any]] = {}

    def __reduce__(self) -> tuple:
        return _reopen, (self.folder,)

    @classmethod
    def open(cls, folder: str | Path, *, look: bool = True) -> "Manifest":
        """Opens a folder and checks that every shard exists in its full length (contents are not read).

        look: False skips this check
        Raises UserError naming the folder or file, and what would work.
        """
        folder = Path(folder)
        fix = as_called("write shards with tools/make_shards.py VIDEOS OUT")
        if not folder.is_dir():
            raise UserError("no such data folder", where=folder, fix=fix)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"no {MANIFEST} here: not a folder of shards, or one that was not finished", where=folder, fix=fix
            )
        manifest = _reopen(folder)
        if manifest.records == 0:
            raise UserError("the manifest lists no records", where=folder / MANIFEST, fix=fix)
        if not look:
            return manifest
        for shard in manifest.shards:
            try:
                size = os.stat(os.path.join(folder, shard.name)).st_size
            except OSError:
                size = None
            if size != shard.bytes:
                path = folder / shard.name
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"the shard {found}, the manifest says {shard.bytes}", where=path, fix="copy it again")
        for name in manifest.described:
            if len(manifest.column(name)) != manifest.records:
                raise UserError("the column's length is not the manifest's", where=manifest._column_path(name))
        return manifest

    def column(self, name: str) -> npt.NDArray[Any]:
        """Returns one value per record, memory-mapped, read-only."""
        if name not in self._mapped:
            path = self._column_path(name)
            try:
                self._mapped[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read the column: {error}", where=path, fix="make the shards again") from None
        return self._mapped[name]

    @cached_property
    def records_per_shard(self) -> npt.NDArray[np.int64]:
        """Number of records of each shard, the input of DataOrder."""
        return np.array([shard.records for shard in self.shards], np.int64)

    def records_of_shards(self, kept: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """Returns the number of records of each shard; with ``kept``, of these records only."""
        if kept is None:
            return self.records_per_shard
        return np.bincount(np.searchsorted(self._ends, kept, side="right"), minlength=len(self.shards))

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum(self.records_per_shard).tolist()

    def shard_of(self, record: int) -> Shard:
        return self.shards[bisect_right(self._ends, record)]

    def key(self, record: int) -> str:
        """The WebDataset key of a record."""
        return self.column("key")[record].decode()

    def has(self, record: int, member: str) -> bool:
        """Whether a record has this member."""
        return f"{member}.size" in self.described and bool(self.column(f"{member}.size")[record])

    def place(self, record: int, member: str) -> tuple[int, int]:
        """Returns a member's offset and size in its shard; zeros where only other records have this member."""
        return int(self.column(f"{member}.offset")[record]), int(self.column(f"{member}.size")[record])

    def read(self, record: int, member: str = "video") -> bytes:
        """Reads the bytes of one member (``video``, ``json``, …) of a record, and no other part of the shard."""
        shard = self.shard_of(record)
        path = self.folder / shard.name
        offset, size = self.place(record, member)
        try:
            with open(path, "rb") as file:  # buffered, because one system call reads at most 2 GiB
                length = os.fstat(file.fileno()).st_size
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | PermissionError)
            kind = UserError if gone else PassingError  # an I/O error of a file server may pass
            raise kind(f"cannot read record {self.key(record)}: {reason_of(error)}", where=path) from None
        if len(data) != size:
            raise UserError(f"the shard ends inside record {self.key(record)}", where=path, fix="copy it again")
        if length != shard.bytes:  # replaced since it was opened: the bytes at this place are of another video
            raise UserError(
                f"the shard has {length} bytes now, the manifest says {shard.bytes}",
                where=path,
                fix="put back the shard that was there when the stage started",
            )
        return data

    def _column_path(self, name: str) -> Path:
        return self.folder / self.described[name]["file"]


def _reopen(folder: Path) -> Manifest:
    path = folder / MANIFEST
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        found = tree.get("version") if isinstance(tree, dict) else None
        raise UserError(
            f"manifest version {found!r}, this code reads {VERSION}", where=path, fix="make the shards again"
        )
    try:
        return Manifest(folder, tree)
    except (KeyError, TypeError) as error:
        raise UserError(f"not a manifest of this project: {error}", where=path, fix="make the shards again") from None


def write_manifest(
    folder: Path,
    *,
    shards: Sequence[Shard],
    classes: Sequence[str],
    columns: dict[str, npt.NDArray[Any]],
    source: dict[str, Any],
    trajectories: dict[str, Any] | None = None,
) -> None:
    """Writes the columns, then manifest.json, which makes the data set complete.

    source:       description of the source; a second run compares it
    trajectories: statistics of a robot's states and actions (data/trajectories.py)
    """
    described = [_write_column(folder, name, values) for name, values in columns.items()]
    tree = {
        "version": VERSION,
        "records": sum(shard.records for shard in shards),
        "identity": hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest(),
        "source": source,
        "classes": list(classes),
        "columns": described,
        **({"trajectories": trajectories} if trajectories else {}),
        "shards": [vars(shard) for shard in shards],
    }
    write_json(folder / MANIFEST, tree)


def _write_column(folder: Path, name: str, values: npt.NDArray[Any]) -> dict[str, str]:
    """Writes a column in the format of numpy.save, block by block, since it may not fit into memory.

    Returns its dtype, file and checksum.
    """
    path = folder / "columns" / f"{name}.npy"
    digest, header = hashlib.sha256(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    blocks = (np.ascontiguousarray(values[i : i + _BLOCK]).tobytes() for i in range(0, len(values), _BLOCK))
    with open_atomic(path) as file:
        for block in chain([header.getvalue()], blocks):
            file.write(block)
            digest.update(block)
    return {"name": name, "dtype": values.dtype.str, "file": f"columns/{name}.npy", "sha256": digest.hexdigest()}


# -- labels and metadata of records ----------------------------------------------------------------


def labels_of(manifest: Manifest, classes: Sequence[str] | None = None) -> npt.NDArray[np.int64]:
    """Returns the class of every record: int64 [records], indices into ``classes``.

    classes: of the task, usually the training set's ``manifest.classes``; default: those of this data set.
    Raises UserError where a record has no label, or one that is not in ``classes``.
    """
    own = manifest.column("label").astype(np.int64)
    where = manifest.folder / MANIFEST
    if (own < 0).any():
        key = manifest.key(int(np.flatnonzero(own < 0)[0]))
        raise UserError(f"record {key} has no label", where=where, fix="put videos into one folder per class")
    if classes is None:
        return own
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({manifest.classes[i] for i in np.unique(own)} - set(number))
    if unknown:
        raise UserError(
            f"class {unknown[0]!r} is not among the {len(number)} classes of the task",
            where=where,
            fix="use data sets of the same classes",
        )
    return np.array([number.get(name, -1) for name in manifest.classes], np.int64)[own]


def label_of(manifest: Manifest, record: int, classes: Sequence[str]) -> int:
    """Returns the class of one record, as ``labels_of`` does for all."""
    return classes.index(manifest.classes[int(manifest.column("label")[record])])


def few_labels(
    labels: npt.NDArray[np.int64], *, per_class: int, seed: int, skip: int = 0, classes: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Draws ``per_class`` examples of every class; returns sorted indices. The draw is keyed: equal for all encoders.

    skip:    skips this many examples of each class; the result is disjoint from a draw with ``per_class=skip``
    classes: names of the classes, for the error
    Raises ValueError naming a class that has too few.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < skip + per_class:
            name = label if classes is None else repr(classes[label])
            raise ValueError(f"class {name} has {len(members)} examples, fewer than {skip + per_class}")
        chosen.append(members[KeyedRng(seed, "labels", int(label)).shuffled(len(members))[skip : skip + per_class]])
    return np.sort(np.concatenate(chosen))


def metadata_of(manifest: Manifest, record: int) -> dict[str, Any]:
    """Returns the JSON of a record (docs/shards.md); empty for an indexed sample without one. Raises UserError."""
    try:
        known = parse_json(manifest.read(record, "json") or b"{}")
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(
            f"the JSON of record {manifest.key(record)} is no JSON object",
            where=manifest.folder / manifest.shard_of(record).name,
            fix="restore this shard from a copy, or make the shards again",
        )
    return known
