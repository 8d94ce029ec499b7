"""The pictures at given times by torchcodec, the PyTorch project's decoder, in place of PyAV.

What is a video, which of its streams, and which frame is on screen when stay PyAV's word: so a playlist never reaches
torchcodec, which would open the files that it names, and times mean the same. Of the frame numbers that come out of
that, torchcodec gives the pictures, or an error where it does not count or time the frames alike: each brings an FFmpeg
of its own, and damaged headers are read differently. Mirrored pictures, and pixels that are not square, are left to
PyAV: torchcodec would show them as they are stored.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import ModuleType

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.video.container import DecodeError, Media, open_media, open_video
from vjepa_scale.video.decode import decoding_from, frames_by_packet, ticks_of, time_base, timed_frames
from vjepa_scale.video.display import SQUARE, orientation_of, pixel_aspect

# In other containers (MPEG streams, AVI) its seeks led to other pictures, with the right timestamps.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_DISAGREE = "decoders disagree"


def import_torchcodec() -> ModuleType:
    """torchcodec's decoders. Raises UserError where it, or an FFmpeg that it can load, is not installed."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"torchcodec cannot be imported: {first_line}",
            where="data.decoder",
            fix="pip install 'vjepa-scale[torchcodec]' and FFmpeg's shared libraries (apt-get install ffmpeg); "
            "or data.decoder=pyav",
        ) from None
    return decoders


def torchcodec_pictures(data: Media, times_s: Sequence[float]) -> list[npt.NDArray[np.uint8]] | None:
    """``decode_clip`` by torchcodec; None where that is left to PyAV. Raises DecodeError."""
    try:
        return _pictures(data, times_s)
    except DecodeError:
        if _may_be_of_fields(data):
            return None
        raise


def _may_be_of_fields(data: Media) -> bool:
    """Whether packets may be fields: torchcodec takes each for a frame."""
    with open_video(data) as (container, stream):
        return any(frame.interlaced_frame for frame in islice(timed_frames(container, stream), 1))


def _pictures(data: Media, times_s: Sequence[float]) -> list[npt.NDArray[np.uint8]] | None:
    decoders = import_torchcodec()
    with open_video(data) as (container, stream):
        if container.format.name not in _CONTAINERS:
            return None
        number, tick_s = stream.index, float(time_base(stream))
        frames, plain = frames_by_packet(container, stream)
        if not plain:  # its seeks and times go by packets
            return None
        ticks = ticks_of(stream, times_s)
    on_screen = [max(0, bisect_right(frames, tick, key=lambda frame: frame.tick) - 1) for tick in ticks]
    if any(frame.damaged for frame in frames[: on_screen[-1] + 1]):
        raise DecodeError("does not decode to the end", "damaged packet")
    wanted = sorted(set(on_screen))
    if not _only_turned(data, times_s[0]):
        return None
    with nullcontext(data) if isinstance(data, bytes) else open_media(data) as source:
        with _errors("unreadable"):
            decoder = decoders.VideoDecoder(
                source,
                stream_index=number,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                device="cpu",
                seek_mode="exact",
            )
        if len(decoder) != len(frames):
            raise DecodeError(_DISAGREE, f"{len(decoder)} frames for torchcodec, {len(frames)} for PyAV")
        with _errors("does not decode to the end"):
            found = decoder.get_frames_at(wanted)
    for i, time_s in zip(wanted, found.pts_seconds.tolist(), strict=True):
        if abs(time_s - frames[i].tick * tick_s) > tick_s / 2:
            raise DecodeError(
                _DISAGREE, f"frame {i} at {time_s} s for torchcodec, {frames[i].tick * tick_s} s for PyAV"
            )
    pictures = dict(zip(wanted, found.data.numpy(), strict=True))
    return [pictures[i] for i in on_screen]


def _only_turned(data: Media, time_s: float) -> bool:
    """Whether that is all that has to be done to pictures. One is decoded for that: containers do not always tell."""
    with decoding_from(data, time_s) as (_, stream, frames):
        return not orientation_of(next(frames)).mirrored and pixel_aspect(stream) == SQUARE


@contextmanager
def _errors(reason: str) -> Iterator[None]:
    """What torchcodec raises inside becomes a DecodeError with this reason."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        # "function, file.cpp:line, what happened", then a trace
        what = (str(error).strip() or type(error).__name__).splitlines()[0].split(", ", 2)[-1]
        raise DecodeError(reason, f"torchcodec: {what}") from None
