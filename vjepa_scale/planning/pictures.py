"""What a user has of the world now, or of a goal: pictures in memory or in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.clips import rgb_array
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.stream import decode_image


def pictures_of(given: Any) -> npt.NDArray[np.uint8]:
    """uint8 RGB [B, H, W, 3] of the same, of one [H, W, 3], or of an image file. Raises UserError for anything else."""
    if isinstance(given, str | Path):
        return _file(Path(given))
    array = rgb_array(given, where="encode", fix="uint8 RGB [B, H, W, 3], or [H, W, 3] for one")
    return np.ascontiguousarray(array if array.ndim == 4 else array[None])


def _file(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        raise UserError("no such file", where=path, fix="give an image")
    try:
        picture = decode_image(path)
    except DecodeError as error:
        raise UserError(str(error), where=path, fix="give a whole image file") from None
    if picture is None:
        raise UserError("a video, not an image", where=path, fix="give one picture of it")
    return picture[None]
