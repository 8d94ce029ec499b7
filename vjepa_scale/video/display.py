"""How a decoded picture is displayed: its orientation (one of eight), and the aspect of its pixels.

A display matrix gives the orientation (FFmpeg converts the EXIF of images to one). The result equals what
``ffmpeg -i FILE -vf scale=iw*sar:ih`` writes: rotated first, then its width multiplied by the sample aspect ratio.
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
# Ratios nearer to 1 come from rounding a size to whole pixels (FFmpeg's scaling writes 640:639, say), or from cropping
# 1088 lines to 1080. Such pixels count as square, and their pictures are not resampled.
_NEARLY_SQUARE = Fraction(1, 100)
# A larger ratio is a damaged header, and ignored.
_LARGEST_ASPECT = 16
# Widths are rounded down, as in FFmpeg's scale filter; a width this close below a whole number counts as that number.
_PIXEL_TOLERANCE = Fraction(1, 1000)


def _unnamed(cls: type[Enum], value: object) -> Enum:
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    return member


# PyAV does not know newer kinds of side data, EXIF among them, and returns no side data of a frame that has one.
setattr(SideData, "_missing_", classmethod(_unnamed))  # noqa: B010 (mypy knows no method of an enum that is assigned)


class Orientation(NamedTuple):
    """Transformation of a stored picture: mirrored (left becomes right), then rotated counter-clockwise by quarters."""

    mirrored: bool = False
    turns: int = 0

    def of(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Returns a stored picture [H, W, ...] as displayed, as a view."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, self.turns)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Converts (width, height) from stored to displayed, or from displayed to stored."""
        return (height, width) if self.turns % 2 else (width, height)


UPRIGHT = Orientation()


def orientation_of(picture: VideoFrame) -> Orientation:
    """Returns the orientation of a decoded picture's display matrix; angles are rounded to quarter turns."""
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
    """Returns the pixel aspect, width by height (SAR): from the container, else from the codec, else 1.

    For some codecs (AV1) it is known only after a frame is decoded.
    """
    return aspect_of(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio)


def aspect_of(declared: Fraction | None) -> Fraction:
    """Returns the sample aspect ratio to apply. declared: from a header; None or 0: unknown."""
    if not declared or not 1 / _LARGEST_ASPECT <= declared <= _LARGEST_ASPECT:
        return SQUARE
    return SQUARE if abs(declared - 1) <= _NEARLY_SQUARE else declared


def shown_size(width: int, height: int, orientation: Orientation, aspect: Fraction) -> tuple[int, int]:
    """Returns the displayed (width, height) of a stored picture; scaling keeps the height after rotation."""
    width, height = orientation.size(width, height)
    if aspect != SQUARE:
        stretch = 1 / aspect if orientation.turns % 2 else aspect
        width = max(1, math.floor(width * stretch + _PIXEL_TOLERANCE))
    return width, height
