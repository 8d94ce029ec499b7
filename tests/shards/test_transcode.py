"""Transcoded videos beside their sources, both decoded in order by PyAV; times by arithmetic on exact fractions."""

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.chain import tool
from tests.shards.test_shards_inputs import samples
from tests.video.test_decode import VARIABLE_MS, rotated, sequential
from tests.videos import encoded, number_of, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards import encode
from vjepa_scale.shards import write as write_module
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.make import Part, Settings, begin, finish, make_shards, plan, probe, write
from vjepa_scale.shards.plan import Plan
from vjepa_scale.shards.transcode import Transcode, facts_of, plan_transcodes, standard_rate
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.inspect import decode_whole, probe_video


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


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "container", "codec", "expected"),
    [
        (30, "mp4", "h264", "30"),
        (25, "matroska", "h264", "25"),
        (24, "matroska", "h264", "24"),  # 41 or 42 ms
        (Fraction(30000, 1001), "matroska", "h264", "30000/1001"),
        (Fraction(24000, 1001), "mp4", "h264", "24000/1001"),
        (60, "mpegts", "h264", "60"),
        (12, "avi", "mpeg4", "12"),
        (7, "matroska", "libvpx-vp9", "7"),
    ],
)
def test_each_frame_of_a_constant_rate_once(rate: int, container: str, codec: str, expected: str) -> None:
    data = encoded(61, rate=rate, container=container, codec=codec, gop=250)
    (part,) = planned(data)
    assert float(Fraction(part.rate)) == pytest.approx(float(Fraction(expected)), rel=1e-3)
    if int(rate) not in (7, 12):
        assert Fraction(part.rate) == Fraction(expected)
    made = transcode(data, part)
    assert numbers(made) == [k % 64 for k in range(61)]
    times = sequential(made)[0]
    assert times == pytest.approx([float(k / Fraction(part.rate)) for k in range(61)], abs=1e-9)


@pytest.mark.parametrize("fps", [None, Fraction(30), Fraction(5), Fraction(30000, 1001)])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_becomes_constant(container: str, fps: Fraction | None) -> None:
    data = encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, gop=5, container=container)
    (part,) = planned(data, fps=fps)
    rate = Fraction(part.rate)
    assert rate == (Fraction(17, 3) if fps is None else fps)
    made = transcode(data, part)
    times, _ = sequential(made)
    assert times == pytest.approx([float(k / rate) for k in range(part.frames)], abs=1e-9)
    end = sequential(data)[0][-1]
    assert end < part.frames / rate + Fraction(1, 2) / rate
    assert numbers(made) == on_screen(data, Fraction(0), rate, part.frames)


def test_the_file_is_small_plain_and_seeks_well() -> None:
    made = transcoded(encoded(95, rate=30, gop=250, options={"x264-params": "bframes=3"}))
    with av.open(io.BytesIO(made)) as container:
        (stream,) = container.streams
        assert stream.codec_context.codec.canonical_name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.has_b_frames == 0
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert all(packet.pts == packet.dts for packet in packets)
        assert [n for n, packet in enumerate(packets) if packet.is_keyframe] == [0, 30, 60, 90]
        assert all(packet.duration * packet.time_base == Fraction(1, 30) for packet in packets)
    assert made.index(b"moov") < made.index(b"mdat")  # faststart
    _, pictures = sequential(made)
    for k in (0, 29, 30, 31, 59, 60, 94):  # each group stands alone
        with av.open(io.BytesIO(made)) as container:
            stream = container.streams.video[0]
            container.seek(packets[k].pts, stream=stream)
            frames = list(container.decode(stream))
            assert frames[0].pts == packets[k - k % 30].pts
            assert np.array_equal(frames[k % 30].to_ndarray(format="rgb24"), pictures[k])


def test_sound_is_left_out_and_rates_of_sound_do_not_matter() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        video, sound = out.add_stream("h264", rate=10), out.add_stream("aac", rate=48000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * i, np.uint8), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 48000
        out.mux([*video.encode(), *sound.encode(silence), *sound.encode()])
    with av.open(io.BytesIO(transcoded(buffer.getvalue()))) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((72, 128), 36, (36, 64)),
        ((72, 128), 48, (48, 86)),  # 85.3
        ((128, 72), 37, (64, 36)),
        ((72, 128), 720, (72, 128)),  # never larger
        ((72, 128), None, (72, 128)),
        ((73, 129), None, (72, 128)),
        ((73, 129), 1000, (72, 128)),
        ((90, 50), 48, (86, 48)),  # 86.4
    ],
)
def test_sizes(size: tuple[int, int], short_side: int | None, expected: tuple[int, int]) -> None:
    data = coloured("libvpx-vp9", "yuv420p", size=size, frames=2)
    made = transcoded(data, short_side=short_side)
    assert sequential(made)[1][0].shape == (*expected, 3)


