"""Stream copies of videos: unchanged packets in a new file, for a part of a video or with other timestamps.

A copy can begin and end only where a keyframe divides the file: no packet after it in the file is shown before it,
and none before it is shown after it (so not inside open groups of pictures). Whole groups are copied: a part begins
at the last such keyframe at or before its start, and ends at the first one at or after its end, or with the video.
Sound and subtitles are dropped. The new file is MP4, or Matroska for a codec that MP4 cannot hold.

``retimed`` is for a video with correct pictures and wrong timestamps. DROID's MP4s have one frame per step of the
control log, at the camera's nominal rate: in the new file frame k comes on screen at the time of step k.
"""

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, islice, pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from vjepa_scale.core.worker_pool import heartbeat
from vjepa_scale.data.trajectories import Floats, step_s
from vjepa_scale.video.container import DecodeError, ffmpeg_errors, open_video
from vjepa_scale.video.decode import (
    MOST_HELD_BACK,
    TimedDecoder,
    all_packets,
    pts_of,
    sought,
    stream_start,
    tells_decoding_times,
    time_base,
    whole_ticks,
)
from vjepa_scale.video.display import aspect_of, pixel_aspect
from vjepa_scale.video.inspect import Decoded, VideoFacts, decode_whole

REASON = "cannot be cut by copying"
_MP4_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
# Tolerance between a frame's times in the part and in the source: Matroska counts in milliseconds.
_TIME_TOLERANCE_S = 1.5e-3


@dataclass(frozen=True)
class Cut:
    """A part of a video stream, by its packets in file order: first to last, without last.

    start_s, end_s: the shown part, in seconds of the source; zero: the source's tick that becomes 0 in the part
    extension: of the new file, mp4 or mkv
    """

    first: int
    last: int
    zero: int
    start_s: float
    end_s: float
    extension: str


def plan_cuts(
    path: Path, decoded: Decoded, *, start_s: float | None, end_s: float | None, segment_s: float | None
) -> list[Cut] | None:
    """Returns the parts that cover start_s to end_s, each up to segment_s long unless one group of pictures is longer.

    decoded: of this file. Returns None where the whole file is one part. Raises DecodeError.
    """
    duration = decoded.facts.duration
    if (start_s or 0.0) >= duration:
        raise DecodeError("no such part", f"start {start_s} s, the video ends at {duration:.3f} s")
    if not start_s and (end_s is None or end_s >= duration) and (segment_s is None or duration <= segment_s):
        return None
    starts, packets, extension = _dividing_keyframes(path)
    times = [start for _, _, start in starts] + [duration]
    begin = max((i for i, t in enumerate(times[:-1]) if t <= (start_s or 0.0) + 1e-6), default=0)
    until = next(
        (i for i, t in enumerate(times) if end_s is not None and i > begin and t >= end_s - 1e-6), len(times) - 1
    )
    bounds = [begin]
    for i in range(begin + 1, until):
        if segment_s is not None and times[i + 1] - times[bounds[-1]] > segment_s + 1e-6:
            bounds.append(i)
    bounds.append(until)
    if bounds == [0, len(starts)]:
        return None
    numbers = [number for number, _, _ in starts] + [packets]
    return [Cut(numbers[i], numbers[j], starts[i][1], times[i], times[j], extension) for i, j in pairwise(bounds)]


def copy_cut(path: Path, cut: Cut) -> bytes:
    """Returns the part as a new file, with deterministic bytes. Raises DecodeError."""
    packets = _from_keyframe(path, cut) if cut.first else None
    if packets is not None:
        return packets
    with open_video(path) as (container, stream):
        return _part(stream, list(islice(packets_of(container, stream), cut.first, cut.last)), cut)


def _from_keyframe(path: Path, cut: Cut) -> bytes | None:
    """Reads the part from its keyframe on; returns None where a seek does not reach it."""
    with open_video(path) as (container, stream):
        if not sought(container, stream, (cut.zero - stream_start(stream)) * float(time_base(stream))):
            return None
        every = packets_of(container, stream)
        from_key = dropwhile(lambda packet: packet.pts != cut.zero, every)
        packets = list(islice(from_key, cut.last - cut.first))
        return _part(stream, packets, cut) if len(packets) == cut.last - cut.first else None


def _part(stream: VideoStream, packets: list[Packet], cut: Cut) -> bytes:
    packets = without_hidden_end(packets, cut.zero)
    return muxed(stream, packets, [shown_at(packet) - cut.zero for packet in packets], cut.extension)


