"""Transcoded videos beside their sources, both decoded in order by PyAV; times by arithmetic on exact fractions."""

import hashlib
import io
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.shards.transcoding import coloured, numbers, on_screen, planned, transcoded
from tests.video.test_decode import VARIABLE_MS, sequential
from tests.videos import encoded
from vjepa_scale.shards import encode
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.transcode import Transcode, facts_of, standard_rate
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.inspect import probe_video

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
