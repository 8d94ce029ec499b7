"""Where the bytes of a media file are: in memory, in a file, or in a stretch of one."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class FileSlice:
    """A stretch of a file, such as a member of a tar. offset, size: in bytes."""

    path: Path
    offset: int
    size: int


# A long one is read from its file as it is decoded, never held whole.
Media = bytes | Path | FileSlice


def open_media(data: Media) -> BinaryIO:
    """The bytes of a media file, to be read and sought in. Raises OSError."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    return io.BufferedReader(_SliceReader(data)) if isinstance(data, FileSlice) else open(data, "rb")


class _SliceReader(io.RawIOBase):
    """A file that begins and ends where the slice does."""

    def __init__(self, part: FileSlice) -> None:
        self._part, self._at = part, 0
        self._file = open(part.path, "rb", buffering=0)  # noqa: SIM115 (closed with this)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int | None:
        self._file.seek(self._part.offset + self._at)
        found = self._file.readinto(memoryview(buffer)[: max(0, self._part.size - self._at)])
        self._at += found or 0
        return found

    def close(self) -> None:
        self._file.close()
        super().close()
