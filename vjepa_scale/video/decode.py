"""Decodes the pictures of a video file that are on screen at given times.

A frame is on screen from its own timestamp until the next frame's. So the picture at time t is the last
frame with pts <= t, whatever the frame rate does. Second 0 is the video stream's start time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import chain, dropwhile, islice
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from vjepa_scale.video.container import DECODING_TIMES, NOT_A_VIDEO, DecodeError, Media, ffmpeg_errors, open_video
from vjepa_scale.video.display import SQUARE, orientation_of, pixel_aspect, shown_size
from vjepa_scale.video.image_files import still_picture

# Times are floats and ticks integers: a time this close below a tick (in ticks) counts as that tick.
_TICK_TOLERANCE = 1e-6
PYAV, TORCHCODEC = "pyav", "torchcodec"
# After a seek in an MPEG program stream, timestamps can be off by a frame, so these are decoded from the start.
_SEEKS_BADLY = ("mpeg",)
MOST_HELD_BACK = 32  # frames: more than any codec's reordering delay


def decode_clip(data: Media, *, times_s: Sequence[float], decoder: str = PYAV) -> list[npt.NDArray[np.uint8]]:
    """Returns the pictures at ascending times: uint8 RGB [H, W, 3], upright; one array repeated where one stays.

    data:    a video file; or an image file, whose picture is returned for all times
    times_s: seconds from the stream's start; past the end, the last frame is returned
    decoder: PYAV or TORCHCODEC, for videos
    Raises DecodeError.
    """
    try:
        if decoder == TORCHCODEC:
            from vjepa_scale.video.torchcodec import torchcodec_pictures  # an optional dependency

            found = torchcodec_pictures(data, times_s)
            if found is not None:
                return found
        pictures, aspect = pictures_at(data, times_s)
    except DecodeError as error:
        still = still_picture(data) if error.reason == NOT_A_VIDEO else None
        if still is None:
            raise
        pictures, aspect = [still] * len(times_s), SQUARE
    reformatter = VideoReformatter()
    rgb: list[npt.NDArray[np.uint8]] = []
    for k, picture in enumerate(pictures):
        if k and picture is pictures[k - 1]:
            rgb.append(rgb[-1])
            continue
        rgb.append(upright_rgb(reformatter, picture, aspect))
    if any(array.shape != rgb[0].shape for array in rgb):
        raise DecodeError("the picture size changes inside the video")
    return rgb


def times_of_frames(data: Media, numbers: Sequence[int], *, frames: int | None = None) -> list[float]:
    """Returns the times of frames, numbered from 0 in display order: seconds from the stream's start.

    frames: number of decoded frames, where it is known
    Past the end, returns the last frame's time. Decodes nothing where there are as many packets as frames. Otherwise
    (each field in its own packet, frames that a decoder drops) decodes up to the last number. Raises DecodeError.
    """
    with open_video(data) as (container, stream):
        start, tick_s = stream_start(stream), float(time_base(stream))
        ticks = [frame.tick for frame in frames_by_packet(container, stream)[0]]
    if frames is not None and len(ticks) != frames:
        with open_video(data) as (container, stream):
            ticks = [pts_of(frame) for frame in islice(timed_frames(container, stream), max(numbers) + 1)]
    if not ticks:
        raise DecodeError("zero length", "no frame decodes")
    return [(ticks[min(number, len(ticks) - 1)] - start) * tick_s for number in numbers]


class PacketedFrame(NamedTuple):
    """A frame as listed by the container. tick: its timestamp; damaged: some of its bytes are missing."""

    tick: int
    damaged: bool


def frames_by_packet(container: InputContainer, stream: VideoStream) -> tuple[list[PacketedFrame], bool]:
    """Returns all frames of an unread stream in display order, and whether frames and packets correspond one to one.

    They do where every packet up to the last frame is a shown frame with a presentation time. They do not where an
    edit list or VP8 hides frames that others depend on, or where packets have only decoding times. Raises DecodeError.
    """
    frames, hidden, plain = list[PacketedFrame](), list[int](), True
    for packet in all_packets(container, stream):
        if not packet.size:
            continue
        tick = packet.pts if packet.pts is not None else packet.dts
        if tick is None:
            raise DecodeError("frames without timestamps")
        plain = plain and packet.pts is not None
        if packet.is_discard or _is_reference(stream, packet):
            hidden.append(tick)
        else:
            frames.append(PacketedFrame(tick, packet.is_corrupt))
    if not frames:
        raise DecodeError("zero length", "no packets")
    frames.sort()
    return frames, plain and all(tick > frames[-1].tick for tick in hidden)


def _is_reference(stream: VideoStream, packet: Packet) -> bool:
    """Returns whether a packet is one of VP8's alternate references, which are never shown (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def upright_rgb(reformatter: VideoReformatter, picture: av.VideoFrame, aspect: Fraction) -> npt.NDArray[np.uint8]:
    """Converts a decoded picture to its display form, uint8 RGB [H, W, 3]. Raises DecodeError.

    aspect: of its pixels; where they are not square, FFmpeg's bicubic filter scales the picture to square pixels
    """
    orientation = orientation_of(picture)
    shown = shown_size(picture.width, picture.height, orientation, aspect)
    width, height = orientation.size(*shown)
    scaling = Interpolation.BICUBIC if (width, height) != (picture.width, picture.height) else None
    with ffmpeg_errors("pixels that cannot be converted"):
        rgb = reformatter.reformat(picture, width, height, "rgb24", interpolation=scaling, threads=1)
        array = np.asarray(rgb.to_ndarray(), np.uint8)
    return np.ascontiguousarray(orientation.of(array))


