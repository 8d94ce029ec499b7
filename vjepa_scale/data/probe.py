"""Is this file a video that can be trained on? Decode it once, whole, and say what it is or what is wrong.

A clip that fails in training stops the run, so ingest is strict: every frame must decode, timestamps must
not go backwards, and a frame reached by seeking must be the frame that decoding in order gives (on some
malformed files decoders return garbage after a seek, with no error).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vjepa_scale.data.decode import DecodeError, ffmpeg_errors, open_video, pictures_at, stream_start, time_base

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


def probe_video(data: bytes) -> VideoFacts:
    """Decode a whole file. Raises DecodeError with the reason to reject it."""
    with open_video(data) as (container, stream):
        seconds = float(time_base(stream))
        ticks, thumbs, facts = _decode_all(container, stream)
        start = stream_start(stream)
    for index in sorted({len(ticks) // 2, len(ticks) - 1} - {0}):
        # Half a tick later, so that the frame is on screen whatever the rounding.
        (found,) = pictures_at(data, [(ticks[index] - start + 0.5) * seconds])
        if found.pts != ticks[index] or not np.array_equal(_thumbnail(VideoReformatter(), found), thumbs[index]):
            raise DecodeError("decode mismatch after seek", f"frame {index} of {len(ticks)}")
    return facts


def _decode_all(
    container: InputContainer, stream: VideoStream
) -> tuple[list[int], list[npt.NDArray[np.uint8]], VideoFacts]:
    """Ticks and thumbnail of every frame, in order, and the facts."""
    seconds, start = float(time_base(stream)), stream_start(stream)
    reformatter = VideoReformatter()
    ticks: list[int] = []
    thumbs: list[npt.NDArray[np.uint8]] = []
    size, last_duration = None, 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError("does not decode to the end", f"damaged packet after {len(ticks)} frames")
        for frame in packet.decode():
            if frame.pts is None:
                raise DecodeError("frames without timestamps", f"frame {len(ticks)}")
            if frame.is_corrupt:
                raise DecodeError("does not decode to the end", f"damaged frame {len(ticks)}")
            if ticks and frame.pts <= ticks[-1]:
                raise DecodeError("timestamps go backwards", f"frame {len(ticks)}")
            if size not in (None, (frame.width, frame.height)):
                raise DecodeError("the picture size changes inside the video", f"frame {len(ticks)}")
            size = (frame.width, frame.height)
            ticks.append(frame.pts)
            thumbs.append(_thumbnail(reformatter, frame))
            last_duration = frame.duration or 0
            turned = round(frame.rotation / 90) % 2
    if size is None:
        raise DecodeError(*_nothing_decoded(container, stream))
    end = ticks[-1] - start + (last_duration or _mean_gap(stream, ticks))
    _check_declared(container, stream, len(ticks), end * seconds)
    if end <= 0:
        raise DecodeError("zero length", f"{len(ticks)} frames, no duration")
    spread = (ticks[-1] - ticks[0]) * seconds
    fps = (len(ticks) - 1) / spread if spread > 0 else 1 / (end * seconds)
    width, height = size[::-1] if turned else size
    return ticks, thumbs, VideoFacts(end * seconds, fps, len(ticks), width, height)


def _thumbnail(reformatter: VideoReformatter, frame: VideoFrame) -> npt.NDArray[np.uint8]:
    with ffmpeg_errors("pixels that cannot be converted"):
        small = reformatter.reformat(
            frame, width=_THUMB, height=_THUMB, format="gray8", interpolation="POINT", threads=1
        )
        return np.asarray(small.to_ndarray(), np.uint8)


def _mean_gap(stream: VideoStream, ticks: list[int]) -> int:
    """How long the last frame is shown where the file does not say, in ticks."""
    if len(ticks) > 1:
        return max(1, round((ticks[-1] - ticks[0]) / (len(ticks) - 1)))
    return round(1 / (stream.average_rate * time_base(stream))) if stream.average_rate else 0


def _nothing_decoded(container: InputContainer, stream: VideoStream) -> tuple[str, str]:
    if stream.frames or stream.duration or container.duration:
        return "does not decode to the end", "truncated: no frame decodes"
    return "zero length", "no frame"


def _check_declared(container: InputContainer, stream: VideoStream, frames: int, end_s: float) -> None:
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
