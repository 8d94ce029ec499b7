"""Small video files for tests, encoded here and now; every frame's number can be read off its pixels."""

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame ``number``: its low 6 bits as six black or white columns, over and under a grey level."""
    image = np.full((height, width, 3), 128, np.uint8)
    for bit in range(6):
        left, right = width * bit // 6, width * (bit + 1) // 6
        image[:, left:right] = 235 if number >> bit & 1 else 20
    return image


def number_of(image: np.ndarray) -> int:
    """The number that ``picture`` wrote, from an RGB image [H, W, 3]."""
    width = image.shape[1]
    return sum(int(image[:, width * bit // 6 + 2 : width * (bit + 1) // 6 - 2].mean() > 128) << bit for bit in range(6))


def encoded(
    frames: int = 40,
    *,
    rate: int = 30,
    gop: int = 12,
    pts_ms: list[int] | None = None,
    container: str = "mp4",
    codec: str = "h264",
    size: tuple[int, int] = (48, 64),
    options: dict[str, str] | None = None,
    faststart: bool = False,
) -> bytes:
    """A video file. pts_ms: the time of each frame in milliseconds (a variable rate) in place of ``rate``."""
    with tempfile.TemporaryDirectory() as folder:  # faststart moves the index to the front, by the file's name
        path = Path(folder) / "video"
        _encode(path, frames, rate, gop, pts_ms, container, codec, size, options or {}, faststart)
        return path.read_bytes()


def _encode(path, frames, rate, gop, pts_ms, container, codec, size, options, faststart) -> None:
    flags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", format=container, options=flags) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        tick = Fraction(1, rate) if pts_ms is None else Fraction(1, 1000)
        stream.codec_context.time_base = tick
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = (i if pts_ms is None else pts_ms[i]), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def audio_only() -> bytes:
    """A WAV file of a tenth of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def still_image(number: int = 0, *, codec: str = "mjpeg", size: tuple[int, int] = (48, 64)) -> bytes:
    """An image file of ``picture``."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as out:
        stream = out.add_stream(codec, rate=1)
        stream.height, stream.width = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}[codec]
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


VARIABLE_MS = [0, 40, 180, 300, 420, 700, 1000, 1100, 1500, 2000, 2300, 2400, 2900, 3100]


def quiet(doing: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