def check_display(copy: Decoded, source: Decoded, extension: str, *, reason: str = REASON) -> None:
    """Raises DecodeError unless a copy has the same orientation and pixel aspect as the source."""
    if copy.orientation != source.orientation:
        raise DecodeError(reason, f"a .{extension} of this codec does not say how pictures are turned")
    if copy.aspect != source.aspect:
        raise DecodeError(reason, f"a .{extension} of this codec does not say how wide pixels are")


def without_hidden_end(packets: list[Packet], zero: int, *, reason: str = REASON) -> list[Packet]:
    """Returns packets, in file order, without those after the last one that an edit list shows. Raises DecodeError.

    zero: tick of the first shown picture. Hidden packets before it are kept, because others depend on them; negative
    times hide them in the new file too. Frames between or after others cannot be hidden there.
    """
    end = max((i for i, packet in enumerate(packets) if not packet.is_discard), default=-1) + 1
    if any(packet.is_discard and shown_at(packet) >= zero for packet in packets[:end]):
        raise DecodeError(reason, "an edit list hides frames inside it")
    return packets[:end]


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yields all packets of a video, in file order, each with the presentation time of its picture."""
    packets = all_packets(container, stream)
    first = next(packets, None)
    if first is None:
        return
    if tells_decoding_times(container, first):
        packets = _shown(TimedDecoder(container, stream, first), chain([first], packets))
    else:
        packets = chain([first], packets)
    for packet in packets:
        heartbeat()
        if packet.size:
            yield packet


def _shown(decoder: TimedDecoder, packets: Iterator[Packet]) -> Iterator[Packet]:
    """Adds presentation times to packets that have only decoding times (AVI), from the decoder's output order."""
    waiting, ticks = deque[tuple[int, Packet]](), dict[int, int]()
    for number, packet in enumerate(packets):
        if packet.size:
            packet.pts = number
            waiting.append((number, packet))
        elif packet.dts is not None:
            continue
        ticks |= {pts_of(frame): tick for frame, tick in decoder.decoded(packet)}
        # At the end, or after this delay, there is no picture (VP8's references): such a packet keeps its own time.
        while waiting and (waiting[0][0] in ticks or not packet.size or len(waiting) > MOST_HELD_BACK):
            first, known = waiting.popleft()
            known.pts = ticks.pop(first, known.dts)
            yield known


def muxed(
    stream: VideoStream, packets: list[Packet], ticks: list[int], extension: str, tick_s: Fraction | None = None
) -> bytes:
    """Writes a new file of packets in their order, with deterministic bytes. Raises DecodeError.

    ticks: presentation time of each; tick_s: seconds per tick of the new file, default the stream's
    """
    kind = {"mp4": "mp4", "mkv": "matroska"}[extension]
    buffer = io.BytesIO()
    with ffmpeg_errors(REASON), av.open(buffer, "w", format=kind, options={"fflags": "+bitexact"}) as out:
        try:
            copy = out.add_stream_from_template(stream, opaque=True)
        except ValueError as error:  # a codec that neither format can hold: Sorenson's, in old FLVs
            raise DecodeError(REASON, str(error)) from None
        if pixel_aspect(stream) != aspect_of(stream.codec_context.sample_aspect_ratio):  # the container overrides it
            copy.sample_aspect_ratio = pixel_aspect(stream)
        if tick_s is not None:
            copy.time_base = tick_s
        for packet, pts, dts in zip(packets, ticks, _decoding_times(ticks), strict=True):
            packet.pts, packet.dts, packet.stream = pts, dts, copy
            out.mux(packet)
    return buffer.getvalue()


def extension_for(stream: VideoStream) -> str:
    """Returns the extension of the file that a stream's packets are copied to."""
    return "mp4" if stream.codec_context.codec.canonical_name in _MP4_CODECS else "mkv"


def checked_cut(path: Path, decoded: Decoded, cut: Cut) -> tuple[bytes, VideoFacts]:
    """Returns the part, after checking that it decodes to the source's pictures and times. Raises DecodeError."""
    data = copy_cut(path, cut)
    part = decode_whole(data)
    inside = (decoded.times_s >= cut.start_s - 1e-6) & (decoded.times_s < cut.end_s - 1e-6)
    shown = np.flatnonzero(inside)
    if part.digests != [decoded.digests[i] for i in shown]:
        raise DecodeError(REASON, f"the part from {cut.start_s:.3f} s does not decode to the same pictures")
    check_display(part, decoded, cut.extension)
    late = part.times_s - decoded.times_s[shown]
    if np.abs(late - late[0]).max() > _TIME_TOLERANCE_S:
        raise DecodeError(REASON, f"the part from {cut.start_s:.3f} s does not keep the times")
    return data, part.facts


