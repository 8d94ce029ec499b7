"""A long video is encoded in chunks: which pictures each forward pass sees, and which of its tokens count."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class Chunk(Generic[Picture]):
    """One clip for the encoder. The last ``new`` of its frames are this chunk's; those before, an earlier one's.

    frames:  the clip
    first:   number of the first new picture in the video
    new:     frames that no chunk before had, repetitions included; a multiple of the tubelet
    real:    how many of these are pictures of the video; the others repeat the last one
    """

    frames: list[Picture]
    first: int
    new: int
    real: int


def cut(pictures: Iterable[Picture], *, chunk: int, tubelet: int) -> Iterator[Chunk[Picture]]:
    """Chunks of ``chunk`` pictures, one after the other; at most two are in memory.

    What is left at the end goes into one more, which begins so much earlier that it is whole, too: its tokens have
    as much to look back on as all others; those of the repeated pictures are not its new ones. Where the number of
    pictures is no multiple of the tubelet, the last picture is repeated to complete its token. A video shorter than
    a chunk is one clip of its own length.
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
