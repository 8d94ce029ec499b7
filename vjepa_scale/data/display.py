"""How a decoded picture is shown: in which of eight ways it is turned or mirrored, and how wide its pixels are.

Files say the first by a display matrix (pictures by EXIF, of which FFmpeg makes one). What is shown is what
``ffmpeg -i FILE -vf scale=iw*sar:ih`` writes: turned first, then its width multiplied by the sample aspect ratio.
"""

import math
import struct
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.sidedata.sidedata import Type as SideData


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
