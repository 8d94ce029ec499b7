"""torchcodec's pictures, against PyAV's of the same file: each brings its own FFmpeg."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.test_loader import assert_same, batches, recipe_for
from tests.video.test_decode import FILES, VARIABLE_MS, WINDOWS, regular, rotated, sequential
from tests.videos import audio_only, encoded, number_of, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip
from vjepa_scale.video.inspect import probe_video
from vjepa_scale.video.torchcodec import import_torchcodec, torchcodec_pictures

pytestmark = pytest.mark.system("torchcodec")

# Levels of 256: two versions of FFmpeg's swscale convert to RGB. Those of today's constraints agree to the bit.
TOLERANCE = 2


def clip(data: bytes, times_s: list[float], decoder: str = "torchcodec") -> list[np.ndarray]:
    return decode_clip(data, times_s=times_s, decoder=decoder)


def worst(a: list[np.ndarray], b: list[np.ndarray]) -> int:
    """The largest difference of two clips' pixels."""
    return max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("start_s", "fps", "frames"), WINDOWS)
def test_pictures_are_those_on_screen(kind: str, start_s: float, fps: float, frames: int) -> None:
    data = FILES[kind]()
    times, pictures = sequential(data)
    wanted = regular(start_s, fps, frames)
    expected = [pictures[max((i for i, t in enumerate(times) if t <= s + 1e-9), default=0)] for s in wanted]
    assert worst(clip(data, wanted), expected) <= TOLERANCE


def test_it_is_torchcodec_that_decodes() -> None:
    """And PyAV where torchcodec shows other pictures, or none."""
    decoded = [kind for kind, make in FILES.items() if torchcodec_pictures(make(), [0.5]) is not None]
    assert decoded == [kind for kind in FILES if kind.startswith(("mp4", "mkv"))]
    assert number_of(clip(still_image(5), [0.0, 3.0])[1]) == 5


def test_a_picture_that_stays_is_one_array(tmp_path: Path) -> None:
    data = encoded(18, pts_ms=VARIABLE_MS, gop=4)
    (tmp_path / "video.jpg").write_bytes(data)  # the name says nothing
    for source in (data, tmp_path / "video.jpg"):
        pictures = decode_clip(source, times_s=[0.5, 0.6, 0.9, 3.1, 9.0], decoder="torchcodec")
        assert [number_of(image) for image in pictures] == [7, 7, 8, 17, 17]
        assert pictures[0] is pictures[1]
        assert pictures[3] is pictures[4]
        assert pictures[1] is not pictures[2]


def coloured(pix_fmt: str, size: tuple[int, int]) -> bytes:
    """Ten frames of smooth colours."""
    buffer = io.BytesIO()
    y, x = np.mgrid[: size[0], : size[1]]
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for i in range(10):
            image = np.stack([y * 2 + 9 * i, x * 2, 3 * (x + y)], axis=-1) % 256
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [
        ("yuv444p", (48, 64)),
        ("yuv420p", (50, 70)),
        ("yuv422p", (46, 38)),
        ("yuv444p", (45, 33)),
    ],
)
def test_other_pixel_formats_and_odd_sizes(pix_fmt: str, size: tuple[int, int]) -> None:
    data = coloured(pix_fmt, size)
    times_s = [0.0, 0.35, 0.9]
    found = clip(data, times_s)
    assert found[0].shape == (*size, 3)
    assert worst(found, clip(data, times_s, "pyav")) <= TOLERANCE
    assert worst(found, found[1:] + found[:1]) > 5  # pictures that differ


def test_ten_bits_per_pixel() -> None:
    """Here the two resample colour differently: at sharp edges by some levels, hardly on average."""
    data = coloured("yuv420p10le", (48, 64))
    found, expected = clip(data, [0.0, 0.35, 0.9]), clip(data, [0.0, 0.35, 0.9], "pyav")
    assert np.abs(np.stack(found).astype(int) - np.stack(expected)).mean() < 2


def test_rotation_metadata_is_honoured() -> None:
    data = rotated(encoded(8, rate=4, gop=1))
    found = clip(data, [0.75, 1.0])
    assert found[0].shape == (64, 48, 3)
    assert worst(found, clip(data, [0.75, 1.0], "pyav")) <= TOLERANCE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero length"),
        (b"these are not the frames you are looking for\n" * 40, "unreadable"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "unreadable"),
        (audio_only(), "no video stream"),
        (encoded(60)[:2000], "unreadable"),
        (encoded(60, faststart=True)[:-1200], "does not decode to the end"),
    ],
    ids=["empty", "text", "playlist", "audio", "mp4 without index", "faststart mp4 cut"],
)
def test_errors_have_pyavs_reasons(data: bytes, reason: str) -> None:
    for decoder in ("pyav", "torchcodec"):
        with pytest.raises(DecodeError) as caught:
            clip(data, [0.2, 1.95], decoder)
        assert caught.value.reason == reason


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_damage_never_makes_two_clips_of_one(container: str) -> None:
    """What make_shards would let in is the same for both, or an error of one."""
    good = encoded(60, rate=30, container=container)
    rng, times_s, compared, failed = np.random.default_rng(0), regular(0.2, 4, 6), 0, 0
    for _ in range(80):
        damaged = bytearray(good)
        at, count = int(rng.integers(200, len(good) - 60)), int(rng.integers(1, 20))
        damaged[at : at + count] = rng.integers(0, 256, count, np.uint8).tobytes()
        try:
            probe_video(bytes(damaged))
            ours = clip(bytes(damaged), times_s, "pyav")
            theirs = clip(bytes(damaged), times_s)
        except DecodeError:
            failed += 1
            continue
        assert worst(ours, theirs) <= TOLERANCE
        compared += 1
    assert compared > 5
    assert failed > 5


def test_workers_with_torchcodec_give_pyavs_batches(shards: Manifest) -> None:
    by_torchcodec = batches(shards, recipe=recipe_for(shards, decoder="torchcodec", workers=2))
    assert_same(by_torchcodec, batches(shards, recipe=recipe_for(shards)))


def test_without_torchcodec_the_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match="torchcodec") as caught:
        import_torchcodec()
    assert str(caught.value.where) == "data.decoder"
    assert "data.decoder=pyav" in str(caught.value)