def pictures_at(data: Media, times_s: Sequence[float]) -> tuple[list[av.VideoFrame], Fraction]:
    """Returns the frame on screen at each of some ascending times, and the pixel aspect.

    Decodes from the keyframe before the first time.
    """
    with decoding_from(data, times_s[0]) as (_, stream, frames):
        return list(on_screen(frames, ticks_of(stream, times_s))), pixel_aspect(stream)


def timed_frames(
    container: InputContainer, stream: VideoStream, *, from_keyframe: bool = False
) -> Iterator[av.VideoFrame]:
    """Yields decoded frames in order, each with a timestamp. Call it right after opening the container or a seek.

    from_keyframe: drop packets before the first keyframe; a lone second field would be paired with the next first one
    """
    decoder, packets = TimedDecoder(container, stream), filled_packets(container, stream)
    if from_keyframe:
        packets = dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets)
    for packet in packets:
        yield from decoder.frames_of(packet)


class TimedDecoder:
    """Decodes a stream's packets in order from a keyframe on, and computes the presentation time of each frame.

    Where a container has presentation times, frames carry them. AVI, ASF, raw MPEG, and Matroska remuxed from AVI have
    one tick per packet, in decoding order. A decoder outputs frames in display order, delayed by the d frames that it
    holds back. So a frame's tick is that of the packet d packets before the one with which the frame is output. This
    also holds after a seek, where frames that depend on earlier ones are dropped.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, first: Packet | None = None) -> None:
        self._container, self._context = container, stream.codec_context
        self._decoding_times = None if first is None else tells_decoding_times(container, first)
        self._ticks = deque[int](maxlen=MOST_HELD_BACK)  # of packets

    def frames_of(self, packet: Packet) -> Iterator[av.VideoFrame]:
        """Yields the frames that a packet completes, with timestamps. Raises DecodeError."""
        for frame, tick in self.decoded(packet):
            frame.pts = tick
            yield frame

    def decoded(self, packet: Packet) -> Iterator[tuple[av.VideoFrame, int]]:
        """Yields the frames that a packet completes, unchanged, and their presentation ticks. Raises DecodeError."""
        if self._decoding_times is None:
            self._decoding_times = tells_decoding_times(self._container, packet)
        if self._decoding_times and packet.size:
            self._ticks.append(self._tick_of(packet))
        for late, frame in enumerate(packet.decode()):
            if self._decoding_times:
                # After the end of the stream, each remaining frame counts as if one more packet had been read.
                behind = self._context.reorder_depth - (0 if packet.size else late + 1)
                yield frame, self._ticks[max(0, len(self._ticks) - 1 - behind)]
            elif frame.pts is None:
                raise DecodeError("frames without timestamps")
            else:
                yield frame, frame.pts

    def _tick_of(self, packet: Packet) -> int:
        if packet.dts is not None:
            return packet.dts
        if not self._ticks:
            raise DecodeError("frames without timestamps")
        return self._ticks[-1] + (packet.duration or 0)  # after a seek ASF leaves one out


def tells_decoding_times(container: InputContainer, first: Packet) -> bool:
    """Returns whether a stream that begins with this packet has decoding times only."""
    return container.format.name in DECODING_TIMES or first.pts is None


def filled_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yields a stream's packets, and the packet without a time that ends it.

    Skips empty packets, which in Theora repeat the picture on screen: decoders refuse them.
    """
    return (packet for packet in all_packets(container, stream) if packet.size or packet.dts is None)


