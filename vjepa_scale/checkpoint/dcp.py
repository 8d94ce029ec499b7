"""PyTorch's distributed checkpoints (DCP), with a checksum for every chunk of a tensor and a safe reader.

DCP itself loads flipped bytes without an error, and its index is a pickle, which can run code. Checksums of whole
files, in the manifest, are verified before a run starts from a checkpoint. Checksums of chunks are verified whenever a
part of a checkpoint is read later, because the disk may fail in between.
"""

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, write_atomic, writing

_OTHER = "use another checkpoint, or restore this one from a copy"
_BLOCK = 2**20  # bytes: chunks are hashed in blocks, never held in memory as a whole

# -- writing ---------------------------------------------------------------------------------------


class ChunkWriter(FileSystemWriter):
    """DCP's writer, which also records the positions of this rank's chunks.

    (Only some releases of PyTorch include them in the index that ``dcp.save`` returns.)

    places: (offset, length) of every chunk by file name
    """

    def __init__(self, folder: Path) -> None:
        # One shard after the other: DCP's loader that copies GPU tensors ahead uses its own streams.
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
    """Writes ``__RANK.sha256``: [offset, length, SHA-256] of every chunk in this rank's files.

    places: of the chunks, from ChunkWriter
    Returns its path, and the result of ``manifest.describe_file`` for each of ``files``; reads each file once for both.
    """
    assert places.keys() == {path.name for path in files}, f"chunks in {sorted(places)}, files {sorted(files)}"
    found: dict[str, list[tuple[int, int, str]]] = {}
    described: dict[str, dict[str, Any]] = {}
    for path in files:
        whole, found[path.name], end = hashlib.sha256(), [], 0
        with open(path, "rb") as file:
            for offset, length in sorted(places[path.name]):
                _digest(file, end, offset - end, whole)  # bytes between chunks
                found[path.name].append((offset, length, _digest(file, offset, length, whole)))
                end = offset + length
            size = path.stat().st_size
            _digest(file, end, size - end, whole)
        described[path.name] = {"bytes": size, "sha256": whole.hexdigest()}
    out = folder / f"__{rank}.sha256"
    write_atomic(out, json.dumps(found) + "\n")
    return out, described


def _digest(file: IO[bytes], offset: int, length: int, *others: Any) -> str:
    """Returns the SHA-256 of a range of a file. others: hashes that are updated with the same bytes"""
    assert length >= 0, "chunks overlap"
    digest = hashlib.sha256()
    file.seek(offset)
    while length > 0 and (block := file.read(min(length, _BLOCK))):
        for one in (digest, *others):
            one.update(block)
        length -= len(block)
    return digest.hexdigest()


class ChunkChecksums:
    """Checksums of a checkpoint's chunks. A checkpoint of an early version has none, and is not verified."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of_file: dict[str, dict[tuple[int, int], str]] = {}
        for path in folder.glob("__*.sha256"):
            try:
                for name, chunks in read_json(path).items():
                    self._of_file[name] = {(offset, length): digest for offset, length, digest in chunks}
            except (AttributeError, TypeError, ValueError):
                raise UserError("no checksums of chunks", where=path, fix=_OTHER) from None

    def verify(self, file: IO[bytes], name: str, offset: int, length: int) -> None:
        """Raises UserError where a chunk's bytes are not those that were written. file: the opened file ``name``"""
        known = self._of_file.get(name)
        if known is not None and known.get((offset, length)) != _digest(file, offset, length):
            raise UserError(
                f"bytes {offset} to {offset + length} are not those that were written (SHA-256)",
                where=self._folder / name,
                fix=_OTHER,
            )


# -- reading ---------------------------------------------------------------------------------------

# All types in DCP's index, the pickle ``.metadata``, except torch's dtypes.
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


def _memory_format(owner: object, name: object) -> _MEM_FORMAT_ENCODING:
    """Replaces ``getattr``, with which Python 3.11.0 to 3.11.3 pickle enum members; the index contains this enum."""
    if owner is _MEM_FORMAT_ENCODING and isinstance(name, str) and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING.__members__[name]
    raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) has no place in the index of a checkpoint")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")


class CheckpointReader(FileSystemReader):
    """DCP's reader. Reads the index once, without running code, and verifies chunks as it reads them.

    (Tensors are read weights-only.)
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._checkpoint = checkpoint
        with open(checkpoint / ".metadata", "rb") as file:
            try:
                index = _IndexUnpickler(file).load()
                if not isinstance(index, Metadata):
                    raise TypeError(f"a {type(index).__name__}")
                for name, entry in index.state_dict_metadata.items():
                    if not isinstance(entry, TensorStorageMetadata):
                        raise TypeError(f"{name} is no tensor")
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 (bytes that are no such pickle fail in any way)
                raise UserError(
                    f"not the index of a checkpoint of tensors: {' '.join(str(error).split()) or type(error).__name__}",
                    where=checkpoint / ".metadata",
                    fix=_OTHER,
                ) from None
        self.index: Metadata = index
        self._checksums = ChunkChecksums(checkpoint)

    def fill(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        """Reads the stored tensors of these names into ``tensors``.

        alone: use no process group, even if there is one; otherwise every rank of it must call this
        Raises UserError where the stored data cannot be read as tensors.
        """
        try:
            with warnings.catch_warnings() if alone else nullcontext():
                if alone:  # intended, but DCP warns at every call
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=self, no_dist=alone)
        except CheckpointException as error:  # DCP wraps the errors of all ranks; report the cause
            causes = [cause for cause, _ in error.failures.values()]
            known = next((cause for cause in causes if isinstance(cause, UserError | OSError)), None)
            if known is not None:
                raise known from None
            said = " ".join(str(causes[0]).split())[:200] if causes else "of no rank"
            raise UserError(f"its tensors cannot be read: {said}", where=self._checkpoint, fix=_OTHER) from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        self._checksums.verify(file, sinfo.relative_path, sinfo.offset, sinfo.length)
        return super()._slice_file(file, sinfo)

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Returns shape and dtype of every tensor in the checkpoint."""
        out = {}
        for name, entry in self.index.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "checked when the index was read"
            out[name] = (entry.size, entry.properties.dtype)
        return out
