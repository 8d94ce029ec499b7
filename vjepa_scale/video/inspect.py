"""Checks whether a file is a video that can be trained on: decodes it once as a whole, and returns facts or an error.

Ingest is strict, so that clips do not fail in training: every frame must decode, timestamps must not go backwards, and
a frame reached by seeking must equal the one decoded in order (on some malformed files decoders return garbage after a
seek, with no error).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vjepa_scale.core.worker_pool import heartbeat
from vjepa_scale.video.container import NOT_A_VIDEO, DecodeError, Media, ffmpeg_errors, open_video
from vjepa_scale.video.decode import (
    TimedDecoder,
    all_packets,
    decoding_from,
    filled_packets,
    on_screen,
    pts_of,
    sought,
    stream_start,
    ticks_of,
    time_base,
    timed_frames,
    upright_rgb,
)
from vjepa_scale.video.display import SQUARE, UPRIGHT, Orientation, aspect_of, orientation_of, pixel_aspect, shown_size
from vjepa_scale.video.image_files import still_picture

_THUMB = 64  # side of the thumbnails that represent frames in comparisons, in pixels
_MENDED_BY_STAMPS = ("timestamps go backwards", "frames without timestamps")
_SLOWEST, _FASTEST = Fraction(1, 60), Fraction(1000)  # plausible frame rates, frames per second
_KEYS_SOUGHT = 8  # keyframes per video that are compared after a seek


@dataclass(frozen=True)
class VideoFacts:
    """Facts about a video from sequential decoding.

    duration: seconds from the stream's start to the end of the last frame
    fps:      mean rate over the frames
    width, height: as shown (turned, and with square pixels), in pixels
    """

    duration: float
    fps: float
    frames: int
    width: int
    height: int


@dataclass(frozen=True)
class Decoded:
    """A video decoded in order.

    times_s: of every frame, from the stream's start, in whole ticks of tick_s
    digests: 8 bytes per picture, as it is stored
    orientation: of the last picture; aspect: of the pixels; unscaled: width and height without the aspect
    stamped: frames per second where the file's timestamps are wrong and times_s has new ones (frames_stamped_anew)
    """

    facts: VideoFacts
    times_s: npt.NDArray[np.float64]
    digests: list[bytes]
    tick_s: float = 1.0
    orientation: Orientation = UPRIGHT
    aspect: Fraction = SQUARE
    unscaled: tuple[int, int] | None = None
    stamped: Fraction | None = None


def probe_video(data: Media) -> VideoFacts:
    """Decodes a whole file. Raises DecodeError with the reason to reject it."""
    return decode_whole(data).facts


def decode_whole(data: Media, *, images: bool = False, in_order: bool = False) -> Decoded:
    """Decodes and checks a whole file; returns facts of every frame. Raises DecodeError.

    images:   accept an image: one frame without a digest, duration and fps 0
    in_order: the video will be decoded in order and transcoded: seeking need not work, and timestamps need not rise
    """
    try:
        return _decode_video(data, in_order)
    except DecodeError as error:
        still = still_picture(data, strict=True) if images and error.reason == NOT_A_VIDEO else None
        if still is None:
            raise
    height, width, _ = upright_rgb(VideoReformatter(), still, SQUARE).shape
    return Decoded(VideoFacts(duration=0.0, fps=0.0, frames=1, width=width, height=height), np.zeros(1), [])


def _decode_video(data: Media, in_order: bool) -> Decoded:
    try:
        return _decode_stamped(data, in_order, None)
    except DecodeError as error:
        stamped = _constant_rate(data) if in_order and error.reason in _MENDED_BY_STAMPS else None
        if stamped is None:
            raise
    return _decode_stamped(data, in_order, stamped)


def _constant_rate(data: Media) -> Fraction | None:
    """Returns the frame rate that the file declares; None where it declares none."""
    with open_video(data) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        # At a rate above the file's clock, frames would share ticks.
        return rate if rate and _SLOWEST <= rate <= min(_FASTEST, 1 / time_base(stream)) else None


def _decode_stamped(data: Media, in_order: bool, stamped: Fraction | None) -> Decoded:
    with open_video(data) as (container, stream):
        seconds = float(time_base(stream))
        frames = sound_frames(container, stream) if stamped is None else frames_stamped_anew(container, stream, stamped)
        ticks, digests, keys, facts, last = _decode_all(container, stream, frames)
        start, orientation, aspect = stream_start(stream), orientation_of(last), pixel_aspect(stream)
        if not sought(container, stream, 0.0):  # without seeks each check would decode from the beginning
            keys = []
    for index in [] if in_order else _places_to_seek(len(ticks), keys):
        # Half a tick later, so that the frame is on screen however the time is rounded.
        found = _sought_picture(data, (ticks[index] - start + 0.5) * seconds)
        if found.pts != ticks[index] or picture_digest(VideoReformatter(), found) != digests[index]:
            raise DecodeError("decode mismatch after seek", f"frame {index} of {len(ticks)}")
    times_s, unscaled = (np.array(ticks, np.float64) - start) * seconds, orientation.size(last.width, last.height)
    return Decoded(facts, times_s, digests, seconds, orientation, aspect, unscaled, stamped)


def _sought_picture(data: Media, time_s: float) -> VideoFrame:
    """Returns the frame on screen at a time, reached by seeking."""
    with decoding_from(data, time_s, _frames_beating) as (_, stream, frames):
        return next(on_screen(frames, ticks_of(stream, [time_s])))


def _frames_beating(container: InputContainer, stream: VideoStream, **how: bool) -> Iterator[VideoFrame]:
    for frame in timed_frames(container, stream, **how):
        heartbeat()
        yield frame


def _places_to_seek(frames: int, keys: list[int]) -> list[int]:
    """Returns the frames at which seeking is checked: the middle, the last, and keyframes over the whole length.

    A keyframe is cheap, since no other frame must be decoded, and an error there persists until the next keyframe: for
    example where the index and the frames disagree from a lost packet on.
    """
    spread = np.linspace(0, len(keys) - 1, min(len(keys), _KEYS_SOUGHT)).round().astype(int)
    return sorted({frames // 2, frames - 1, *(keys[i] for i in spread)} - {0})


def _decode_all(
    container: InputContainer, stream: VideoStream, frames: Iterator[VideoFrame]
) -> tuple[list[int], list[bytes], list[int], VideoFacts, VideoFrame]:
    """Returns ticks and digest of every frame in order, the keyframes, the facts, and the last frame."""
    seconds = float(time_base(stream))
    reformatter = VideoReformatter()
    ticks: list[int] = []
    digests: list[bytes] = []
    keys: list[int] = []
    size, last, first_aspect = None, None, None
    for last in frames:
        if size not in (None, (last.width, last.height)):
            raise DecodeError("the picture size changes inside the video", f"frame {len(ticks)}")
        size = (last.width, last.height)
        heartbeat()
        if last.key_frame:
            keys.append(len(ticks))
        ticks.append(pts_of(last))
        digests.append(picture_digest(reformatter, last))
        first_aspect = first_aspect or _codecs_aspect(stream)
        if _codecs_aspect(stream) != first_aspect == pixel_aspect(stream):
            wide = f"about frame {len(ticks) - 1}, where pixels become {_codecs_aspect(stream)} times as wide as high"
            raise DecodeError("the picture size changes inside the video", wide)
    if size is None or last is None:
        raise DecodeError(*_nothing_decoded(container, stream))
    end_s = end_of_video(stream, first_tick=ticks[0], last=last, frames=len(ticks))
    check_declared(container, stream, frames=len(ticks), last=last, end_s=end_s)
    if end_s <= 0:
        raise DecodeError("zero length", f"{len(ticks)} frames, no duration")
    spread = (ticks[-1] - ticks[0]) * seconds
    fps = (len(ticks) - 1) / spread if spread > 0 else 1 / end_s
    width, height = shown_size(*size, orientation_of(last), pixel_aspect(stream))
    return ticks, digests, keys, VideoFacts(end_s, fps, len(ticks), width, height), last


def _codecs_aspect(stream: VideoStream) -> Fraction:
    """Returns the aspect of the last decoded pixels, unless the container declares another."""
    return aspect_of(stream.codec_context.sample_aspect_ratio)


def picture_digest(reformatter: VideoReformatter, frame: VideoFrame) -> bytes:
    """Returns a digest of a frame's thumbnail, since the pictures of hours of video do not fit into memory."""
    with ffmpeg_errors("pixels that cannot be converted"):
        small = reformatter.reformat(
            frame, width=_THUMB, height=_THUMB, format="gray8", interpolation="POINT", threads=1
        )
        return hashlib.blake2b(small.to_ndarray().tobytes(), digest_size=8).digest()


