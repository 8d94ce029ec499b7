"""What a video shows when, by decoding it in order with PyAV alone: nothing of ours is asked.

Turns are read from the file's own boxes (ISO 14496-12), not from what FFmpeg makes of them.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

# The matrix of a track header [[a, b], [c, d]] → quarter turns clockwise by which the picture is shown.
_TURNS = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 1, (-1, 0, 0, -1): 2, (0, -1, 1, 0): 3}


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video come on screen. ticks: of each frame, from the stream's start; tick_s: seconds."""

    ticks: list[int]
    tick_s: Fraction
    duration_s: float
    codec: str
    pixels: str

    def frame_at(self, offset: float | Fraction) -> int:
        """Which frame is on screen at this many ticks: the last that came by then, or the first one of all."""
        whole = math.floor(offset)
        return max((i for i, tick in enumerate(self.ticks) if tick <= whole), default=0)

    @property
    def gaps(self) -> list[int]:
        """Ticks between neighbours."""
        return [after - before for before, after in pairwise(self.ticks)]

    @property
    def varies(self) -> bool:
        """Whether the rate is variable (and not only rounded to ticks)."""
        return max(self.gaps) - min(self.gaps) > max(1, 0.01 * max(self.gaps)) or 2 * min(self.gaps) <= max(self.gaps)


def timeline(path: Path) -> Timeline:
    """Raises av.FFmpegError where the file does not decode to its end."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        seen = [(frame.pts, frame.duration, frame.format.name) for frame in _frames(container, stream)]
        start, tick_s = stream.start_time or 0, stream.time_base
        ticks = [pts - start for pts, _, _ in seen]
        if container.format.name == "avi":  # times of packets: the first picture takes the first, and so on
            container.seek(0)
            ticks = [packet.dts - start for packet in container.demux(stream) if packet.size]
        end = ticks[-1] + (seen[-1][1] or (ticks[-1] - ticks[-2]))
        return Timeline(ticks, tick_s, float(end * tick_s), stream.codec_context.name, seen[0][2])


def pictures(path: Path, wanted: Collection[int]) -> dict[int, npt.NDArray[np.uint8]]:
    """RGB [H, W, 3], upright and of square pixels, of the frames of these numbers, by decoding from the first."""
    turns = turns_clockwise(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        aspect, found = stream.sample_aspect_ratio or 1, {}
        for i, frame in enumerate(_frames(container, stream)):
            if i not in wanted:
                continue
            if aspect != 1:  # of the width as shown
                side = {"height": int(frame.height / aspect)} if turns % 2 else {"width": int(frame.width * aspect)}
                frame = frame.reformat(format="rgb24", interpolation="BICUBIC", **side)
            found[i] = np.rot90(frame.to_ndarray(format="rgb24"), k=-turns)
        return found


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        # Theora's packet of no bytes: the frame before, once more (its specification, "Complete Frame Decode").
        if packet.size or packet.dts is None:
            yield from packet.decode()


def turns_clockwise(path: Path) -> int:
    """Quarter turns clockwise by which the video track of an MP4 or QuickTime file is shown; other files: 0."""
    data = path.read_bytes()
    place = matrix_place(data)
    if place is None:
        return 0
    a, b, _, c, d = (int.from_bytes(data[place + 4 * i : place + 4 * i + 4], "big", signed=True) for i in range(5))
    return _TURNS[a >> 16, b >> 16, c >> 16, d >> 16]


def turned(data: bytes, turns: int) -> bytes:
    """An MP4 whose video track says that it is shown this many quarter turns further clockwise than it is stored."""
    place = matrix_place(data)
    assert place is not None, "no MP4"
    (a, b, c, d) = next(matrix for matrix, n in _TURNS.items() if n == turns % 4)
    rows = [a << 16, b << 16, 0, c << 16, d << 16]
    return data[:place] + b"".join(n.to_bytes(4, "big", signed=True) for n in rows) + data[place + 20 :]


def edited(data: bytes, *edits: tuple[int, int]) -> bytes:
    """An MP4 or MOV with one track and its index at the end, with this edit list: what is played, in this order.

    edits: how long (in the movie's units, here milliseconds), and from which tick of the track; -1: nothing is shown
    """
    begin, end, parents = 0, len(data), list[int]()
    for kind in (b"moov", b"trak", b"edts", b"elst"):
        while data[begin + 4 : begin + 8] != kind:
            begin += int.from_bytes(data[begin : begin + 4], "big")
            assert begin < end, f"no {kind.decode()}"
        parents.append(begin)
        begin, end = begin + 8, begin + int.from_bytes(data[begin : begin + 4], "big")
    rows = [n.to_bytes(4, "big", signed=True) for edit in edits for n in (*edit, 1 << 16)]
    box = b"elst" + bytes(4) + len(edits).to_bytes(4, "big") + b"".join(rows)
    out = bytearray(data[: parents[-1]] + (len(box) + 4).to_bytes(4, "big") + box + data[end:])
    longer = len(out) - len(data)
    for place in parents[:-1]:
        size = int.from_bytes(out[place : place + 4], "big") + longer
        out[place : place + 4] = size.to_bytes(4, "big")
    return bytes(out)


def matrix_place(data: bytes) -> int | None:
    """Where the matrix of the first video track's header begins; None in a file that is not made of boxes."""
    if data[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return None
    found: dict[str, int] = {}

    def visit(kind: bytes, begin: int, end: int) -> None:
        if kind in (b"moov", b"trak", b"mdia"):
            _boxes(data, begin, end, visit)
        elif kind == b"tkhd":
            found["header"] = begin + (52 if data[begin] else 40)  # version 1 has longer times
        elif kind == b"hdlr" and data[begin + 8 : begin + 12] == b"vide":
            found.setdefault("video", found["header"])

    _boxes(data, 0, len(data), visit)
    return found["video"]


def _boxes(data: bytes, begin: int, end: int, visit: Callable[[bytes, int, int], None]) -> None:
    while begin + 8 <= end:
        size, kind, header = int.from_bytes(data[begin : begin + 4], "big"), data[begin + 4 : begin + 8], 8
        if size == 1:
            size, header = int.from_bytes(data[begin + 8 : begin + 16], "big"), 16
        size = size or end - begin
        visit(kind, begin + header, min(begin + size, end))
        begin += size
