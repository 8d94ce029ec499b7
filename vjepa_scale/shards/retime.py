"""A video whose pictures are right and whose clock is not, with the times at which its pictures really were.

DROID's MP4s have one frame per step of the control log, under whatever rate the camera was set to. Their packets are
copied as they are (see cut.py) into a new file in which frame k comes on screen at the time of step k.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np

from vjepa_scale.data.trajectories import Floats, step_s
from vjepa_scale.shards.cut import check_display, extension_for, muxed, packets_of, shown_at, without_hidden_end
from vjepa_scale.video.container import DecodeError, open_video
from vjepa_scale.video.decode import stream_start, whole_ticks
from vjepa_scale.video.inspect import Decoded, decode_whole

REASON = "cannot be given the log's times"
# Seconds per tick: MP4 counts as it is told (this is the usual clock of video), Matroska in milliseconds.
_TICK_S = {"mp4": Fraction(1, 90_000), "mkv": Fraction(1, 1000)}


def retimed(video: Path, times_s: Floats) -> tuple[bytes, str]:
    """The new file, always the same bytes, and its extension. Raises DecodeError.

    times_s: [frames], rising from 0: when each frame comes on screen, up to a tick before
    """
    with open_video(video) as (container, stream):
        packets = without_hidden_end(list(packets_of(container, stream)), stream_start(stream), reason=REASON)
        hidden = sum(packet.is_discard for packet in packets)
        if len(packets) - hidden != len(times_s):
            raise DecodeError(REASON, f"{len(packets) - hidden} packets for {len(times_s)} frames")
        extension = extension_for(stream)
        tick_s = _TICK_S[extension]
        # Never late: at its own time a frame is to be on screen.
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
    """``retimed``, decoded and found to show the same pictures at these times. Raises DecodeError."""
    data, extension = retimed(video, times_s)
    seen = decode_whole(data)
    if seen.digests != decoded.digests:
        raise DecodeError(REASON, "the copy does not decode to the same pictures")
    check_display(seen, decoded, extension, reason=REASON)
    early = times_s - seen.times_s
    if early.min() < -1e-6 or early.max() > float(_TICK_S[extension]) + 1e-6:
        raise DecodeError(REASON, f"frames of the copy are {early.min():.6f} to {early.max():.6f} s early")
    return data, extension, seen