# -- colours ---------------------------------------------------------------------------------------

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


# -- parts -----------------------------------------------------------------------------------------


def test_parts_are_exact_and_need_no_keyframe() -> None:
    data = encoded(300, rate=30, gop=250)
    for start, end, first, last in ((1.0, 2.0, 30, 60), (4.7, 5.0, 141, 150), (0.04, 0.1, 1, 3), (9.5, 99.0, 285, 300)):
        (part,) = planned(data, start_s=start, end_s=end)
        assert (part.start_s, part.end_s) == (pytest.approx(first / 30), pytest.approx(last / 30))
        assert numbers(transcode(data, part)) == [k % 64 for k in range(first, last)]
    with pytest.raises(DecodeError, match="no such part"):
        planned(data, start_s=10.5)


@pytest.mark.parametrize(
    ("rate", "container"), [(Fraction(30000, 1001), "matroska"), (25, "mp4"), (Fraction(24000, 1001), "mpegts")]
)
def test_segments_hold_every_frame_once(rate: int, container: str) -> None:
    data = encoded(190, rate=rate, container=container, gop=250)
    parts = planned(data, segment_s=0.7)
    assert [a.end_s for a in parts[:-1]] == [b.start_s for b in parts[1:]]
    for n, part in enumerate(parts):
        assert part.start_s == pytest.approx(0.7 * n, abs=0.51 / rate)
    found = [number for part in parts for number in numbers(transcode(data, part))]
    assert found == [k % 64 for k in range(190)]


def test_segments_of_a_variable_rate() -> None:
    data = encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, gop=5, container="matroska")
    parts = planned(data, segment_s=0.8, fps=Fraction(10))
    for part in parts:
        expected = on_screen(data, Fraction(part.start_s).limit_denominator(1000), Fraction(10), part.frames)
        assert numbers(transcode(data, part)) == expected
    assert parts[1].start_s == 0.8  # amid a picture: no change is near
    assert parts[2].start_s == 1.6
    assert sum(part.frames for part in parts) == pytest.approx(parts[-1].end_s * 10, abs=len(parts) / 2)


def test_a_part_of_less_than_a_frame_shows_one() -> None:
    data = encoded(20, rate=10)
    (part,) = planned(data, start_s=0.41, end_s=0.42)
    assert numbers(transcode(data, part)) == [4]


@pytest.mark.parametrize(
    ("start", "end", "shown"),
    [(1.97, None, 19), (1.9999, 9.0, 19), (0.98, 1.01, 10), (1.02, 1.03, 10), (None, 0.01, 0)],
)
def test_a_part_around_one_change_of_picture_lasts_a_frame(start: float | None, end: float | None, shown: int) -> None:
    """Both ends are nearest to the same change: the part is the picture that begins there, or the last."""
    data = encoded(20, rate=10)
    (part,) = planned(data, start_s=start, end_s=end)
    assert (part.start_s, part.end_s) == (pytest.approx(shown / 10), pytest.approx((shown + 1) / 10))
    assert numbers(transcode(data, part)) == [shown]


# -- facts and checks ------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", ["30", "30000/1001", "24000/1001", "25", "12", "17/3", "1", "1/7", "240", "1000/33"])
@pytest.mark.parametrize("frames", [1, 2, 31])
def test_facts_are_known_before(fps: str, frames: int) -> None:
    data = encoded(31, rate=5)
    (part,) = planned(data, fps=Fraction(fps), end_s=float(frames / Fraction(fps)) if fps != "1/7" else None)
    part = replace(part, frames=min(part.frames, frames))
    made = encode._index_first(encode._encoded(data, part, 0.0)[0])
    assert facts_of(part) == probe_video(made)
    assert facts_of(part).duration == pytest.approx(float(part.frames / Fraction(fps)))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (29.97, "30000/1001"),
        (29.9999, "30"),
        (23.976, "24000/1001"),
        (24.001, "24"),
        (59.9401, "60000/1001"),
        (50.04, "50"),
        (15.0, "15"),
        (12.5, "25/2"),
        (119.88012, "120000/1001"),
        (0.1, "1/10"),
        (0.0001, "1/10000"),
    ],
)
def test_rates_are_standard_ones_or_fractions(fps: float, expected: str) -> None:
    assert float(standard_rate(fps)) == pytest.approx(float(Fraction(expected)), rel=1e-6)
    assert standard_rate(fps).denominator <= 10_000