def shown_at(packet: Packet) -> int:
    """Returns the tick at which the packet's picture comes on screen. Raises DecodeError."""
    if packet.pts is None:
        raise DecodeError(REASON, "packets without timestamps")
    return packet.pts


def _dividing_keyframes(path: Path) -> tuple[list[tuple[int, int, float]], int, str]:
    """Returns (packet number, tick, seconds) of the start and of each keyframe that divides the file.

    Also returns the number of packets, and the extension of parts.
    """
    with open_video(path) as (container, stream):
        rows = [
            (shown_at(packet), packet.is_keyframe and not packet.is_discard) for packet in packets_of(container, stream)
        ]
        seconds, start = float(time_base(stream)), stream_start(stream)
        extension = extension_for(stream)
    pts = np.array([tick for tick, _ in rows], np.int64)
    before = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(pts)[:-1]])
    after = np.minimum.accumulate(pts[::-1])[::-1]
    keys = np.array([key for _, key in rows], bool)
    divides = np.flatnonzero(keys & (pts == after) & (pts > before) & (pts > start)).tolist()
    return (
        [(0, start, 0.0)] + [(i, int(pts[i]), (int(pts[i]) - start) * seconds) for i in divides],
        len(rows),
        extension,
    )


def _decoding_times(pts: list[int]) -> list[int]:
    """Returns decoding ticks of packets in file order: ascending, and none later than the packet is shown."""
    shown: npt.NDArray[np.int64] = np.sort(np.array(pts, np.int64))
    early = int((shown - np.array(pts, np.int64)).max(initial=0))
    return (shown - early).tolist()


# -- a copy with the log's times -------------------------------------------------------------------

_NO_NEW_TIMES = "cannot be given the log's times"
# Seconds per tick: MP4 accepts any (this is the usual clock of video), Matroska uses milliseconds.
_TICK_S = {"mp4": Fraction(1, 90_000), "mkv": Fraction(1, 1000)}


def retimed(video: Path, times_s: Floats) -> tuple[bytes, str]:
    """Returns the new file, with deterministic bytes, and its extension. Raises DecodeError.

    times_s: [frames], ascending from 0: presentation time of each frame, which may come up to one tick early
    """
    with open_video(video) as (container, stream):
        packets = without_hidden_end(list(packets_of(container, stream)), stream_start(stream), reason=_NO_NEW_TIMES)
        hidden = sum(packet.is_discard for packet in packets)
        if len(packets) - hidden != len(times_s):
            raise DecodeError(_NO_NEW_TIMES, f"{len(packets) - hidden} packets for {len(times_s)} frames")
        extension = extension_for(stream)
        tick_s = _TICK_S[extension]
        # Rounds down, because at its own time a frame must be on screen.
        rising = whole_ticks(times_s, float(tick_s))
        last = max(1, round(step_s(times_s) / float(tick_s)))
        lasting = np.concatenate([np.full(hidden, last), np.diff(rising), [last]])
        rising = np.concatenate([last * np.arange(-hidden, 0), rising])
        ticks = np.zeros(len(packets), np.int64)
        for frame, number in enumerate(np.argsort([shown_at(packet) for packet in packets], kind="stable")):
            packets[number].time_base, packets[number].duration = tick_s, int(lasting[frame])
            ticks[number] = rising[frame]
        return muxed(stream, packets, ticks.tolist(), extension, tick_s), extension


def checked_retimed(video: Path, decoded: Decoded, times_s: Floats) -> tuple[bytes, str, Decoded]:
    """Returns ``retimed``, after checking that it shows the same pictures at these times. Raises DecodeError."""
    data, extension = retimed(video, times_s)
    seen = decode_whole(data)
    if seen.digests != decoded.digests:
        raise DecodeError(_NO_NEW_TIMES, "the copy does not decode to the same pictures")
    check_display(seen, decoded, extension, reason=_NO_NEW_TIMES)
    early = times_s - seen.times_s
    if early.min() < -1e-6 or early.max() > float(_TICK_S[extension]) + 1e-6:
        raise DecodeError(_NO_NEW_TIMES, f"frames of the copy are {early.min():.6f} to {early.max():.6f} s early")
    return data, extension, seen
