"""Tars of samples: lists their members with positions, and writes them with checksums.

A sample is defined as in WebDataset: its key is the name up to the base name's first dot.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from vjepa_scale.core.worker_pool import heartbeat

_VIDEO = {
    "mp4",
    "m4v",
    "mov",
    "mkv",
    "webm",
    "avi",
    "mpg",
    "mpeg",
    "ts",
    "mts",
    "ogv",
    "flv",
    "wmv",
    "3gp",
    "gif",
    "video",
}
_IMAGE = {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "heic", "heif", "avif"}
_WRITTEN_BACK = 2**24  # bytes
MEDIA_EXTENSIONS = frozenset(_VIDEO | _IMAGE)


@dataclass(frozen=True)
class Member:
    """Position of one file in a tar: offset and size of its bytes."""

    offset: int
    size: int


@dataclass
class Sample:
    """Members of one key, by extension, in the order of the tar."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def media(self) -> list[str]:
        """The extensions of its videos and images: a usable sample has exactly one."""
        return [name for name in self.members if name.rpartition(".")[2] in MEDIA_EXTENSIONS]


@dataclass
class Contents:
    """A tar's samples in order. problems: of single members; damage: where reading had to stop, else None.

    torn: keys with several videos whose other members are not next to them, so that they cannot be assigned
    """

    samples: list[Sample]
    problems: list[str]
    damage: str | None = None
    torn: list[str] = field(default_factory=list)


def list_tar(path: Path) -> Contents:
    """Lists the samples of an uncompressed tar. Damage ends the listing and is recorded, not raised."""
    contents, bytes_in_file = Contents([], []), path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                heartbeat()
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not member.name.isprintable() or not member.isreg() or member.issparse() or not (stem and dot):
                    contents.problems.append(f"{member.name!r} is no member <key>.<extension> of a sample")
                    continue
                if member.offset_data + member.size > bytes_in_file:
                    contents.damage = f"{member.name!r} goes beyond the end of the file"
                    break
                key = f"{folder}/{stem}" if folder else stem
                if not contents.samples or contents.samples[-1].key != key:
                    contents.samples.append(Sample(key))
                found = contents.samples[-1].members
                if extension.lower() in found:
                    contents.problems.append(f"{member.name!r} occurs twice")
                    continue
                found[extension.lower()] = Member(member.offset_data, member.size)
    except (tarfile.TarError, UnicodeDecodeError, ValueError) as error:
        contents.damage = str(error) or type(error).__name__
    _join(contents)
    return contents


def _join(contents: Contents) -> None:
    """Joins members of one key that are not adjacent: ``tar cf`` packs files in the order of the disk.

    Where several runs of adjacent members of a key have a video each, each run is a sample (appended tars), unless
    another run has no video: its members cannot be assigned.
    """
    stretches: dict[str, list[Sample]] = {}
    for sample in contents.samples:
        stretches.setdefault(sample.key, []).append(sample)
    contents.samples = []
    for key, parts in stretches.items():
        filmed = sum(bool(part.media) for part in parts)
        if filmed <= 1:
            for part in parts[1:]:
                twice = part.members.keys() & parts[0].members.keys()
                contents.problems += [f"{f'{key}.{name}'!r} occurs twice" for name in sorted(twice)]
                parts[0].members = part.members | parts[0].members
            contents.samples.append(parts[0])
        elif filmed == len(parts):
            contents.samples += parts
        else:
            contents.torn.append(key)
    contents.samples.sort(key=lambda sample: min(member.offset for member in sample.members.values()))


class TarWriter:
    """Writes a new tar in order into an open file, with deterministic bytes.

    size, sha256: of all bytes written so far
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, Sha256()
        self.size = 0
        self._flushed = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, size: int, blocks: Iterable[bytes | memoryview]) -> Member:
        """Adds one file and returns its position. size: of all its blocks, in bytes"""
        info = tarfile.TarInfo(name)
        info.size = size
        self._write(info.tobuf(tarfile.PAX_FORMAT))
        member = Member(self.size, size)
        for block in blocks:
            self._write(block)
        assert self.size == member.offset + size, f"{name}: {self.size - member.offset} bytes, announced were {size}"
        self._write(bytes(-size % tarfile.BLOCKSIZE))
        return member

    def close(self) -> None:
        """Writes the end of the tar, and waits until all of it is on disk. The file stays open."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, block: bytes | memoryview) -> None:
        self._digest.update(block)
        self._file.write(block)
        self._digest.wait()
        self.size += len(block)
        if self.size - self._flushed >= _WRITTEN_BACK and hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Starts writing to disk now, while the next files are read, so that close waits only briefly.
            os.posix_fadvise(self._file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size


# -- checksums -------------------------------------------------------------------------------------

_WORTH_A_THREAD = 2**16  # bytes: smaller blocks are hashed without the thread
_BLOCK = 2**20


class Sha256:
    """A SHA-256 computed by another thread (hashing releases the GIL).

    Reading, hashing and writing of a copy overlap, so it is as fast as the slowest of the three.

    A block must not change until ``wait`` has returned.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._running: Future[None] | None = None

    def update(self, block: bytes | memoryview) -> None:
        self.wait()
        if len(block) < _WORTH_A_THREAD:
            self._digest.update(block)
        else:
            self._running = _threads().submit(self._digest.update, block)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def hexdigest(self) -> str:
        self.wait()
        return self._digest.hexdigest()


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="sha256")


def sha256_beating(path: Path) -> str:
    """Returns the SHA-256 of a file; sends heartbeats, since reading may take longer than the time limit."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
            heartbeat()
    return digest.hexdigest()