def test_the_same_bytes_again_in_another_process(tmp_path: Path) -> None:
    data = encoded(70, rate=30, size=(120, 160))
    (tmp_path / "video").write_bytes(data)
    code = (
        "import hashlib, sys; from pathlib import Path; from fractions import Fraction\n"
        "from vjepa_scale.shards.encode import transcode\n"
        "from vjepa_scale.video.inspect import decode_whole\n"
        "from vjepa_scale.shards.transcode import plan_transcodes\n"
        "path = Path(sys.argv[1])\n"
        "for part in plan_transcodes(decode_whole(path), short_side=96, segment_s=1.5):\n"
        "    print(hashlib.sha256(transcode(path, part)).hexdigest())\n"
    )
    there = subprocess.run([sys.executable, "-c", code, tmp_path / "video"], capture_output=True, text=True, check=True)
    parts = planned(data, short_side=96, segment_s=1.5)
    here = [hashlib.sha256(transcode(data, part)).hexdigest() for part in parts]
    assert there.stdout.split() == here
    assert len(here) == 2


def test_other_pictures_than_were_planned_are_an_error() -> None:
    data = encoded(40, rate=20)
    (part,) = planned(data)
    with pytest.raises(DecodeError, match="not those that were probed"):
        transcode(encoded(40, rate=20, size=(48, 80)), part)
    with pytest.raises(DecodeError, match="not those that were probed"):
        transcode(data, replace(part, start_s=0.5))
    with pytest.raises(DecodeError, match=r"cannot be transcoded.*in place of"):
        encode._check(encode._index_first(encode._encoded(data, part, 0.0)[0]), replace(part, width=66), {})


def test_an_encoder_that_spoils_pictures_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = coloured("libx264", "yuv420p", frames=33)
    (part,) = planned(data)
    sound = encode._Converter.__call__
    spoilt_at = []

    def spoil(converter: encode._Converter, picture: av.VideoFrame) -> av.VideoFrame:
        frame = sound(converter, picture)
        spoilt_at.append(len(spoilt_at))
        return wrong(frame) if len(spoilt_at) >= 32 else frame

    def swapped(frame: av.VideoFrame) -> av.VideoFrame:
        planes = frame.to_ndarray()
        return av.VideoFrame.from_ndarray(np.concatenate([planes[:144], planes[180:], planes[144:180]]), "yuv420p")

    def green(frame: av.VideoFrame) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(np.zeros_like(frame.to_ndarray()), format="yuv420p")

    monkeypatch.setattr(encode._Converter, "__call__", spoil)
    for wrong in (swapped, green):  # noqa: B007 (spoil uses it)
        spoilt_at.clear()
        with pytest.raises(DecodeError, match=r"picture 32 differs by \d+"):
            transcode(data, part)


def test_where_seeking_misleads_it_decodes_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(60, rate=30, gop=10)
    (part,) = planned(data, start_s=1.2)
    expected = transcode(data, part)
    tried = []
    encoded_from = encode._encoded

    def misled(source: bytes, part: Transcode, from_s: float) -> tuple:
        tried.append(from_s)
        made = encoded_from(source, part, from_s)
        return (b"other", "0" * 16, {}) if from_s else made

    monkeypatch.setattr(encode, "_encoded", misled)
    assert transcode(data, part) == expected
    assert tried == [1.2, 0.0]


# -- shards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long video, a turned one, one of variable rate, one in yuv444p, an image, a copy, and two that are broken."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "long.mp4").write_bytes(encoded(130, rate=30, gop=250))
    (folder / "same.mp4").write_bytes((folder / "long.mp4").read_bytes())
    (folder / "turned.mp4").write_bytes(rotated(encoded(20, rate=10)))
    (folder / "variable.mkv").write_bytes(encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, container="matroska"))
    (folder / "444.mkv").write_bytes(coloured("libx264", "yuv444p", size=(49, 65)))
    (folder / "still.png").write_bytes(still_image(5, codec="png"))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    return folder


