"""Transcoding of one video, and which frames and pictures the result has."""

import io
from fractions import Fraction

import av
import numpy as np

from tests.video.test_decode import sequential
from tests.videos import number_of
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.transcode import Transcode, plan_transcodes
from vjepa_scale.video.inspect import decode_whole


def planned(data: bytes, *, short_side: int | None = None, **asked: float | Fraction | None) -> list[Transcode]:
    return plan_transcodes(decode_whole(data), short_side=short_side, **asked)


def transcoded(data: bytes, *, short_side: int | None = None, **asked: float | Fraction | None) -> bytes:
    (part,) = planned(data, short_side=short_side, **asked)
    return transcode(data, part)


def numbers(data: bytes) -> list[int]:
    return [number_of(image) for image in sequential(data)[1]]


def on_screen(data: bytes, start: Fraction, rate: Fraction, frames: int) -> list[int]:
    """The number of the source frame on screen at the middle of each output frame, in exact arithmetic."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        times = [f.pts * f.time_base - stream.start_time * stream.time_base for f in container.decode(stream)]
    middles = [start + (k + Fraction(1, 2)) / rate for k in range(frames)]
    return [max((i for i, t in enumerate(times) if t <= middle), default=0) for middle in middles]


_MATRIX = {1: "ITU709", 2: "ITU601", 9: "BT2020"}


def smooth(height: int, width: int) -> np.ndarray:
    """Large soft patches of all colours, saturated, black and white: scaling changes next to nothing."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    image = np.stack([0.5 + 0.5 * np.sin(5 * x + 2 * y + phase * np.sin(3 * y)) for phase in (0, 2, 4)], -1)
    return (255 * image).round().astype(np.uint8)


def coloured(
    codec: str,
    pix_fmt: str,
    *,
    matrix: int = 2,
    full: bool = False,
    size: tuple[int, int] = (144, 240),
    container: str = "matroska",
    frames: int = 4,
) -> bytes:
    """``smooth`` in some pixel format, tagged as such. matrix: as FFmpeg numbers them, 2 for unspecified."""
    buffer = io.BytesIO()
    options = {"libx264": {"crf": "4"}, "libx265": {"crf": "4", "x265-params": "log-level=error"}}.get(codec, {})
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        colours = {"colorspace": matrix} if matrix != 2 else {}
        if full:
            colours["color_range"] = 2
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for k in range(frames):
            image = av.VideoFrame.from_ndarray(smooth(*size), format="rgb24")
            if not pix_fmt.startswith(("gbr", "rgb", "bgr")):
                image = image.reformat(
                    format=pix_fmt, dst_colorspace=_MATRIX[matrix], dst_color_range=2 if full else None
                )
                for name, value in colours.items():
                    setattr(image, name, value)
            image.pts, image.time_base = k, Fraction(1, 10)
            out.mux(stream.encode(image))
        out.mux(stream.encode())
    return buffer.getvalue()
