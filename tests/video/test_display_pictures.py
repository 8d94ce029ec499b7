"""Pictures (JPEG, PNG, TIFF, WebP, HEIC, AVIF) are shown as Pillow shows them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.video.display import MATRICES, Picture, assert_alike, assert_equal, by_pillow, drawn
from tests.video.heif import heic
from vjepa_scale.data.clips import ClipRef, pictures_of
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip
from vjepa_scale.video.inspect import decode_whole
from vjepa_scale.video.stream import decode_image, stream_pictures

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