def test_shards_of_transcoded_segments(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--transcode", "32", "--segment", "2", "--shard-records", "3", "--images"]
    said = tool("make_shards", videos, out, *flags, "--workers", 2).stdout
    assert check_shards(out, decode=True, workers=1, progress=quiet) == []
    assert "8 clips" in said
    reasons = {row["path"]: row["reason"] for row in read_jsonl(out / "rejected.jsonl")}
    assert reasons == {"same.mp4": "duplicate", "empty.mp4": "zero length", "cut.mp4": "does not decode to the end"}
    clips = {(known["path"], known.get("start")): (known, clip) for known, clip in samples(out)}
    assert clips["still.png", None][1] == (videos / "still.png").read_bytes()
    for n, frames in enumerate((range(60), range(60, 120), range(120, 130))):
        known, clip = clips["long.mp4", 2.0 * n]
        assert (known["end"], known["frames"]) == (pytest.approx(frames[-1] / 30 + 1 / 30), len(frames))
        assert numbers(clip) == [k % 64 for k in frames]
        assert (known["width"], known["height"], known["fps"]) == (42, 32, pytest.approx(30))
    assert clips["turned.mp4", 0.0][0]["width"] == 32
    assert sequential(clips["444.mkv", 0.0][1])[1][0].shape == (32, 42, 3)
    manifest = Manifest.open(out)
    assert manifest.records == len(clips) == 8
    sizes = sorted(len(clip) for _, clip in clips.values())
    assert sorted(manifest.column("video.size").tolist()) == sizes  # not the estimates
    same = Settings(transcode=True, short_side=32, segment_s=2.0, shard_records=3, images=True)
    assert make_shards(videos, out, same, workers=1, progress=quiet).existed
    size_kept = replace(same, short_side=None)
    for other in (
        replace(same, short_side=48),
        size_kept,
        replace(size_kept, transcode=False),
        replace(same, fps="15"),
    ):
        with pytest.raises(UserError, match="made otherwise"):
            make_shards(videos, out, other, workers=1, progress=quiet)


def test_a_list_cuts_exactly_and_keeps_the_size(videos: Path, tmp_path: Path) -> None:
    rows = ["path,label,start,end", "long.mp4,a,0.5,1.5", "long.mp4,b,3.9,", "long.mp4,c,9,", "long.mp4,a,0.501,1.499"]
    (videos / "list.csv").write_text("\n".join(rows) + "\n")
    try:
        settings = Settings(transcode=True, fps="30000/1001")
        make_shards(videos / "list.csv", tmp_path / "out", settings, workers=1, progress=quiet)
    finally:
        (videos / "list.csv").unlink()
    made = {known["label"]: (known, clip) for known, clip in samples(tmp_path / "out")}
    assert set(made) == {"a", "b"}
    known, clip = made["a"]
    assert (known["start"], known["end"], known["width"], known["height"]) == (0.5, 1.5, 64, 48)
    assert known["fps"] == pytest.approx(30000 / 1001)
    assert numbers(clip) == on_screen((videos / "long.mp4").read_bytes(), Fraction(1, 2), Fraction(30000, 1001), 30)
    reasons = sorted(row["reason"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl"))
    assert reasons == ["duplicate", "no such part"]


@pytest.mark.parametrize("writes", [False, True])
def test_a_run_that_is_interrupted_goes_on_with_the_same_bytes(writes: bool, videos: Path, tmp_path: Path) -> None:
    settings = Settings(transcode=True, short_side=32, segment_s=1.0, shard_records=2)
    whole, again = tmp_path / "whole", tmp_path / "again"
    make_shards(videos, whole, settings, workers=2, progress=quiet)

    class Killed(Exception):
        pass

    def interrupt(doing: str, done: int, total: int) -> None:
        if done == 3 and doing == ("writing" if writes else "probing"):
            raise Killed

    with pytest.raises(Killed):
        make_shards(videos, again, settings, workers=1, progress=interrupt)
    make_shards(videos, again, settings, workers=2, progress=quiet)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_a_source_that_changes_before_it_is_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "a.mp4"
    path.write_bytes(encoded(30, rate=30))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the same length
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"changed since it was probed.*run the command again"):
        write(work, Part(0, 1), workers=1, progress=quiet)
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert make_shards(tmp_path / "videos", tmp_path / "out", Settings(transcode=True), workers=1, progress=quiet).clips


def test_what_cannot_be_encoded_is_rejected_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four is a shard of its own, and a class."""
    for n in range(4):
        (tmp_path / f"videos/class {n // 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"videos/class {n // 2}/{n}.mp4").write_bytes(encoded(10 + n, rate=10))
    settings = Settings(transcode=True, shard_records=1)
    make_shards(tmp_path / "videos", tmp_path / "whole", settings, workers=1, progress=quiet)
    whole = {known["path"]: clip for known, clip in samples(tmp_path / "whole")}
    work = begin(tmp_path / "videos", tmp_path / "out", replace(settings, shard_records=2))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    order = [record.path for shard in range(2) for _, record in Plan.open(work).records(shard)]
    spoilt = {order[0], *(path for path in order if path.startswith("class 1"))}
    sound = write_module.transcode

    def fails(path: Path, part: Transcode) -> bytes:
        if str(path.relative_to(tmp_path / "videos")) in spoilt:
            raise DecodeError("cannot be transcoded", "picture 0 differs by 9.9 of 255 levels")
        return sound(path, part)

    monkeypatch.setattr(write_module, "transcode", fails)
    for shard in range(2):
        write_module._write_shard(work, shard)
    summary = finish(work)
    kept = [path for path in order if path not in spoilt]
    assert [(known["path"], clip) for known, clip in samples(tmp_path / "out")] == [(p, whole[p]) for p in sorted(kept)]
    assert summary.rejected == {"cannot be transcoded": len(spoilt)}
    assert sorted(row["path"] for row in read_jsonl(tmp_path / "out/rejected.jsonl")) == sorted(spoilt)
    manifest = Manifest.open(tmp_path / "out")
    assert [manifest.read(r) for r in range(manifest.records)] == [whole[path] for path in kept]
    assert manifest.classes == ["class 0"]
    assert manifest.column("label").tolist() == [0] * len(kept)
    assert check_shards(tmp_path / "out", decode=True, workers=1, progress=quiet) == []


def test_where_nothing_can_be_encoded_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(encoded(10, rate=10))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    monkeypatch.setattr(encode, "_TOLERANCE", -1.0)
    write_module._write_shard(work, 0)
    with pytest.raises(UserError, match="none of 1 files can be used: 1 cannot be transcoded"):
        finish(work)
    assert not (tmp_path / "out").exists()


def test_shards_are_filled_by_an_estimate(tmp_path: Path) -> None:
    """64 × 48 pixels × 500 frames × 0.12 bits = 23 kB a clip, whatever it comes to."""
    for n in range(3):
        (tmp_path / "videos" / f"{n}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{n}.mp4").write_bytes(encoded(500 + n, rate=30))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    lines = [line for path in sorted((work.folder / "probed").iterdir()) for line in path.read_text().splitlines()]
    sizes = [record["size"] for line in lines for record in json.loads(line)["records"]]
    assert sizes == [64 * 48 * (500 + n) * 12 // 800 for n in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transcode", "15"], "make_shards.py --transcode: 15 is too small"),
        (["--transcode", "0"], "make_shards.py --transcode: 0 is too small"),
        (["--transcode", "-4"], "make_shards.py --transcode: -4 is too small"),
        (["--fps", "30"], "make_shards.py --fps: only for --transcode"),
        (["--transcode", "--fps", "0"], "make_shards.py --fps: 0 is no frame rate"),
        (["--transcode", "--fps", "fast"], "make_shards.py --fps: fast is no frame rate"),
        (["--transcode", "--trajectories", "droid"], "make_shards.py --transcode: not with --trajectories"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: list[str], message: str, videos: Path, tmp_path: Path) -> None:
    run = tool("make_shards", videos, tmp_path / "out", *flags, check=False)
    assert run.returncode == 2
    said = run.stderr
    assert said.startswith(f"error: {message}"), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_copy_and_transcode_exclude_each_other(videos: Path, tmp_path: Path) -> None:
    run = tool("make_shards", videos, tmp_path / "out", "--copy", "--transcode", 32, check=False)
    assert run.returncode == 2
    assert "not allowed with argument --copy" in run.stderr
    assert not (tmp_path / "out").exists()
