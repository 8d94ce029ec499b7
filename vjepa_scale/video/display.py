"""How a decoded picture is shown: in which of eight ways it is turned or mirrored, and how wide its pixels are.

Files say the first by a display matrix (pictures by EXIF, of which FFmpeg makes one). What is shown is what
``ffmpeg -i FILE -vf scale=iw*sar:ih`` writes: turned first, then its width multiplied by the sample aspect ratio.
"""

import math
import struct
from enum import Enum
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.sidedata.sidedata import Type as SideData
from av.video.stream import VideoStream

SQUARE = Fraction(1)
# What is left of a ratio where a size was rounded to whole pixels (FFmpeg's scaling writes 640:639, say), or cropped
# from 1088 to 1080 lines: such pixels count as square, and their pictures are not resampled.
_NEARLY_SQUARE = Fraction(1, 100)
# A ratio beyond is damage in a header, and ignored.
_LARGEST_ASPECT = 16
# Widths are rounded down, as FFmpeg's scale filter does; so near below a whole number they are that.
_PIXEL_TOLERANCE = Fraction(1, 1000)


def _unnamed(cls: type[Enum], value: object) -> Enum:
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    return member


# PyAV has no name for newer kinds of side data, EXIF among them, and gives none of a frame's where one of them is.
setattr(SideData, "_missing_", classmethod(_unnamed))  # noqa: B010 (mypy knows no method of an enum that is assigned)


class Orientation(NamedTuple):
    """What is done to a stored picture: mirrored (left becomes right), then turned counter-clockwise by quarters."""

    mirrored: bool = False
    turns: int = 0

    def of(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """A stored picture [H, W, ...] as it is shown: a view."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, self.turns)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a stored picture as it is shown, and of a shown one as it is stored."""
        return (height, width) if self.turns % 2 else (width, height)


UPRIGHT = Orientation()


def orientation_of(picture: VideoFrame) -> Orientation:
    """By a decoded picture's display matrix; angles are rounded to quarter turns."""
    data = picture.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return UPRIGHT
    # [right, down] as stored times [[a, b], [c, d]] is [right, down] as shown.
    a, b, _, c, d = struct.unpack_from("5i", bytes(data))
    if not ((a or c) and (b or d)):
        return UPRIGHT
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    angle = -math.atan2(b / math.hypot(b, d), a / math.hypot(a, c))
    return Orientation(mirrored, round(angle / (math.pi / 2)) % 4)


def pixel_aspect(stream: VideoStream) -> Fraction:
    """The width of a video's pixels by their height (SAR): the container's word, or else the codec's; or 1.

    Of some codecs (AV1) it is known when a frame is decoded.
    """
    return aspect_of(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio)


def aspect_of(declared: Fraction | None) -> Fraction:
    """A sample aspect ratio as it is applied. declared: in a header; None or 0: unknown."""
    if not declared or not 1 / _LARGEST_ASPECT <= declared <= _LARGEST_ASPECT:
        return SQUARE
    return SQUARE if abs(declared - 1) <= _NEARLY_SQUARE else declared


def shown_size(width: int, height: int, orientation: Orientation, aspect: Fraction) -> tuple[int, int]:
    """(width, height) as it is shown of a stored picture: its height is what it was after turning."""
    width, height = orientation.size(width, height)
    if aspect != SQUARE:
        stretch = 1 / aspect if orientation.turns % 2 else aspect
        width = max(1, math.floor(width * stretch + _PIXEL_TOLERANCE))
    return width, height
