"""Saturated pictures in every layout of pixels: transcoded, colours stay where they are, and the comparison agrees."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.shards.transcoding import transcoded
from tests.video.test_decode import sequential

SIZE = (144, 240)


def patchwork(height: int, width: int) -> np.ndarray:
    """Saturated squares of seven pixels, and nothing between them."""
    y, x = np.mgrid[:height, :width] // 7
    return (255 * np.stack([(x + y) % 2, (x // 2 + y) % 2, (x + y // 2) % 3 == 0], -1)).astype(np.uint8)


def filmed(image: np.ndarray, codec: str, pix_fmt: str, container: str, **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = pix_fmt
        for k in range(2):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = k, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def half_turned(data: bytes) -> bytes:
    """The same MP4, shown upside down."""
    at = data.index(b"tkhd") + 4 + 40
    minus, zero = (-1 << 16).to_bytes(4, "big", signed=True), bytes(4)
    corner = [(side << 16).to_bytes(4, "big") for side in SIZE[::-1]]
    return data[:at] + b"".join([minus, zero, zero, zero, minus, zero, *corner]) + data[at + 32 :]


LAYOUTS = {
    "h264": lambda image: filmed(image, "libx264", "yuv420p", "mp4", crf="4"),
    "upside down": lambda image: half_turned(filmed(image[::-1, ::-1], "libx264", "yuv420p", "mp4", crf="4")),
    "interlaced": lambda image: filmed(
        image, "libx264", "yuv420p", "mp4", **{"x264-params": "interlaced=1:crf=4:log=-1"}
    ),
    "VP8 with alpha": lambda image: filmed(image, "libvpx", "yuva420p", "webm", crf="4", **{"auto-alt-ref": "0"}),
    "VP9": lambda image: filmed(image, "libvpx-vp9", "yuv420p", "webm", crf="4", deadline="realtime"),
    "4:4:4": lambda image: filmed(image, "libx264", "yuv444p", "mp4", crf="4"),
    "RGB": lambda image: filmed(image, "ffv1", "bgr0", "matroska"),
}


@pytest.mark.parametrize("short_side", [None, 72, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_comparison_passes_what_is_sound(layout: str, short_side: int | None) -> None:
    transcoded(LAYOUTS[layout](patchwork(*SIZE)), short_side=short_side)


@pytest.mark.parametrize("layout", ["VP8 with alpha", "VP9"])
def test_chroma_stays_where_it_is(layout: str) -> None:
    """Half a pixel aside, as of codecs that have it between two pixels, these differ by 17 levels."""
    made, whole = (
        sequential(transcoded(LAYOUTS[name](patchwork(*SIZE)), short_side=72))[1][0].astype(float)
        for name in (layout, "4:4:4")
    )
    assert np.abs(made - whole).mean() < 10
