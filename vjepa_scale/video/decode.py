"""Bytes of a video file -> the pictures on screen at given times.

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
# After a seek in an MPEG program stream, timestamps can be off by a frame: decode it from the start.
_SEEKS_BADLY = ("mpeg",)
MOST_HELD_BACK = 32  # frames: more than any codec lets come out of order


def decode_clip(data: Media, *, times_s: Sequence[float], decoder: str = PYAV) -> list[npt.NDArray[np.uint8]]:
    """The pictures at some ascending times: uint8 RGB [H, W, 3], upright; the same array where one stays on screen.

    data:    a video file, or an image file: its picture at all times
    times_s: seconds from the stream's start; past the end it is the last frame
    decoder: PYAV or TORCHCODEC, of videos
    Raises DecodeError.
    """
    try:
        if decoder == TORCHCODEC:
            from vjepa_scale.video.torchcodec import torchcodec_pictures  # installed only where it is asked for

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
    """When frames, numbered from 0 in the order of display, come on screen: seconds from the stream's start.

    frames: how many decoding gives, where that is known
    Past the end it is the last one's time. Nothing is decoded where there are as many packets as frames. Else (fields
    in packets of their own, frames that a decoder leaves out) the video is, up to the last number. Raises DecodeError.
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
    """A frame as the container tells of it. tick: its timestamp; damaged: its bytes are not all there."""

    tick: int
    damaged: bool


def frames_by_packet(container: InputContainer, stream: VideoStream) -> tuple[list[PacketedFrame], bool]:
    """All frames of a stream that nothing was read of yet, in the order of display, and whether this is plain to see.

    That is so where every packet up to the last frame is a frame that is shown, and tells when. It is not where an edit
    list or VP8 hides some, which are decoded for the sake of others, or where only decoding times are told. Raises
    DecodeError.
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
    """Whether a packet is one of VP8's alternate references, which are never shown (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def upright_rgb(reformatter: VideoReformatter, picture: av.VideoFrame, aspect: Fraction) -> npt.NDArray[np.uint8]:
    """A decoded picture as it is shown, uint8 RGB [H, W, 3]. Raises DecodeError.

    aspect: of its pixels; where they are not square, the picture is scaled to them by FFmpeg's bicubic filter
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
    """The frame on screen at each of some ascending times, decoding from the keyframe before the first.

    With them: the aspect of their pixels.
    """
    with decoding_from(data, times_s[0]) as (_, stream, frames):
        return list(on_screen(frames, ticks_of(stream, times_s))), pixel_aspect(stream)


def timed_frames(
    container: InputContainer, stream: VideoStream, *, from_keyframe: bool = False
) -> Iterator[av.VideoFrame]:
    """Frames as they come, each with a timestamp. Nothing was read since the container was opened, or sought in.

    from_keyframe: leave out packets before the first keyframe's: a second field would be taken with the next first one
    """
    decoder, packets = TimedDecoder(container, stream), filled_packets(container, stream)
    if from_keyframe:
        packets = dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets)
    for packet in packets:
        yield from decoder.frames_of(packet)


class TimedDecoder:
    """Decodes a stream's packets, one after the other from a keyframe on, and says when frames come on screen.

    Where a container has presentation times, frames have them. AVI, ASF, bare MPEG and what Matroska copied of AVI have
    one tick for each packet, in the order of decoding. A decoder gives frames in the order of display, each as many
    packets after its turn as it holds frames back: so a frame's tick is that of the packet so many before the one with
    which it comes out. This holds after a seek, too, where frames that need earlier ones are left out.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, first: Packet | None = None) -> None:
        self._container, self._context = container, stream.codec_context
        self._decoding_times = None if first is None else tells_decoding_times(container, first)
        self._ticks = deque[int](maxlen=MOST_HELD_BACK)  # of packets

    def frames_of(self, packet: Packet) -> Iterator[av.VideoFrame]:
        """The frames that come out with a packet, with timestamps. Raises DecodeError."""
        for frame, tick in self.decoded(packet):
            frame.pts = tick
            yield frame

    def decoded(self, packet: Packet) -> Iterator[tuple[av.VideoFrame, int]]:
        """The frames that come out with a packet, as they are, and when they come on screen. Raises DecodeError."""
        if self._decoding_times is None:
            self._decoding_times = tells_decoding_times(self._container, packet)
        if self._decoding_times and packet.size:
            self._ticks.append(self._tick_of(packet))
        for late, frame in enumerate(packet.decode()):
            if self._decoding_times:
                # When the stream has ended, each frame takes the turn of a packet that there is not.
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
    """Whether a stream that begins with this packet tells only when packets are decoded."""
    return container.format.name in DECODING_TIMES or first.pts is None


