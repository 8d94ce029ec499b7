"""A video that is whole: every frame in order, to the end that its header promises. Damage is an error here, where
``decode.py`` would show what it can.
"""

from collections.abc import Iterator
from fractions import Fraction

from av import VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import TimedDecoder, all_packets, filled_packets, pts_of, stream_start, time_base


def sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame in order; DecodeError at the first sign of damage."""
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
    """Every frame in the order in which the decoder gives them (that of display), at a constant rate from the start.

    For files whose own timestamps are wrong. Raises DecodeError at the first sign of other damage.
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


def _frames_to_show(container: InputContainer, stream: VideoStream) -> int:
    """How many of its frames a file wants to be shown: an edit list hides what lies outside a trimmed MP4 or MOV."""
    if not container.format.name.startswith("mov,"):
        return stream.frames
    return min(stream.frames, sum(not entry.is_discard for entry in stream.index_entries))


def _packets(container: InputContainer, stream: VideoStream) -> int:
    """How many packets a stream has that are shown, which was read to its end."""
    container.seek(0)
    return sum(packet.size > 0 and not packet.is_discard for packet in all_packets(container, stream))


def check_declared(
    container: InputContainer, stream: VideoStream, *, frames: int, last: VideoFrame, end_s: float
) -> None:
    """Refuse a file that ends before what its header promises (formats that stop without an error).

    frames, last, end_s: what was decoded, to the end of the file: how many, the last one, and when it leaves the screen
    """
    # AVI and IVF count ticks: a picture that stays on screen for seven of them is there seven times.
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
