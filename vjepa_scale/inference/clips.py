"""Converts files, arrays and images to uint8 pictures of the encoder's size; cuts long videos into chunks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.augment import center_crop
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.stream import decode_image, stream_pictures

Size = tuple[int, int]


def cropped_pictures(path: str | Path, *, fps: float, size: Size, start_s: float) -> tuple[Iterator[Tensor], bool]:
    """Returns an iterator over a file's pictures, uint8 [3, 1, *size], from start_s on; and whether it is an image.

    Resizes the short side and crops the centre, as in frozen evaluation. An image has one picture. Raises UserError,
    also during iteration.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", where=path, fix="give a video or an image")
    try:
        image = decode_image(path)
    except DecodeError as error:
        raise _unusable(path, error) from None
    if image is not None:
        return iter([cropped(image, size)]), True
    return _of_video(path, fps, size, start_s), False


def _of_video(path: Path, fps: float, size: Size, start_s: float) -> Iterator[Tensor]:
    none = True
    try:
        for picture in stream_pictures(path, fps=fps, start_s=start_s):
            none = False
            yield cropped(picture, size)
    except DecodeError as error:
        raise _unusable(path, error) from None
    if none:
        raise UserError(f"the video ends before {start_s:g} s", where=path, fix="an earlier start")


def _unusable(path: Path, error: DecodeError) -> UserError:
    return UserError(str(error), where=path, fix="give a whole video or image file")


def cropped(picture_HWC: npt.NDArray[np.uint8], size: Size) -> Tensor:
    """Resizes and crops one picture: uint8 [3, 1, *size]."""
    return center_crop([picture_HWC], size)


def clip_of_file(path: str | Path, *, frames: int | None, fps: float, size: Size, start_s: float, still: int) -> Tensor:
    """Returns uint8 [3, T, *size]: ``frames`` pictures from start_s on (None: all), the last repeated past the end.

    still: number of frames for an image where ``frames`` is None
    """
    pictures, is_image = cropped_pictures(path, fps=fps, size=size, start_s=start_s)
    found = list(islice(pictures, frames))
    wanted = frames if frames is not None else still if is_image else len(found)
    return torch.cat(found + found[-1:] * (wanted - len(found)), dim=1)


def rgb_array(given: Any, *, where: str, fix: str) -> npt.NDArray[np.uint8]:
    """Returns pictures in memory, uint8 RGB [N, H, W, 3] or one [H, W, 3], as an array. Raises UserError for others."""
    array = given.numpy(force=True) if isinstance(given, Tensor) else np.asarray(given)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(f"pictures of shape {list(array.shape)} and type {array.dtype}", where=where, fix=fix)
    return array


def clip_of_array(array: Any, *, frames: int | None, fps: float, size: Size, start_s: float, still: int) -> Tensor:
    """``clip_of_file`` for pictures in memory, uint8 RGB [T, H, W, 3], 1/fps seconds apart, or one, [H, W, 3]."""
    pictures = rgb_array(array, where="preprocess", fix="uint8 RGB [T, H, W, 3], or [H, W, 3] for an image")
    is_image = pictures.ndim == 3
    pictures = pictures[None] if is_image else pictures[round(start_s * fps) :][:frames]
    if not len(pictures):
        raise UserError(f"the pictures end before {start_s:g} s", where="preprocess", fix="an earlier start")
    clip = center_crop(list(np.ascontiguousarray(pictures)), size)
    wanted = frames if frames is not None else still if is_image else len(pictures)
    return torch.cat([clip, *[clip[:, -1:]] * (wanted - clip.shape[1])], dim=1)


# -- a long video in chunks: the pictures of each forward pass, and which of its tokens are new ----


Picture = TypeVar("Picture")


@dataclass(frozen=True)
class Chunk(Generic[Picture]):
    """One clip for the encoder. Its last ``new`` frames are new; those before were in an earlier chunk.

    frames:  the clip
    first:   number of the first new picture in the video
    new:     number of frames in no earlier chunk, repetitions included; a multiple of the tubelet
    real:    how many of these are pictures of the video; the others repeat the last one
    """

    frames: list[Picture]
    first: int
    new: int
    real: int


def cut_chunks(pictures: Iterable[Picture], *, chunk: int, tubelet: int) -> Iterator[Chunk[Picture]]:
    """Yields consecutive chunks of ``chunk`` pictures; at most two are in memory.

    The last chunk begins earlier, so that it is complete too, and its tokens have the same context as all others; only
    frames of no earlier chunk are new in it. Where the number of pictures is no multiple of the tubelet, the last
    picture is repeated to complete its token. A video shorter than a chunk is one clip of its own length.
    """
    assert chunk % tubelet == 0, f"chunks of {chunk} frames do not divide into tubelets of {tubelet}"
    before, now, first = list[Picture](), list[Picture](), 0
    for picture in pictures:
        now.append(picture)
        if len(now) == chunk:
            yield Chunk(now, first, chunk, chunk)
            before, now, first = now, [], first + chunk
    if now:
        real = len(now)
        now += now[-1:] * (-real % tubelet)
        seen = before[len(now) :]  # empty where nothing came before
        yield Chunk([*seen, *now], first, len(now), real)


def pictures_of(given: Any) -> npt.NDArray[np.uint8]:
    """Returns uint8 RGB [B, H, W, 3] of such an array, of one [H, W, 3], or of an image file. Else raises UserError."""
    if isinstance(given, str | Path):
        return _of_image_file(Path(given))
    array = rgb_array(given, where="encode", fix="uint8 RGB [B, H, W, 3], or [H, W, 3] for one")
    return np.ascontiguousarray(array if array.ndim == 4 else array[None])


def _of_image_file(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        raise UserError("no such file", where=path, fix="give an image")
    try:
        picture = decode_image(path)
    except DecodeError as error:
        raise UserError(str(error), where=path, fix="give a whole image file") from None
    if picture is None:
        raise UserError("a video, not an image", where=path, fix="give one picture of it")
    return picture[None]
