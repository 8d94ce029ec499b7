"""Pictures as they are shown.

Upright, judged by Pillow and by ffmpeg's command; with square pixels, judged by FFmpeg's scale filter.
"""

import io
import struct
import subprocess
import zlib
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from tests.video.heif import heic
from vjepa_scale.data.clips import ClipRef, pictures_of
from vjepa_scale.shards.check import _check_video
from vjepa_scale.shards.cut import checked_cut, plan_cuts
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.transcode import plan_transcodes
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import PYAV, TORCHCODEC, decode_clip
from vjepa_scale.video.inspect import decode_whole
from vjepa_scale.video.stream import decode_image, stream_pictures

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


@pytest.mark.system("ffmpeg")
def test_ffmpegs_command_shows_the_same(tmp_path: Path) -> None:
    for orientation in MATRICES:
        data = video(orientation, frames=1)
        (tmp_path / "a.mp4").write_bytes(data)
        command = ["ffmpeg", "-v", "error", "-i", "a.mp4", "-f", "image2pipe", "-c:v", "png", "-"]
        png = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
        assert_alike(decode_clip(data, times_s=[0.0]), [np.asarray(Image.open(io.BytesIO(png)))], mean=2)


@pytest.mark.parametrize("orientation", MATRICES)
def test_a_new_video_is_upright(orientation: int) -> None:
    data = video(orientation)
    (part,) = plan_transcodes(decode_whole(data), short_side=None)
    assert_alike(stored(transcode(data, part)), by_pillow(stored(data), orientation), mean=3)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("webm", "libvpx")])  # parts in MP4, in Matroska
@pytest.mark.parametrize("orientation", MATRICES)
def test_parts_stay_turned_and_mirrored(orientation: int, container: str, codec: str, tmp_path: Path) -> None:
    data = video(orientation, container=container, codec=codec)
    shown = by_pillow(stored(data), orientation)
    parts = cut(data, tmp_path / "a", segment_s=0.4)
    assert len(parts) == 2
    for number, part in enumerate(parts):
        assert_equal(decode_clip(part, times_s=[0.05, 0.35]), [shown[4 * number], shown[4 * number + 3]])


# -- pixels that are not square --------------------------------------------------------------------

WIDE, NARROW = Fraction(16, 15), Fraction(10, 11)
# The first three say it in the video itself, the others in the container alone.
ANAMORPHIC = {
    "h264": {"container": "mp4"},
    "mpeg2video": {"container": "mpegts"},
    "mpeg4": {"container": "avi"},
    "libvpx-vp9": {"container": "mp4"},
    "libsvtav1": {"container": "mp4", "size": (64, 96)},
}

# Their decoders say that colour is sampled at the left of two pixels, which the filter minds and plain conversion
# (also that of square pixels) does not.
LEFT = ("h264", "mpeg2video", "mpeg4")


def by_scale_filter(data: bytes, command: str = "scale=iw*sar:ih") -> list[Picture]:
    """All pictures of a video, as FFmpeg's filter scales them."""
    with av.open(io.BytesIO(data)) as container:
        stream, found = container.streams.video[0], []
        for frame in container.decode(stream):
            graph, aspect = av.filter.Graph(), stream.sample_aspect_ratio or 1
            size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/10"
            nodes = [graph.add("buffer", f"{size}:pixel_aspect={aspect.numerator}/{aspect.denominator}")]
            for name, arguments in (part.partition("=")[::2] for part in (*command.split(","), "format=rgb24")):
                nodes.append(graph.add(name, arguments))
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
            graph.push(frame)
            found.append(graph.pull().to_ndarray(format="rgb24"))
        return found


@pytest.mark.parametrize("decoder", [PYAV, pytest.param(TORCHCODEC, marks=pytest.mark.system("torchcodec"))])
@pytest.mark.parametrize("aspect", [WIDE, NARROW, Fraction(4, 3), Fraction(3, 4)])
@pytest.mark.parametrize("codec", ANAMORPHIC)
def test_the_width_is_multiplied_by_the_aspect_of_pixels(codec: str, aspect: Fraction, decoder: str) -> None:
    data = video(aspect=aspect, codec=codec, **ANAMORPHIC[codec])
    expected = by_scale_filter(data)
    height, width = ANAMORPHIC[codec].get("size", (48, 80))
    assert abs(expected[0].shape[1] / width - aspect) < 0.1  # MPEG-2 knows few
    found = list(stream_pictures(data, fps=10))
    assert_equal(decode_clip(data, times_s=TIMES_S, decoder=decoder), [found[i] for i in (0, 3, 7)])
    if codec in LEFT:
        assert_alike(found, expected, mean=0.6)
    else:
        assert_equal(found, expected)
    facts = decode_whole(data).facts
    assert (facts.height, facts.width, 3) == expected[0].shape == (height, facts.width, 3)