def all_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yields a stream's packets in file order, and the packet without bytes and time that ends it."""
    # Where another stream begins late in the file (late sound, say), PyAV may fail after the last packet of this one:
    # it reads uninitialised memory to decide whether the new stream is wanted.
    with suppress(IndexError):
        yield from container.demux(stream)


@contextmanager
def decoding_from(
    data: Media,
    start_s: float,
    frames_of: Callable[..., Iterator[av.VideoFrame]] = timed_frames,
) -> Iterator[tuple[InputContainer, VideoStream, Iterator[av.VideoFrame]]]:
    """Opens a video and yields its frames, from one that is on screen at start_s or earlier.

    frames_of: decodes frames; it must behave as ``timed_frames`` where start_s is above 0

    A seek can land late (indices count decoding time, or are broken) or between keyframes. Frames before the first
    keyframe are dropped. Where the first frame is too late, this seeks further back, finally to the beginning, so that
    the result equals that of decoding the whole file.
    """
    back_s = 0.0
    while True:
        with open_video(data) as (container, stream):
            (tick,) = ticks_of(stream, [start_s])
            from_start = start_s - back_s <= 0 or not sought(container, stream, start_s - back_s)
            frames = frames_of(container, stream) if from_start else frames_of(container, stream, from_keyframe=True)
            first = None
            # A keyframe's packet may hold a second picture (packed B-frames) that depends on earlier frames.
            with nullcontext() if from_start else suppress(av.FFmpegError):
                first = next((frame for frame in frames if from_start or frame.key_frame), None)
            if first is not None and (from_start or pts_of(first) <= tick):
                yield container, stream, chain([first], frames)
                return
            if from_start:
                raise DecodeError("zero length", "no frame decodes")
        back_s = max(1.0, 2 * back_s)


def stream_start(stream: VideoStream) -> int:
    """Returns second 0 of a stream, in its ticks."""
    return stream.start_time or 0


def time_base(stream: VideoStream) -> Fraction:
    """Seconds per tick."""
    assert stream.time_base is not None, "an open video stream has a time base"
    return stream.time_base


def ticks_of(stream: VideoStream, times_s: Sequence[float]) -> list[int]:
    """Converts seconds from the stream's start to its ticks."""
    return (stream_start(stream) + whole_ticks(times_s, float(time_base(stream)))).tolist()


def whole_ticks(times_s: Sequence[float] | npt.NDArray[np.float64], tick_s: float) -> npt.NDArray[np.int64]:
    """Returns how many ticks of tick_s seconds have passed at each time."""
    return np.floor(np.asarray(times_s, np.float64) * (1 / tick_s) + _TICK_TOLERANCE).astype(np.int64)


def sought(container: InputContainer, stream: VideoStream, time_s: float) -> bool:
    """Seeks to the keyframe at or before a time. Returns False, with nothing read, where the container cannot seek."""
    if container.format.name in _SEEKS_BADLY:
        return False
    try:
        container.seek(ticks_of(stream, [time_s])[0], stream=stream, backward=True)
    except av.FFmpegError:
        return False
    return True


def pts_of(frame: av.VideoFrame) -> int:
    assert frame.pts is not None
    return frame.pts


def on_screen(frames: Iterator[av.VideoFrame], ticks: Sequence[int]) -> Iterator[av.VideoFrame]:
    """Yields the last frame with pts <= each ascending tick; the first frame for earlier ticks. Holds two frames."""
    current, wanted = next(frames), iter(ticks)
    tick = next(wanted, None)
    for following in chain(frames, [None]):
        while tick is not None and (following is None or pts_of(following) > tick):
            yield current
            tick = next(wanted, None)
        if following is None or tick is None:
            return
        current = following
