"""Writes a safetensors file one tensor at a time, so that a model larger than memory can be consolidated.

The file: 8 bytes with the header's length (little-endian), a JSON header that gives every tensor's dtype,
shape and byte range, then the bytes. Names, shapes and dtypes must be known first; values may come later.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vjepa_scale.core.files import open_atomic

Entry = tuple[str, tuple[int, ...], torch.dtype]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path, entries: Iterable[Entry], read: Callable[[str], Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes ``path`` completely or not at all. Peak memory is one tensor.

    entries:  (name, shape, dtype) of every tensor
    read:     gives the value of a name, on any device; called once per name, in the order of ``entries``
              within a dtype size (larger elements first, so that every tensor is aligned in the file)
    metadata: strings for the header's ``__metadata__``

    Raises ValueError where a value is not of the shape and dtype announced, or a name comes twice.
    """
    ordered = sorted(entries, key=lambda entry: -entry[2].itemsize)
    header = _header(ordered, metadata or {})
    with open_atomic(path) as file:
        file.write(header)
        for name, shape, dtype in ordered:
            _write_tensor(file, name, shape, dtype, read(name))


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape, dtype in entries:
        if name in table:
            raise ValueError(f"tensor {name} comes twice")
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], dtype: torch.dtype, value: Tensor) -> None:
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise ValueError(f"tensor {name} is {tuple(value.shape)} {value.dtype}, announced as {tuple(shape)} {dtype}")
    flat = value.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)
