"""Bytes of a video file -> the pictures on screen at given times.

A frame is on screen from its own timestamp until the next frame's. So the picture at time t is the last
frame with pts <= t, whatever the frame rate does. Second 0 is the video stream's start time.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

# Times are floats and ticks integers: a time this close below a tick (in ticks) counts as that tick.
_TICK_TOLERANCE = 1e-6
_NOT_VIDEO_FORMATS = ("image2", "tty")
# After a seek in an MPEG program stream, timestamps can be off by a frame: decode it from the start.
_SEEKS_BADLY = ("mpeg",)


class DecodeError(Exception):
    """A file that is not, or not in whole, a video. ``reason`` is one of few; ``detail`` is the particular."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple:
        return DecodeError, (self.reason, self.detail)


@contextmanager
def ffmpeg_errors(reason: str) -> Iterator[None]:
    """What FFmpeg raises inside becomes a DecodeError with this reason."""
    try:
        yield
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DecodeError(reason, " ".join(str(getattr(error, "strerror", None) or error).split())) from None


@contextmanager
def open_video(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream (cover art of audio files is none), single-threaded.

    Raises DecodeError where there is none, or while FFmpeg cannot go on inside the ``with`` block.
    """
    if not data:
        raise DecodeError("zero length", "the file is empty")
    with ffmpeg_errors("unreadable"):
        # Bytes only: a playlist inside a shard must not open other files or addresses.
        container = av.open(io.BytesIO(data), metadata_errors="ignore", options={"protocol_whitelist": "none"})
    with container:
        name = container.format.name
        if name.endswith("_pipe") or name in _NOT_VIDEO_FORMATS:
            raise DecodeError("not a video", f"format {name}")
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise DecodeError("no video stream", f"format {name}")
        stream = streams[0]
        if stream.codec_context is None:
            raise DecodeError("unreadable", "no decoder for its codec")
        stream.codec_context.thread_count = 1
        with ffmpeg_errors("does not decode to the end"):
            yield container, stream


def decode_clip(data: bytes, *, start_s: float, fps: float, frames: int) -> npt.NDArray[np.uint8]:
    """The pictures at start_s, start_s + 1/fps, … : uint8 RGB [T, H, W, 3], upright.

    data:    a whole video file
    start_s: seconds from the stream's start; fps: pictures per second of the clip; frames: T
    Times past the end repeat the last frame. Raises DecodeError.
    """
    pictures = pictures_at(data, [start_s + k / fps for k in range(frames)])
    reformatter = VideoReformatter()
    rgb: list[npt.NDArray[np.uint8]] = []
    for k, picture in enumerate(pictures):
        if k and picture is pictures[k - 1]:
            rgb.append(rgb[-1])
            continue
        with ffmpeg_errors("pixels that cannot be converted"):
            array = np.asarray(reformatter.reformat(picture, format="rgb24", threads=1).to_ndarray(), np.uint8)
        # The display matrix's rotation is counter-clockwise, as numpy's is.
        rgb.append(np.rot90(array, k=round(picture.rotation / 90)) if picture.rotation else array)
    if any(array.shape != rgb[0].shape for array in rgb):
        raise DecodeError("the picture size changes inside the video")
    return np.stack(rgb)


def pictures_at(data: bytes, times_s: Sequence[float]) -> list[av.VideoFrame]:
    """The frame on screen at each of some ascending times, decoding from the keyframe before the first.

    A seek can land late (indices count decoding time, or are broken) or between keyframes. Frames before the
    first keyframe are dropped, and where that comes too late it starts further back, in the end from the
    beginning, so that the result is that of decoding the whole file.
    """
    back_s = 0.0
    while True:
        with open_video(data) as (container, stream):
            ticks = _ticks(stream, times_s)
            from_start = times_s[0] - back_s <= 0 or not _sought(container, stream, times_s[0] - back_s)
            frames = _timed_frames(container, stream)
            first = next((frame for frame in frames if from_start or frame.key_frame), None)
            if first is not None and (from_start or _pts(first) <= ticks[0]):
                return _on_screen(chain([first], frames), ticks)
            if from_start:
                raise DecodeError("zero length", "no frame decodes")
        back_s = max(1.0, 2 * back_s)


def stream_start(stream: VideoStream) -> int:
    """Second 0 of a stream, in its ticks."""
    return stream.start_time or 0


def time_base(stream: VideoStream) -> Fraction:
    """Seconds per tick."""
    assert stream.time_base is not None, "an open video stream has a time base"
    return stream.time_base


def _ticks(stream: VideoStream, times_s: Sequence[float]) -> list[int]:
    per_second = 1 / float(time_base(stream))
    return [stream_start(stream) + int(np.floor(t * per_second + _TICK_TOLERANCE)) for t in times_s]


def _sought(container: InputContainer, stream: VideoStream, time_s: float) -> bool:
    """Seek to the keyframe at or before a time; False where the container cannot seek (nothing is read yet)."""
    if container.format.name in _SEEKS_BADLY:
        return False
    try:
        container.seek(_ticks(stream, [time_s])[0], stream=stream, backward=True)
    except av.FFmpegError:
        return False
    return True


def _timed_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    for frame in container.decode(stream):
        if frame.pts is None:
            raise DecodeError("frames without timestamps")
        yield frame


def _pts(frame: av.VideoFrame) -> int:
    assert frame.pts is not None
    return frame.pts


def _on_screen(frames: Iterator[av.VideoFrame], ticks: Sequence[int]) -> list[av.VideoFrame]:
    """The last frame with pts <= each tick; before the first frame, the first."""
    current, found = next(frames), list[av.VideoFrame]()
    for following in chain(frames, [None]):
        while len(found) < len(ticks) and (following is None or _pts(following) > ticks[len(found)]):
            found.append(current)
        if following is None or len(found) == len(ticks):
            break
        current = following
    return found
