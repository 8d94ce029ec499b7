"""Videos and pictures of each orientation, drawn here, and how Pillow turns them."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from vjepa_scale.shards.remux import checked_cut, plan_cuts
from vjepa_scale.video.inspect import decode_whole

# By EXIF's number of an orientation: a, b, c, d of the matrix by which a video says the same (ISO 14496-12), and what
# Pillow does to the stored picture.
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIMES_S = [0.0, 0.3, 0.7]

Picture = npt.NDArray[np.uint8]


def drawn(number: int = 0, height: int = 48, width: int = 80) -> Picture:
    """Colours that differ at all four corners, smooth, so that no encoder changes them much."""
    down, right = np.mgrid[:height, :width] / [[[height]], [[width]]]
    channels = [40 + 170 * right, 40 + 170 * down, 40 + 17 * number + 60 * right * down]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def video(
    orientation: int = 1,
    *,
    aspect: Fraction | None = None,
    frames: int = 8,
    container: str = "mp4",
    codec: str = "h264",
    size: tuple[int, int] = (48, 80),
) -> bytes:
    """A video of ``drawn``, ten pictures a second, every fourth a keyframe. aspect: of its pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.gop_size, stream.codec_context.thread_count = 4, 1
        stream.codec_context.max_b_frames = 0
        if orientation != 1:
            a, b, c, d = (n << 16 for n in MATRICES[orientation])
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(drawn(i, *size), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def stored(data: bytes) -> list[Picture]:
    """All pictures as PyAV decodes them, as they are stored."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def by_pillow(pictures: list[Picture], orientation: int) -> list[Picture]:
    if orientation == 1:
        return pictures
    return [np.asarray(Image.fromarray(picture).transpose(TRANSPOSED[orientation])) for picture in pictures]


def assert_alike(found: list[Picture], expected: list[Picture], *, mean: float) -> None:
    """Of the same sizes, and so many of 255 levels apart in the mean."""
    assert [picture.shape for picture in found] == [picture.shape for picture in expected]
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(found, expected, strict=True)) < mean


def cut(data: bytes, path: Path, *, segment_s: float) -> list[bytes]:
    """A video's segments, copied. Raises DecodeError."""
    path.write_bytes(data)
    decoded = decode_whole(path)
    cuts = plan_cuts(path, decoded, start_s=None, end_s=None, segment_s=segment_s)
    return [checked_cut(path, decoded, part)[0] for part in cuts or []]


def assert_equal(found: list[Picture], expected: list[Picture]) -> None:
    assert [picture.shape for picture in found] == [picture.shape for picture in expected]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
