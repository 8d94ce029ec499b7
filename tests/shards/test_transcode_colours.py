"""Transcoding keeps colours, and turns pictures upright."""

import io

import av
import numpy as np
import pytest

from tests.shards.transcoding import coloured, transcoded
from tests.video.test_decode import rotated, sequential
from tests.videos import encoded, number_of

COLOURED = {
    "yuv420p": lambda: coloured("libx264", "yuv420p"),
    "BT.709": lambda: coloured("libx264", "yuv420p", matrix=1),
    "yuv444p": lambda: coloured("libx264", "yuv444p"),
    "full range": lambda: coloured("libx264", "yuv420p", full=True),
    "yuvj420p, BT.709": lambda: coloured("libx264", "yuvj420p", full=True, matrix=1),
    "motion JPEG": lambda: coloured("mjpeg", "yuvj422p", full=True, container="avi"),
    "10 bit": lambda: coloured("libx264", "yuv420p10le"),
    "10 bit HEVC, BT.2020": lambda: coloured("libx265", "yuv420p10le", matrix=9),
    "10 bit 4:2:2": lambda: coloured("ffv1", "yuv422p10le"),
    "odd sizes": lambda: coloured("libvpx-vp9", "yuv420p", size=(145, 241)),
    "odd sizes, yuv444p": lambda: coloured("libx264", "yuv444p", size=(145, 241)),
    "grey": lambda: coloured("ffv1", "gray"),
    "RGB": lambda: coloured("ffv1", "bgr0"),
    "RGB h264": lambda: coloured("libx264rgb", "rgb24"),
    "transparent": lambda: coloured("ffv1", "yuva420p"),
}


def averages(image: np.ndarray) -> np.ndarray:
    """Of an RGB picture, over each of 8 by 8 rectangles: without what an encoder does to single pixels."""
    rows = np.add.reduceat(image.astype(float), np.arange(8) * len(image) // 8, axis=0)
    cells = np.add.reduceat(rows, np.arange(8) * image.shape[1] // 8, axis=1)
    return cells * 64 / image[..., 0].size


@pytest.mark.parametrize("short_side", [None, 72])
@pytest.mark.parametrize("kind", COLOURED)
def test_colours_stay(kind: str, short_side: int | None) -> None:
    """A matrix taken for another changes these averages by 4 levels and more, a range by 8."""
    data = COLOURED[kind]()
    source, made = sequential(data)[1], sequential(transcoded(data, short_side=short_side))[1]
    assert len(made) == len(source)
    for before, after in zip(source, made, strict=True):
        height, width = (side // 2 * 2 for side in before.shape[:2])
        assert np.abs(averages(after) - averages(before[:height, :width])).mean() < 2


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_rotation_is_applied(turn: int) -> None:
    data = encoded(12, rate=10, size=(48, 64))
    if turn == 1:
        turned = rotated(data)
    else:  # the display matrix of a half turn, of a quarter counter-clockwise
        at = data.index(b"tkhd") + 4 + 40
        unit, minus, zero = ((n << 16).to_bytes(4, "big", signed=True) for n in (1, -1, 0))
        rows = {2: [minus, zero, zero, zero, minus], 3: [zero, minus, zero, unit, zero]}[turn]
        offsets = {2: (64, 48), 3: (0, 64)}[turn]
        moved = zero + offsets[0].to_bytes(2, "big") + bytes(2) + offsets[1].to_bytes(2, "big") + bytes(2)
        turned = data[:at] + b"".join(rows) + moved + data[at + 32 :]
    made = transcoded(turned, short_side=24)
    with av.open(io.BytesIO(made)) as container:
        assert {frame.rotation for frame in container.decode(video=0)} == {0}
    pictures = sequential(made)[1]
    expected = sequential(data)[1]
    assert pictures[0].shape == ((24, 32, 3) if turn == 2 else (32, 24, 3))
    back = [np.rot90(image, turn) for image in pictures]  # counter-clockwise, by what the matrix turns clockwise
    assert [number_of(image) for image in back] == [number_of(image) for image in expected] == list(range(12))
