"""Videos from cameras, phones, cartoons and old encoders, at random times and at every frame's edges.

The judge decodes from the first frame with PyAV (judge.py), or is torchcodec, where it is installed.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from tests.video.judge import Timeline, pictures, timeline, turned, turns_clockwise
from tests.video.real_videos import PACKAGES, real_video
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip
from vjepa_scale.video.inspect import probe_video
from vjepa_scale.video.torchcodec import import_torchcodec

# What make_shards says of each: None, or its reason to leave the file out.
VERDICTS: dict[str, str | None] = dict.fromkeys(name for _, files in PACKAGES.values() for name in files) | {
    "cockatoo.mp4": "decode mismatch after seek",
    "sound.ogg": "no video stream",
    "box.mp4": "timestamps go backwards",
}
# Small files of small packages; the others wait for make test-full.
_FAST = ("realshort.mp4", "newtonscradle.gif", "motion.mov", "carphone_pristine.mp4")
# Read in the order of the file they are right; but torchcodec's seeks in an MPEG program stream land frames late, and
# it shows the next frame where one stays on screen for several ticks (Theora's repeats, AVI's), and takes the times of
# decoding, which AVI has, for those of display.
_TORCHCODEC_IS_WRONG = (
    *("hello.mpeg", "cityCC0.mpg", "hello.ogg", "tree.avi"),
    *("hello.avi", "Megamind.avi", "Megamind_bugy.avi"),
)
RANDOM_TIMES = 24


def ours(data: bytes | Path, times_s: Sequence[float]) -> list[npt.NDArray[np.uint8]]:
    """Our pictures [H, W, 3] at these ascending times."""
    return decode_clip(data, times_s=times_s)


def offsets_to_ask(line: Timeline, seed: int = 0) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Times in ticks: random ones, to be asked for alone, and edges of frames, to be asked for together.

    Edges are a tick before, at and after each frame's, of the first two seconds and of one in the middle.
    """
    draw = np.random.default_rng(seed)
    alone = [Fraction(x) for x in draw.uniform(0, line.ticks[-1] * 1.05 + 1, RANDOM_TIMES)]
    windows = []
    for begin_s, seconds in ((0.0, 2.0), (line.duration_s / 2, 1.0)):
        begin, end = (int(t / line.tick_s) for t in (begin_s, begin_s + seconds))
        edges = {tick + step for tick in line.ticks if begin <= tick < end for step in (-1, 0, 1)}
        windows.append([Fraction(edge) for edge in sorted(edges) if edge >= 0])
    return alone, [window for window in windows if window]


def assert_same_pictures(path: Path, line: Timeline) -> int:
    """How many of our pictures were compared with those of decoding in order, bit for bit."""
    alone, windows = offsets_to_ask(line)
    asked = [*([offset] for offset in alone), *windows]
    wanted = {line.frame_at(offset) for offsets in asked for offset in offsets}
    expected, data = pictures(path, wanted), path.read_bytes()
    for offsets in asked:
        shown = ours(data, [float(offset * line.tick_s) for offset in offsets])
        assert len(shown) == len(offsets)
        for offset, picture in zip(offsets, shown, strict=True):
            number = line.frame_at(offset)
            assert np.array_equal(picture, expected[number]), f"at tick {float(offset)} it is not frame {number}"
    return sum(map(len, asked))


def measured(name: str, path: Path, line: Timeline | None, verdict: str) -> str:
    if line is None:
        return f"{name}, {path.stat().st_size / 1e6:.1f} MB: {verdict}"
    rate = "variable rate" if line.varies else "constant rate"
    size = next(iter(pictures(path, {0}).values())).shape
    return (
        f"{name}, {path.stat().st_size / 1e6:.1f} MB, {line.codec} {line.pixels} {size[1]}x{size[0]}, {rate}, "
        f"turned {90 * turns_clockwise(path)}, {len(line.ticks)} frames, {line.duration_s:.1f} s: {verdict}"
    )


