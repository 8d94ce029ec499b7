"""Pictures as they are shown: all eight ways of turning and mirroring, judged by Pillow and by ffmpeg's command."""

import io
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from vjepa_scale.data.decode import PYAV, TORCHCODEC, decode_clip
from vjepa_scale.data.ingest.cut import checked_cut, plan_cuts
from vjepa_scale.data.ingest.encode import transcode
from vjepa_scale.data.ingest.probe import decode_whole
from vjepa_scale.data.ingest.transcode import plan_transcodes
from vjepa_scale.data.pictures import decode_image, stream_pictures

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


def video(orientation: int = 1, *, frames: int = 8, container: str = "mp4", codec: str = "h264") -> bytes:
    """A video of ``drawn``, ten pictures a second, every fourth a keyframe."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 4, 1
        stream.codec_context.max_b_frames = 0
        if orientation != 1:
            a, b, c, d = (n << 16 for n in MATRICES[orientation])
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for i in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(i), format="rgb24")))
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


def cut(data: bytes, path: Path, *, segment_s: float) -> list[bytes]:
    """A video's segments, copied. Raises DecodeError."""
    path.write_bytes(data)
    decoded = decode_whole(path)
    cuts = plan_cuts(path, decoded, start_s=None, end_s=None, segment_s=segment_s)
    return [checked_cut(path, decoded, part)[0] for part in cuts or []]


def assert_equal(found: list[Picture], expected: list[Picture]) -> None:
    assert [picture.shape for picture in found] == [picture.shape for picture in expected]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# -- videos ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [PYAV, pytest.param(TORCHCODEC, marks=pytest.mark.system("torchcodec"))])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("orientation", MATRICES)
def test_videos_are_shown_as_their_matrix_says(orientation: int, container: str, decoder: str) -> None:
    data = video(orientation, container=container)
    expected = by_pillow(stored(data), orientation)
    assert_equal(decode_clip(data, times_s=TIMES_S, decoder=decoder), [expected[i] for i in (0, 3, 7)])
    assert_equal(list(stream_pictures(data, fps=10)), expected)
    facts = decode_whole(data).facts
    assert (facts.height, facts.width, 3) == expected[0].shape


@pytest.mark.system
def test_ffmpegs_command_shows_the_same(tmp_path: Path) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs FFmpeg's command: apt-get install ffmpeg")
    for orientation in MATRICES:
        data = video(orientation, frames=1)
        (tmp_path / "a.mp4").write_bytes(data)
        command = ["ffmpeg", "-v", "error", "-i", "a.mp4", "-f", "image2pipe", "-c:v", "png", "-"]
        png = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
        expected, found = np.asarray(Image.open(io.BytesIO(png))), decode_clip(data, times_s=[0.0])[0]
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("orientation", MATRICES)
def test_a_new_video_is_upright(orientation: int) -> None:
    data = video(orientation)
    (part,) = plan_transcodes(decode_whole(data), short_side=None)
    made = stored(transcode(data, part))
    for found, expected in zip(made, by_pillow(stored(data), orientation), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("webm", "libvpx")])  # parts in MP4, in Matroska
@pytest.mark.parametrize("orientation", MATRICES)
def test_parts_stay_turned_and_mirrored(orientation: int, container: str, codec: str, tmp_path: Path) -> None:
    data = video(orientation, container=container, codec=codec)
    shown = by_pillow(stored(data), orientation)
    parts = cut(data, tmp_path / "a", segment_s=0.4)
    assert len(parts) == 2
    for number, part in enumerate(parts):
        assert_equal(decode_clip(part, times_s=[0.05, 0.35]), [shown[4 * number], shown[4 * number + 3]])


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
def test_pictures_are_shown_as_pillow_shows_them(form: str) -> None:
    for orientation in MATRICES:
        image, buffer = Image.fromarray(drawn()), io.BytesIO()
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB"))
        (found,) = decode_clip(buffer.getvalue(), times_s=[0.0])
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= (8 if form in ("JPEG", "MPO") else 0), orientation
        facts = decode_whole(buffer.getvalue(), images=True).facts
        assert (facts.height, facts.width, 3) == expected.shape
        assert_equal([decode_image(buffer.getvalue())], [found])
