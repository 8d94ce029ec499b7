"""A checksum for every chunk of a tensor, where it is written and wherever it is read.

DCP itself loads flipped bytes without a word. The checksums of whole files, in the manifest, say which checkpoint is
good before a run starts from it; those of chunks hold for who reads a part of it later, from a disk that fails then.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, write_atomic, writing

_BLOCK = 2**20  # bytes: a chunk is never held whole here


class ChunkWriter(FileSystemWriter):
    """DCP's writer, which remembers where this rank's chunks lie.

    (The index that ``dcp.save`` returns knows it in some releases of PyTorch, and in others not.)

    places: (offset, length) of every chunk by file name
    """

    def __init__(self, folder: Path) -> None:
        # One shard after the other: the ahead-copying loader of a GPU's tensors works on streams of its own.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.places: dict[str, set[tuple[int, int]]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with writing(Path(self.path)):
            written = super().write_data(plan, planner)
            results = written.wait()
        for result in results:
            stored = result.storage_data
            self.places.setdefault(stored.relative_path, set()).add((stored.offset, stored.length))
        return written


def write_chunk_checksums(
    folder: Path, rank: int, files: Sequence[Path], places: Mapping[str, set[tuple[int, int]]]
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Write ``__RANK.sha256``, [offset, length, SHA-256] of every chunk in this rank's files.

    places: of the chunks, as ChunkWriter knows them
    Returns its path, and what ``manifest.describe_file`` would say of each of ``files``: both from one reading.
    """
    assert places.keys() == {path.name for path in files}, f"chunks in {sorted(places)}, files {sorted(files)}"
    found: dict[str, list[tuple[int, int, str]]] = {}
    described: dict[str, dict[str, Any]] = {}
    for path in files:
        whole, found[path.name], end = hashlib.sha256(), [], 0
        with open(path, "rb") as file:
            for offset, length in sorted(places[path.name]):
                _digest(file, end, offset - end, whole)  # what is between chunks
                found[path.name].append((offset, length, _digest(file, offset, length, whole)))
                end = offset + length
            size = path.stat().st_size
            _digest(file, end, size - end, whole)
        described[path.name] = {"bytes": size, "sha256": whole.hexdigest()}
    out = folder / f"__{rank}.sha256"
    write_atomic(out, json.dumps(found) + "\n")
    return out, described


def _digest(file: IO[bytes], offset: int, length: int, *others: Any) -> str:
    """SHA-256 of a stretch of a file. others: hashes that take the same bytes."""
    assert length >= 0, "chunks overlap"
    digest = hashlib.sha256()
    file.seek(offset)
    while length > 0 and (block := file.read(min(length, _BLOCK))):
        for one in (digest, *others):
            one.update(block)
        length -= len(block)
    return digest.hexdigest()


class ChunkChecksums:
    """What the chunks of a checkpoint must be. One that was written before there were checksums has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of_file: dict[str, dict[tuple[int, int], str]] = {}
        for path in folder.glob("__*.sha256"):
            try:
                for name, chunks in read_json(path).items():
                    self._of_file[name] = {(offset, length): digest for offset, length, digest in chunks}
            except (AttributeError, TypeError, ValueError):
                raise UserError(
                    "no checksums of chunks", where=path, fix="use another checkpoint, or restore this one from a copy"
                ) from None

    def verify(self, file: IO[bytes], name: str, offset: int, length: int) -> None:
        """Raise UserError where a chunk's bytes are not those that were written. file: open, of this name."""
        known = self._of_file.get(name)
        if known is not None and known.get((offset, length)) != _digest(file, offset, length):
            raise UserError(
                f"bytes {offset} to {offset + length} are not those that were written (SHA-256)",
                where=self._folder / name,
                fix="use another checkpoint, or restore this one from a copy",
            )
