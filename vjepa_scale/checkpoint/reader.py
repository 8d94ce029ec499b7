"""Reading PyTorch's distributed checkpoints (DCP) without trusting them."""

import pickle
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata

from vjepa_scale.checkpoint.chunks import ChunkChecksums
from vjepa_scale.core.errors import UserError

_OTHER = "use another checkpoint, or restore this one from a copy"

# All that DCP's own index, the pickle ``.metadata``, is made of; beside these only torch's dtypes.
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
    """Replaces ``getattr``, by which Python 3.11.0 to 3.11.3 pickle the members of an enum: the index has this one."""
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
    """DCP's reader, with an index that is read once and cannot run code, and chunks that are verified as they are read.

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
        """Read the tensors that have these names into these.

        alone: no process group, though there may be one; otherwise every rank of it calls this
        Raises UserError where what is stored cannot be read as tensors.
        """
        try:
            dcp.load(tensors, storage_reader=self, no_dist=alone)
        except CheckpointException as error:  # DCP's own, about all ranks; the cause is what we can tell
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
        """Shape and dtype of every tensor in the checkpoint."""
        out = {}
        for name, entry in self.index.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "looked at when the index was read"
            out[name] = (entry.size, entry.properties.dtype)
        return out