def test_it_is_the_width_as_shown() -> None:
    """As ffmpeg does, whose filters see pictures that are turned."""
    for orientation, filters in ((3, "hflip,vflip"), (6, "transpose=clock"), (7, "transpose=clock_flip")):
        data = video(orientation, aspect=Fraction(4, 3))
        expected = by_scale_filter(data, f"{filters},scale=iw*sar:ih")
        assert expected[0].shape == ((48, 106, 3) if orientation == 3 else (80, 36, 3))
        assert_alike(list(stream_pictures(data, fps=10)), expected, mean=1.5)
        facts = decode_whole(data).facts
        assert (facts.height, facts.width, 3) == expected[0].shape


@pytest.mark.system("ffmpeg")
def test_ffmpegs_command_scales_the_same(tmp_path: Path) -> None:
    for orientation, aspect in ((1, WIDE), (6, NARROW), (7, Fraction(4, 3))):
        data = video(orientation, aspect=aspect, frames=1)
        (tmp_path / "a.mp4").write_bytes(data)
        command = [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            "a.mp4",
            "-vf",
            "scale=iw*sar:ih",
            "-f",
            "image2pipe",
            "-c:v",
            "png",
            "-",
        ]
        png = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
        assert_alike(decode_clip(data, times_s=[0.0]), [np.asarray(Image.open(io.BytesIO(png)))], mean=2)


@pytest.mark.parametrize(
    "aspect", [None, Fraction(1), Fraction(640, 639), Fraction(135, 136), Fraction(10**6), Fraction(1, 99)]
)
def test_square_pixels_are_not_resampled(aspect: Fraction | None) -> None:
    """Nor nearly square ones, which are what is left of a rounded size, nor where the header is absurd."""
    data = video(aspect=aspect)
    assert_equal(list(stream_pictures(data, fps=10)), stored(data))
    assert_equal(decode_clip(data, times_s=[0.7]), stored(data)[-1:])
    assert (decode_whole(data).facts.width, decode_whole(data).facts.height) == (80, 48)


@pytest.mark.parametrize("short_side", [None, 24])
def test_a_new_video_has_square_pixels(short_side: int | None) -> None:
    for orientation, aspect, size in (
        (1, Fraction(4, 3), (48, 106)),
        (7, Fraction(4, 3), (80, 36)),
        (1, NARROW, (48, 72)),
    ):
        data = video(orientation, aspect=aspect)
        (part,) = plan_transcodes(decode_whole(data), short_side=short_side)
        made = transcode(data, part)
        with av.open(io.BytesIO(made)) as container:
            assert container.streams.video[0].sample_aspect_ratio in (None, 1)
        height, width = stored(made)[0].shape[:2]
        assert abs(width / height - size[1] / size[0]) < 0.05
        assert short_side or (height, width) == size
        shown = [Image.fromarray(picture) for picture in stream_pictures(data, fps=10)]
        small = [np.asarray(picture.resize((width, height), Image.Resampling.BOX)) for picture in shown]
        assert_alike(stored(made), small, mean=3)


def test_parts_keep_the_aspect_of_pixels(tmp_path: Path) -> None:
    for codec, more in ANAMORPHIC.items():
        data = video(aspect=WIDE, codec=codec, **more)
        parts = cut(data, tmp_path / "a", segment_s=0.4)
        pictures = [picture for part in parts for picture in stream_pictures(part, fps=10)]
        assert len(parts) == 2
        assert_equal(pictures, list(stream_pictures(data, fps=10)))
        assert_alike(pictures, by_scale_filter(data), mean=0.6)


def test_a_part_that_cannot_keep_it_is_no_part(tmp_path: Path) -> None:
    """Of ProRes, parts are in Matroska, to whose header PyAV gives no aspect."""
    assert len(cut(video(codec="prores_ks", container="mov"), tmp_path / "a", segment_s=0.4)) == 2
    with pytest.raises(DecodeError, match=r"cannot be cut by copying: .*does not say how wide pixels are"):
        cut(video(aspect=WIDE, codec="prores_ks", container="mov"), tmp_path / "a", segment_s=0.4)


