"""Streams the pictures of a video of any length; decodes images.

Inputs of a trained model were not checked by make_shards, so damage is an error here too.
"""

import math
from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from vjepa_scale.video.container import DecodeError, Media
from vjepa_scale.video.decode import decoding_from, pts_of, ticks_of, timed_frames, upright_rgb
from vjepa_scale.video.display import SQUARE, pixel_aspect
from vjepa_scale.video.image_files import still_picture
from vjepa_scale.video.inspect import check_declared, end_of_video, sound_frames

# Fraction of a picture: a time this close to the end of the video is outside it.
_COUNT_TOLERANCE = 1e-6


def picture_count(duration_s: float, fps: float) -> int:
    """Returns how many of the times 0, 1/fps, 2/fps, … are inside a video."""
    return max(0, math.ceil(duration_s * fps - _COUNT_TOLERANCE))


def stream_pictures(data: Media, *, fps: float, start_s: float = 0.0) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields the pictures at start_s, start_s + 1/fps, … until the video ends: uint8 RGB [H, W, 3], upright.

    They equal those of decode_clip, without repetitions after the end; one frame is in memory at a time. If read from
    0, raises DecodeError where the file does not decode to its end, or ends earlier than its header declares.
    """
    whole = start_s <= 0
    reformatter = VideoReformatter()
    shape = None
    with decoding_from(data, start_s, sound_frames if whole else timed_frames) as (container, stream, frames):
        current = next(frames)
        first_tick, decoded, taken = pts_of(current), 1, 0
        for following in chain(frames, [None]):
            if following is None:
                end_s = end_of_video(stream, first_tick=first_tick, last=current, frames=decoded)
                if whole:
                    check_declared(container, stream, frames=decoded, last=current, end_s=end_s)
                until = picture_count(end_s - start_s, fps)
            else:
                until = taken
                while ticks_of(stream, [start_s + until / fps])[0] < pts_of(following):
                    until += 1
            if until > taken:
                rgb = upright_rgb(reformatter, current, pixel_aspect(stream))
                if shape not in (None, rgb.shape):
                    raise DecodeError("the picture size changes inside the video")
                shape = rgb.shape
                for _ in range(taken, until):
                    yield rgb
                taken = until
            if following is not None:
                current, decoded = following, decoded + 1


def decode_image(data: Media) -> npt.NDArray[np.uint8] | None:
    """Decodes an image file, uint8 RGB [H, W, 3], upright; returns None for other files. Raises DecodeError."""
    picture = still_picture(data)
    return None if picture is None else upright_rgb(VideoReformatter(), picture, SQUARE)