def videos_to_test(*, accepted: bool) -> list:
    names = [name for name, reason in VERDICTS.items() if (reason is None) == accepted]
    return [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", videos_to_test(accepted=True))
def test_pictures_of_real_videos(name: str, record_property) -> None:
    path = real_video(name)
    line = timeline(path)
    check_facts(path, line)
    compared = assert_same_pictures(path, line)
    record_property("measured", measured(name, path, line, f"accepted, {compared} pictures equal"))


def check_facts(path: Path, line: Timeline) -> None:
    facts = probe_video(path)
    height, width, _ = pictures(path, {0})[0].shape
    assert (facts.frames, facts.width, facts.height) == (len(line.ticks), width, height)
    assert facts.duration == pytest.approx(line.duration_s, abs=1e-6)
    spread = float((line.ticks[-1] - line.ticks[0]) * line.tick_s)
    assert facts.fps == pytest.approx((len(line.ticks) - 1) / spread)


@pytest.mark.parametrize("name", videos_to_test(accepted=False))
def test_real_videos_that_are_left_out(name: str, record_property) -> None:
    path = real_video(name)
    with pytest.raises(DecodeError) as caught:
        probe_video(path)
    assert caught.value.reason == VERDICTS[name]
    {
        "decode mismatch after seek": assert_wrong_after_seek,
        "no video stream": assert_no_video,
        "timestamps go backwards": assert_backwards,
    }[caught.value.reason](path)
    line = None if caught.value.reason == "no video stream" else timeline(path)
    record_property("measured", measured(name, path, line, str(caught.value)))


def assert_wrong_after_seek(path: Path) -> None:
    """PyAV alone, asked to seek to the middle, gives another picture for the same frame."""
    line = timeline(path)
    number = len(line.ticks) // 2
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        container.seek(line.ticks[number] + (stream.start_time or 0), stream=stream)
        wanted = (stream.start_time or 0) + line.ticks[number]
        after_seek = next(frame for frame in container.decode(stream) if frame.pts == wanted)
        difference = after_seek.to_ndarray(format="rgb24") - pictures(path, {number})[number].astype(np.int64)
    assert np.abs(difference).mean() > 5  # not rounding: it is garbage


def assert_no_video(path: Path) -> None:
    with av.open(str(path)) as container:
        assert not container.streams.video
        assert container.streams.audio


def assert_backwards(path: Path) -> None:
    assert min(timeline(path).gaps) <= 0


# -- what no real video above has -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turns"),
    [("realshort.mp4", n) for n in (1, 2, 3)] + [pytest.param("phone.mp4", n, marks=pytest.mark.slow) for n in (1, 3)],
)
def test_a_phone_held_otherwise(name: str, turns: int, tmp_path: Path, record_property) -> None:
    stored = real_video(name)
    path = tmp_path / f"turned {turns}.mp4"
    path.write_bytes(turned(stored.read_bytes(), turns))
    assert (turns_clockwise(stored), turns_clockwise(path)) == (0, turns)
    line = timeline(path)
    check_facts(path, line)
    assert_same_pictures(path, line)
    (upright,), (as_stored,) = ours(path, [0.5]), ours(stored, [0.5])
    height, width, _ = as_stored.shape
    assert upright.shape[:2] == ((width, height) if turns % 2 else (height, width))
    # Clockwise by hand: the left column, from its foot up, is the top row; or all is upside down; or the right column.
    top = {1: as_stored[::-1, 0], 2: as_stored[-1, ::-1], 3: as_stored[:, -1]}[turns]
    assert np.array_equal(upright[0], top)
    record_property("measured", measured(f"{name} turned", path, line, "accepted, pictures equal"))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_chroma_of_full_size(container: str, tmp_path: Path, record_property) -> None:
    """cockatoo.mp4 is yuv444p and cannot be sought in: encoded again, it can. Times are another real video's."""
    path = tmp_path / "cockatoo"
    times = [1000 * tick for tick in timeline(real_video("newtonscradle.gif")).ticks]
    with av.open(str(real_video("cockatoo.mp4"))) as source, av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast", "x264-params": "bframes=2"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv444p"
        stream.codec_context.gop_size, stream.codec_context.time_base = 12, Fraction(1, 90_000)
        for pts, frame in zip(times, source.decode(video=0), strict=False):
            smaller = frame.reformat(width=640, height=360, format="yuv444p")
            smaller.pts, smaller.time_base = pts, Fraction(1, 90_000)
            out.mux(stream.encode(smaller))
        out.mux(stream.encode())
    line = timeline(path)
    assert (line.pixels, len(line.ticks)) == ("yuv444p", len(times))
    assert line.varies
    check_facts(path, line)
    assert_same_pictures(path, line)
    record_property("measured", measured(f"cockatoo.{container}", path, line, "accepted, pictures equal"))


# -- another decoder --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.system("torchcodec")
@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("name", [n for n, reason in VERDICTS.items() if not reason and n not in _TORCHCODEC_IS_WRONG])
def test_torchcodec_shows_the_same(name: str, turns: int, tmp_path: Path, record_property) -> None:
    decoders = import_torchcodec()
    path = real_video(name)
    if turns:
        if path.suffix != ".mp4":
            return  # only MP4 is turned here
        (tmp_path / name).write_bytes(turned(path.read_bytes(), turns))
        path = tmp_path / name
    line = timeline(path)
    judge = decoders.VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
    with av.open(str(path)) as container:
        start = container.streams.video[0].start_time or 0
    furthest = 0.0
    # It shows nothing before the first frame nor after the last.
    for offset in np.random.default_rng(1).uniform(max(0, line.ticks[0]), line.ticks[-1], 12):
        frame = judge.get_frame_played_at(float((Fraction(offset) + start) * line.tick_s))
        assert round(frame.pts_seconds / float(line.tick_s)) - start == line.ticks[line.frame_at(offset)]
        (picture,) = ours(path, [float(offset) * float(line.tick_s)])
        as_stored = av.VideoFrame.from_ndarray(frame.data.numpy(), format="rgb24")
        size = {"height": picture.shape[0], "width": picture.shape[1]}  # torchcodec leaves pixels as they are stored
        same_size = as_stored.reformat(interpolation="BICUBIC", **size).to_ndarray()
        furthest = max(furthest, float(np.abs(picture.astype(np.int64) - same_size).mean()))
    # It may use another FFmpeg, and what is lost of a damaged slice (hello.avi) each version paints in its own way.
    # Where pixels are not square, ours are scaled in YUV, the judge's in RGB.
    assert furthest < (1 if picture.shape == frame.data.shape else 2)
    record_property("measured", f"{name}: up to {furthest:.2f} of 255 on average")