def test_pixels_that_change_their_shape_are_refused() -> None:
    """Broadcasts that change between 4:3 and 16:9 at one stored size."""
    buffer, ticks = io.BytesIO(), iter(range(20))
    with av.open(buffer, "w", format="mpegts") as out:
        stream = out.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        for aspect in (WIDE, Fraction(64, 45)):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = 80, 48, "yuv420p"
            encoder.time_base, encoder.sample_aspect_ratio = Fraction(1, 10), aspect
            encoder.max_b_frames = 0
            for tick in [next(ticks) for _ in range(10)]:
                frame = av.VideoFrame.from_ndarray(drawn(tick), format="rgb24")
                frame.pts = tick
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    out.mux(packet)
            for packet in encoder.encode(None):
                packet.stream = stream
                out.mux(packet)
    with pytest.raises(DecodeError, match=r"the picture size changes inside the video: .*64/45"):
        decode_whole(buffer.getvalue())


def test_shards_of_before_are_still_sound() -> None:
    """Columns then had the size without the aspect of pixels."""
    data = video(6, aspect=WIDE)
    facts = decode_whole(data).facts
    assert not _check_video(data, asdict(facts))
    assert not _check_video(data, asdict(replace(facts, width=48)))
    assert _check_video(data, asdict(replace(facts, width=49)))


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
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


def tiff(mode: str = "RGB", **more: str | int) -> tuple[bytes, Picture]:
    """A TIFF that is on its side and has tags that have nothing to do with its pixels; and what Pillow shows of it."""
    image, buffer = Image.fromarray(drawn()).convert(mode), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "TIFF", exif=exif, copyright="of nobody", software="Pillow", dpi=(204, 98), **more)
    return buffer.getvalue(), np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB"))


TIFFS = {
    "plain": {},
    "LZW": {"compression": "tiff_lzw"},
    "deflate": {"compression": "tiff_adobe_deflate"},
    "packed": {"compression": "packbits"},
    "fax": {"mode": "1", "compression": "group4"},
    "grey": {"mode": "L"},
    "palette": {"mode": "P"},
    "alpha": {"mode": "RGBA"},
}


@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_may_have_any_tags(kind: str, tmp_path: Path) -> None:
    data, expected = tiff(**TIFFS[kind])
    (tmp_path / "a.tif").write_bytes(data)
    for source in (data, tmp_path / "a.tif"):
        facts = decode_whole(source, images=True).facts
        assert (facts.height, facts.width, 3) == expected.shape == (80, 48, 3)
        assert_equal(decode_clip(source, times_s=[0.0]), [expected])


@pytest.mark.parametrize("kind", ["LZW", "fax"])
def test_damage_inside_a_tiff_is_found(kind: str) -> None:
    data, _ = tiff(**TIFFS[kind])
    for damaged in (data[: len(data) // 2], data[:60] + bytes(60) + data[120:]):
        with pytest.raises(DecodeError, match="does not decode to the end"):
            decode_whole(damaged, images=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"compression": "jpeg"}, "JPEG inside TIFF"),  # FFmpeg makes noise of it, and says nothing
        ({"tiffinfo": {254: 1}}, "a camera's raw data"),  # a smaller copy of what is behind it: NEF, ARW
        ({"tiffinfo": {50706: b"\1\4\0\0"}}, "a camera's raw data"),  # DNG
    ],
)
def test_a_tiff_that_is_not_the_picture_is_refused(more: dict, said: str) -> None:
    data, _ = tiff(**more)
    for look in (decode_image, lambda data: decode_whole(data, images=True)):
        with pytest.raises(DecodeError, match=said):
            look(data)


@pytest.mark.parametrize("kind", ["prefixed", "empty", "zeros", "short"])
def test_a_png_may_have_any_exif(kind: str) -> None:
    """What is in it counts also behind the prefix that only JPEG has; what nobody can read does not matter."""
    image, buffer = Image.fromarray(drawn()), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "PNG")
    written = exif.tobytes()
    assert written.startswith(b"Exif\0\0")
    content = {"prefixed": written, "empty": b"", "zeros": bytes(30), "short": written[6:18]}[kind]
    chunk, at = b"eXIf" + content, 33  # behind the header
    whole = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = buffer.getvalue()[:at] + whole + buffer.getvalue()[at:]
    (expected,) = by_pillow([drawn()], 6 if kind == "prefixed" else 1)
    assert_equal([decode_image(data), *decode_clip(data, times_s=[0.0])], [expected] * 2)
    assert decode_whole(data, images=True).facts.height == expected.shape[0]
    with pytest.raises(DecodeError):
        decode_whole(data[:200], images=True)


# -- HEIC and AVIF ---------------------------------------------------------------------------------

# EXIF's orientations as HEIF says them: quarter turns counter-clockwise, then 0 top to bottom, 1 left to right.
AS_HEIF = {1: (0, None), 2: (0, 1), 3: (2, None), 4: (0, 0), 5: (1, 0), 6: (3, None), 7: (3, 0), 8: (1, None)}