def filled_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """A stream's packets, and the one without a time that ends it.

    Left out are packets of no bytes, by which Theora says that a picture stays on screen: decoders refuse them.
    """
    return (packet for packet in all_packets(container, stream) if packet.size or packet.dts is None)


def all_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """A stream's packets in the order of the file, and the one without bytes and time that ends it."""
    # Where other streams begin inside the file (sound that comes late), PyAV may stumble over them after its last
    # packet of this one: it asks memory that it has not set whether they are wanted.
    with suppress(IndexError):
        yield from container.demux(stream)


@contextmanager
def decoding_from(
    data: Media,
    start_s: float,
    frames_of: Callable[..., Iterator[av.VideoFrame]] = timed_frames,
) -> Iterator[tuple[InputContainer, VideoStream, Iterator[av.VideoFrame]]]:
    """An open video and its frames, beginning with one that is on screen at a time or before it.

    frames_of: how frames are decoded; as ``timed_frames``, where start_s is not 0 or before it

    A seek can land late (indices count decoding time, or are broken) or between keyframes. Frames before the
    first keyframe are dropped, and where that comes too late it starts further back, in the end from the
    beginning, so that the result is that of decoding the whole file.
    """
    back_s = 0.0
    while True:
        with open_video(data) as (container, stream):
            (tick,) = ticks_of(stream, [start_s])
            from_start = start_s - back_s <= 0 or not sought(container, stream, start_s - back_s)
            frames = frames_of(container, stream) if from_start else frames_of(container, stream, from_keyframe=True)
            first = None
            # A keyframe's packet may hold another picture (packed B-frames), which needs what lies before.
            with nullcontext() if from_start else suppress(av.FFmpegError):
                first = next((frame for frame in frames if from_start or frame.key_frame), None)
            if first is not None and (from_start or pts_of(first) <= tick):
                yield container, stream, chain([first], frames)
                return
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


def ticks_of(stream: VideoStream, times_s: Sequence[float]) -> list[int]:
    """Seconds from the stream's start → its ticks."""
    return (stream_start(stream) + whole_ticks(times_s, float(time_base(stream)))).tolist()


def whole_ticks(times_s: Sequence[float] | npt.NDArray[np.float64], tick_s: float) -> npt.NDArray[np.int64]:
    """How many ticks of tick_s seconds have passed at each time."""
    return np.floor(np.asarray(times_s, np.float64) * (1 / tick_s) + _TICK_TOLERANCE).astype(np.int64)


def sought(container: InputContainer, stream: VideoStream, time_s: float) -> bool:
    """Seek to the keyframe at or before a time; False where the container cannot seek (nothing is read yet)."""
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
    """The last frame with pts <= each of some ascending ticks; before the first frame, the first. Holds two frames."""
    current, wanted = next(frames), iter(ticks)
    tick = next(wanted, None)
    for following in chain(frames, [None]):
        while tick is not None and (following is None or pts_of(following) > tick):
            yield current
            tick = next(wanted, None)
        if following is None or tick is None:
            return
        current = following
