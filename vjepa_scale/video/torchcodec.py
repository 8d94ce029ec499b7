"""Decodes pictures at given times with torchcodec, the PyTorch project's decoder, instead of PyAV.

PyAV still decides whether a file is a video, which stream is used, and which frame is on screen at each time. So times
mean the same, and torchcodec never gets a playlist, whose files it would open. torchcodec decodes the pictures of these
frame numbers. Raises an error where torchcodec counts or times frames differently: each package brings its own FFmpeg,
and damaged headers are read differently. PyAV decodes mirrored pictures and non-square pixels, because torchcodec
returns them as they are stored.
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

# In other containers (MPEG streams, AVI) torchcodec's seeks returned other pictures with the right timestamps.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_DISAGREE = "decoders disagree"


def import_torchcodec() -> ModuleType:
    """Imports torchcodec's decoders. Raises UserError where it, or an FFmpeg that it can load, is not installed."""
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
    """``decode_clip`` by torchcodec; returns None where PyAV must decode. Raises DecodeError."""
    try:
        return _pictures(data, times_s)
    except DecodeError:
        if _may_be_of_fields(data):
            return None
        raise


def _may_be_of_fields(data: Media) -> bool:
    """Returns whether packets may be fields: torchcodec counts each as a frame."""
    with open_video(data) as (container, stream):
        return any(frame.interlaced_frame for frame in islice(timed_frames(container, stream), 1))


def _pictures(data: Media, times_s: Sequence[float]) -> list[npt.NDArray[np.uint8]] | None:
    decoders = import_torchcodec()
    with open_video(data) as (container, stream):
        if container.format.name not in _CONTAINERS:
            return None
        number, tick_s = stream.index, float(time_base(stream))
        frames, plain = frames_by_packet(container, stream)
        if not plain:  # torchcodec seeks and computes times by packets
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
    """Returns whether pictures only need rotation. Decodes one picture, since containers do not always declare this."""
    with decoding_from(data, time_s) as (_, stream, frames):
        return not orientation_of(next(frames)).mirrored and pixel_aspect(stream) == SQUARE


@contextmanager
def _errors(reason: str) -> Iterator[None]:
    """Converts torchcodec's errors inside the block to DecodeError with this reason."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        # The format is "function, file.cpp:line, message", then a trace.
        what = (str(error).strip() or type(error).__name__).splitlines()[0].split(", ", 2)[-1]
        raise DecodeError(reason, f"torchcodec: {what}") from None
