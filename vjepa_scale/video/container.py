"""Opens media files with FFmpeg, recognises videos, and selects the video stream that players show."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.container.core import Flags
from av.stream import Disposition
from av.video.stream import VideoStream


@dataclass(frozen=True)
class FileSlice:
    """A stretch of a file, such as a member of a tar. offset, size: in bytes."""

    path: Path
    offset: int
    size: int


# A FileSlice is read from its file during decoding, never held in memory as a whole.
Media = bytes | Path | FileSlice


def open_media(data: Media) -> BinaryIO:
    """Opens the bytes of a media file for reading and seeking. Raises OSError."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    return io.BufferedReader(_SliceReader(data)) if isinstance(data, FileSlice) else open(data, "rb")


class _SliceReader(io.RawIOBase):
    """A file object limited to a slice of a file."""

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


NOT_A_VIDEO = "not a video"
_NOT_VIDEO_FORMATS = ("image2", "tty")
# Formats with decoding timestamps but no presentation timestamps; some Matroska files are the same.
DECODING_TIMES = ("avi", "asf", "mpegvideo")
_MATROSKA = "matroska,webm"
# Dispositions of streams that only accompany the main video.
_NO_FILM = Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
# Limit for all video streams together, so that a second one is found.
_FIRST_PACKETS = 64


class DecodeError(Exception):
    """A file is no video, or a damaged one. ``reason`` is a category; ``detail`` is the specific error."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple:
        return DecodeError, (self.reason, self.detail)


@contextmanager
def ffmpeg_errors(reason: str) -> Iterator[None]:
    """Converts FFmpeg's errors inside the block to DecodeError with this reason."""
    try:
        yield
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DecodeError(reason, " ".join(str(getattr(error, "strerror", None) or error).split())) from None


class _Nameless:
    """An open file without its name, because FFmpeg would also guess the format from the name."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def open_container(data: Media) -> Iterator[InputContainer]:
    """Opens a media file with FFmpeg. Raises DecodeError."""
    with open_media(data) as file:
        if not file.read(1):
            raise DecodeError("zero length", "the file is empty")
        file.seek(0)
        with ffmpeg_errors("unreadable"):
            # Restrict FFmpeg to this file: a playlist inside a shard must not open other files or URLs.
            container = av.open(_Nameless(file), metadata_errors="ignore", options={"protocol_whitelist": "none"})
        if container.format.name in (*DECODING_TIMES, _MATROSKA):
            container.flags &= ~Flags.gen_pts.value  # timestamps that FFmpeg guesses may be out of order or late
        with container:
            yield container


def is_image(container: InputContainer) -> bool:
    """Returns whether it is an image (or a text that FFmpeg would render), not a video."""
    name = container.format.name
    return name.endswith("_pipe") or name in _NOT_VIDEO_FORMATS or is_heif(container)


def is_heif(container: InputContainer) -> bool:
    """Returns whether it is a HEIF file (HEIC, AVIF): coded pictures without timestamps."""
    return bool(container.streams.video) and all(map(_is_item, container.streams.video))


def _is_item(stream: VideoStream) -> bool:
    """Returns whether a stream is an item of a HEIF file, to which FFmpeg assigns a duration of one second."""
    return stream.container.format.name.startswith("mov,") and (stream.time_base, stream.duration, stream.frames) == (
        1,
        None,
        1,
    )


@contextmanager
def open_video(data: Media) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a container and the video stream that players show (not cover art of audio files), single-threaded.

    Raises DecodeError where there is none, and where FFmpeg fails inside the ``with`` block.
    """
    with open_container(data) as container:
        name = container.format.name
        if is_image(container):
            raise DecodeError(NOT_A_VIDEO, f"format {'heif' if is_heif(container) else name}")
        stream = shown_stream(container, data)
        if stream is None:
            raise DecodeError("no video stream", f"format {name}")
        if stream.codec_context is None:
            raise DecodeError("unreadable", "no decoder for its codec")
        stream.codec_context.thread_count = 1
        with ffmpeg_errors("does not decode to the end"):
            yield container, stream


def shown_stream(container: InputContainer, data: Media) -> VideoStream | None:
    """Returns the video stream of a media file that players show; None where there is none.

    Prefers, in this order: a stream that is no still picture and does not accompany another (cameras write a JPEG
    before the video), one that FFmpeg can decode, the file's default, the largest, the first.
    """
    streams = [s for s in container.streams.video if not (s.disposition & Disposition.attached_pic or _is_item(s))]
    if len(streams) < 2:
        return streams[0] if streams else None
    stills = _stills(streams, data)

    def rank(stream: VideoStream) -> tuple[bool, bool, bool, int]:
        context = stream.codec_context
        film = stream.index not in stills and not stream.disposition & _NO_FILM
        size = 0 if context is None else context.width * context.height
        return film, context is not None, bool(stream.disposition & Disposition.default), size

    return max(streams, key=rank)


def _stills(streams: Sequence[VideoStream], data: Media) -> set[int]:
    """Returns indices of the streams with one picture. Reads the first packets where the file declares no count."""
    uncounted = {s.index for s in streams if s.frames < 2}  # a fragmented file may declare its first fragment only
    if not uncounted:
        return set()
    found = Counter[int]()
    # Opens the file a second time, because reading packets moves the container's position.
    with open_container(data) as container, suppress(av.FFmpegError, IndexError):
        for packet in islice(container.demux([container.streams[s.index] for s in streams]), _FIRST_PACKETS):
            found[packet.stream_index] += packet.size > 0
    return {index for index in uncounted if found[index] < 2}