def assert_a_picture(data: bytes, expected: Picture, *, mean: float = 0.0) -> None:
    """That a file is a picture, for all that look at one, and no video."""
    with pytest.raises(DecodeError, match="not a video"):
        decode_whole(data)
    facts = decode_whole(data, images=True).facts
    assert (facts.duration, facts.fps, facts.frames) == (0, 0, 1)
    assert (facts.height, facts.width, 3) == expected.shape
    shown = [*decode_clip(data, times_s=[0.0, 7.0]), decode_image(data)]
    assert shown[0] is shown[1]
    assert_alike(shown[1:], [expected] * 2, mean=mean + 1e-9)


@pytest.mark.parametrize("orientation", MATRICES)
def test_an_avif_is_the_picture_that_pillow_shows(orientation: int) -> None:
    image, buffer = Image.fromarray(drawn(0, 47, 81)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(buffer, "AVIF", exif=exif, quality=90)
    assert_a_picture(buffer.getvalue(), np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")), mean=2)


def test_the_main_picture_of_an_avif_with_alpha() -> None:
    image, buffer = Image.fromarray(drawn()).convert("RGBA"), io.BytesIO()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(buffer, "AVIF", quality=90)
    assert_a_picture(buffer.getvalue(), np.asarray(Image.open(buffer).convert("RGB")), mean=2)


def test_an_avif_in_shards_of_before_is_still_shown() -> None:
    """They have it as a video of a second, of whose frames a recipe may ask for some by number."""
    buffer = io.BytesIO()
    Image.fromarray(drawn()).save(buffer, "AVIF")
    ref = ClipRef(0, 0, "set", 0, (0.0, 1.0), 4.0, numbers=(0, 1))
    assert_equal(pictures_of(ref, buffer.getvalue()), decode_clip(buffer.getvalue(), times_s=[0.0, 1.0]))


def test_an_avif_that_moves_is_a_video() -> None:
    images, buffer = [Image.fromarray(drawn(i)) for i in range(4)], io.BytesIO()
    images[0].save(buffer, "AVIF", save_all=True, append_images=images[1:], duration=100, quality=90)
    facts = decode_whole(buffer.getvalue()).facts
    assert (facts.frames, facts.duration, facts.fps) == (4, pytest.approx(0.4), pytest.approx(10))
    assert_alike(list(stream_pictures(buffer.getvalue(), fps=10)), [drawn(i) for i in range(4)], mean=3)


@pytest.mark.parametrize("orientation", MATRICES)
def test_a_heic_is_one_picture_cut_and_upright(orientation: int) -> None:
    quarters, mirror = AS_HEIF[orientation]
    data, (decoded,) = heic([drawn(0, 64, 96)], clean=(81, 47), quarters=quarters, mirror=mirror)
    (expected,) = by_pillow([decoded[:47, :81]], orientation)
    assert_a_picture(data, expected)


def test_a_heic_of_tiles_is_the_whole_picture() -> None:
    """As phones write it: the last row and column are cut off."""
    for orientation in (1, 6, 7):
        quarters, mirror = AS_HEIF[orientation]
        whole = drawn(0, 128, 192)
        tiles = [whole[top : top + 64, left : left + 64] for top in (0, 64) for left in (0, 64, 128)]
        data, decoded = heic(tiles, columns=3, size=(170, 101), quarters=quarters, mirror=mirror)
        together = np.concatenate([np.concatenate(row, axis=1) for row in (decoded[:3], decoded[3:])])
        (expected,) = by_pillow([together[:101, :170]], orientation)
        assert_a_picture(data, expected)


def test_a_heic_that_lacks_something_is_refused() -> None:
    tiles = [drawn(i, 64, 64) for i in range(4)]
    data, _ = heic(tiles, columns=2, size=(100, 100))
    for broken, said in (
        (data[:-40], "does not decode to the end"),
        (heic(tiles, columns=2, size=(200, 100))[0], "HEIF: 128 by 128 pixels of 200 by 100"),
        (heic(tiles[:1], clean=(100, 100))[0], "HEIF: a clean aperture outside the picture"),
        (data.replace(b"grid", b"iovl"), "HEIF: an item of the kind 'iovl'"),
        (data.replace(b"dimg", b"cdsc"), "HEIF: 0 tiles for 2 rows of 2"),
        (data.replace(b"iloc", b"iloX"), "unreadable"),
        (data.replace(b"iref", b"free"), "HEIF: the description of its items is damaged"),
    ):
        with pytest.raises(DecodeError, match=said):
            decode_whole(broken, images=True)
