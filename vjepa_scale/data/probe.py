"""Is this file a video that can be trained on? Decode it once, whole, and say what it is or what is wrong.

A clip that fails in training stops the run, so ingest is strict: every frame must decode, timestamps must
not go backwards, and a frame reached by seeking must be the frame that decoding in order gives (on some
malformed files decoders return garbage after a seek, with no error).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vjepa_scale.data.decode import (
    NOT_A_VIDEO,
    DecodeError,
    Media,
    ffmpeg_errors,
    open_video,
    pictures_at,
    pts_of,
    still_picture,
    stream_start,
    time_base,
    upright_rgb,
)

_THUMB = 64  # side of the thumbnails by which frames are compared, in pixels


@dataclass(frozen=True)
class VideoFacts:
    """What sequential decoding says of a video.

    duration: seconds from the stream's start to the end of the last frame
    fps:      mean rate over the frames
    width, height: as shown (after rotation), in pixels
    """

    duration: float
    fps: float
    frames: int
    width: int
    height: int


@dataclass(frozen=True)
class Decoded:
    """A video decoded in order. times_s: of every frame, from the stream's start; digests: 8 bytes of each picture."""

    facts: VideoFacts
    times_s: npt.NDArray[np.float64]
    digests: list[bytes]


def probe_video(data: Media) -> VideoFacts:
    """Decode a whole file. Raises DecodeError with the reason to reject it."""
    return decode_whole(data).facts


def decode_whole(data: Media, *, images: bool = False) -> Decoded:
    """What ``probe_video`` looks at, frame by frame. Raises DecodeError.

    images: an image is a clip without time: one frame (of which there is no digest), duration and fps 0
    """
    try:
        return _decode_video(data)
    except DecodeError as error:
        still = still_picture(data, strict=True) if images and error.reason == NOT_A_VIDEO else None
        if still is None:
            raise
    height, width, _ = upright_rgb(VideoReformatter(), still).shape
    return Decoded(VideoFacts(duration=0.0, fps=0.0, frames=1, width=width, height=height), np.zeros(1), [])


def _decode_video(data: Media) -> Decoded:
    with open_video(data) as (container, stream):
        seconds = float(time_base(stream))
        ticks, digests, facts = _decode_all(container, stream)
        start = stream_start(stream)
    for index in sorted({len(ticks) // 2, len(ticks) - 1} - {0}):
        # Half a tick later, so that the frame is on screen whatever the rounding.
        (found,) = pictures_at(data, [(ticks[index] - start + 0.5) * seconds])
        if found.pts != ticks[index] or _digest(VideoReformatter(), found) != digests[index]:
            raise DecodeError("decode mismatch after seek", f"frame {index} of {len(ticks)}")
    return Decoded(facts, (np.array(ticks, np.float64) - start) * seconds, digests)


def _decode_all(container: InputContainer, stream: VideoStream) -> tuple[list[int], list[bytes], VideoFacts]:
    """Ticks and digest of every frame, in order, and the facts."""
    seconds = float(time_base(stream))
    reformatter = VideoReformatter()
    ticks: list[int] = []
    digests: list[bytes] = []
    size, last = None, None
    for last in sound_frames(container, stream):
        if size not in (None, (last.width, last.height)):
            raise DecodeError("the picture size changes inside the video", f"frame {len(ticks)}")
        size = (last.width, last.height)
        ticks.append(pts_of(last))
        digests.append(_digest(reformatter, last))
        turned = round(last.rotation / 90) % 2
    if size is None or last is None:
        raise DecodeError(*_nothing_decoded(container, stream))
    end_s = end_of_video(stream, first_tick=ticks[0], last=last, frames=len(ticks))
    check_declared(container, stream, len(ticks), end_s)
    if end_s <= 0:
        raise DecodeError("zero length", f"{len(ticks)} frames, no duration")
    spread = (ticks[-1] - ticks[0]) * seconds
    fps = (len(ticks) - 1) / spread if spread > 0 else 1 / end_s
    width, height = size[::-1] if turned else size
    return ticks, digests, VideoFacts(end_s, fps, len(ticks), width, height)


def _digest(reformatter: VideoReformatter, frame: VideoFrame) -> bytes:
    """Of a frame's thumbnail: hours of video must not be held as pictures."""
    with ffmpeg_errors("pixels that cannot be converted"):
        small = reformatter.reformat(
            frame, width=_THUMB, height=_THUMB, format="gray8", interpolation="POINT", threads=1
        )
        return hashlib.blake2b(small.to_ndarray().tobytes(), digest_size=8).digest()


def sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame in order; DecodeError at the first sign of damage."""
    count, before = 0, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError("does not decode to the end", f"damaged packet after {count} frames")
        for frame in packet.decode():
            if frame.pts is None:
                raise DecodeError("frames without timestamps", f"frame {count}")
            if frame.is_corrupt:
                raise DecodeError("does not decode to the end", f"damaged frame {count}")
            if before is not None and frame.pts <= before:
                raise DecodeError("timestamps go backwards", f"frame {count}")
            yield frame
            count, before = count + 1, frame.pts


def end_of_video(stream: VideoStream, *, first_tick: int, last: VideoFrame, frames: int) -> float:
    """When the last frame leaves the screen, in seconds from the stream's start.

    first_tick, frames: what was decoded: the first timestamp, and how many
    """
    shown = last.duration or _mean_gap(stream, first_tick, pts_of(last), frames)
    return (pts_of(last) - stream_start(stream) + shown) * float(time_base(stream))


def _mean_gap(stream: VideoStream, first_tick: int, last_tick: int, frames: int) -> int:
    """How long the last frame is shown where the file does not say, in ticks."""
    if frames > 1:
        return max(1, round((last_tick - first_tick) / (frames - 1)))
    return round(1 / (stream.average_rate * time_base(stream))) if stream.average_rate else 0


def _nothing_decoded(container: InputContainer, stream: VideoStream) -> tuple[str, str]:
    if stream.frames or stream.duration or container.duration:
        return "does not decode to the end", "truncated: no frame decodes"
    return "zero length", "no frame"


def check_declared(container: InputContainer, stream: VideoStream, frames: int, end_s: float) -> None:
    """Refuse a file that ends before what its header promises (formats that stop without an error)."""
    if frames < 0.95 * stream.frames:
        raise DecodeError("does not decode to the end", f"truncated: {frames} of {stream.frames} frames")
    declared_s = None
    if stream.duration is not None:
        declared_s = float(stream.duration * time_base(stream))
    elif container.duration is not None and len(container.streams) == 1:  # else another stream may be longer
        declared_s = container.duration / 1e6
    if declared_s is not None and declared_s - end_s > max(0.5, 0.05 * declared_s):
        raise DecodeError("does not decode to the end", f"truncated: {end_s:.2f} of {declared_s:.2f} s")