def _nothing_decoded(container: InputContainer, stream: VideoStream) -> tuple[str, str]:
    if stream.frames or stream.duration or container.duration:
        return "does not decode to the end", "truncated: no frame decodes"
    return "zero length", "no frame"


# -- a video that is whole: every frame in order, to the end that its header promises --------------


def sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yields every frame in order; raises DecodeError at the first sign of damage."""
    count, before, decoder = 0, None, TimedDecoder(container, stream)
    for packet in filled_packets(container, stream):
        if packet.is_corrupt:
            raise DecodeError("does not decode to the end", f"damaged packet after {count} frames")
        for frame in decoder.frames_of(packet):
            if frame.is_corrupt:
                raise DecodeError("does not decode to the end", f"damaged frame {count}")
            if before is not None and pts_of(frame) <= before:
                raise DecodeError("timestamps go backwards", f"frame {count}")
            yield frame
            count, before = count + 1, pts_of(frame)


def frames_stamped_anew(container: InputContainer, stream: VideoStream, fps: Fraction) -> Iterator[VideoFrame]:
    """Yields every frame in the decoder's output order (display order), at a constant rate from the start.

    For files with wrong timestamps. Raises DecodeError at the first sign of other damage.
    """
    count, gap = 0, 1 / (fps * time_base(stream))
    for packet in filled_packets(container, stream):
        if packet.is_corrupt:
            raise DecodeError("does not decode to the end", f"damaged packet after {count} frames")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError("does not decode to the end", f"damaged frame {count}")
            frame.pts = stream_start(stream) + round(count * gap)
            yield frame
            count += 1


def end_of_video(stream: VideoStream, *, first_tick: int, last: VideoFrame, frames: int) -> float:
    """Returns the end of the last frame, in seconds from the stream's start.

    first_tick, frames: first timestamp and number of the decoded frames
    """
    shown = last.duration or _mean_gap(stream, first_tick, pts_of(last), frames)
    return (pts_of(last) - stream_start(stream) + shown) * float(time_base(stream))


def _mean_gap(stream: VideoStream, first_tick: int, last_tick: int, frames: int) -> int:
    """Returns the duration of the last frame where the file does not declare one, in ticks."""
    if frames > 1:
        return max(1, round((last_tick - first_tick) / (frames - 1)))
    return round(1 / (stream.average_rate * time_base(stream))) if stream.average_rate else 0


def _frames_to_show(container: InputContainer, stream: VideoStream) -> int:
    """Returns the number of frames that a file shows: an edit list hides frames outside a trimmed MP4 or MOV."""
    if not container.format.name.startswith("mov,"):
        return stream.frames
    return min(stream.frames, sum(not entry.is_discard for entry in stream.index_entries))


def _packets(container: InputContainer, stream: VideoStream) -> int:
    """Returns the number of shown packets of a stream that was read to its end."""
    container.seek(0)
    return sum(packet.size > 0 and not packet.is_discard for packet in all_packets(container, stream))


def check_declared(
    container: InputContainer, stream: VideoStream, *, frames: int, last: VideoFrame, end_s: float
) -> None:
    """Raises DecodeError where a file ends earlier than its header declares (formats that stop without an error).

    frames, last, end_s: number of decoded frames, the last one, and the end of its display
    """
    # AVI and IVF count ticks: a picture that stays on screen for seven ticks counts seven times.
    shown = round(end_s / float(time_base(stream))) if container.format.name in ("avi", "ivf") else frames
    if shown < 0.95 * stream.frames:
        wanted = _frames_to_show(container, stream)
        # Interlaced H.264 may have a packet for each field.
        if shown < 0.95 * wanted and not (last.interlaced_frame and _packets(container, stream) >= 0.95 * wanted):
            raise DecodeError("does not decode to the end", f"truncated: {shown} of {wanted} frames")
    declared_s = None
    if stream.duration is not None:
        declared_s = float(stream.duration * time_base(stream))
    elif container.duration is not None and len(container.streams) == 1:  # else another stream may be longer
        declared_s = container.duration / 1e6
    if declared_s is not None and declared_s - end_s > max(0.5, 0.05 * declared_s):
        raise DecodeError("does not decode to the end", f"truncated: {end_s:.2f} of {declared_s:.2f} s")
