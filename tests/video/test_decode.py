"""Sampling by time, against plain sequential decoding by PyAV."""

import io

import av
import numpy as np
import pytest

from tests.videos import audio_only, encoded, number_of
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip
from vjepa_scale.video.inspect import probe_video

VARIABLE_MS = [0, 20, 70, 170, 190, 400, 420, 430, 900, 1300, 1333, 1350, 1500, 2100, 2105, 2200, 2950, 3000]
FILES = {
    "mp4 constant rate": lambda: encoded(60, rate=30),
    "mp4 one keyframe": lambda: encoded(60, rate=24, gop=250),
    "mp4 variable rate": lambda: encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, gop=4),
    "mkv variable rate": lambda: encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, gop=5, container="matroska"),
    "mpegts, which starts late": lambda: encoded(60, rate=25, container="mpegts"),
    "avi mpeg4, one tick a frame": lambda: encoded(60, rate=30, container="avi", codec="mpeg4"),
    "mpeg program stream, which seeks badly": lambda: encoded(60, rate=25, container="mpeg", codec="mpeg1video"),
    "mpeg2 in avi": lambda: encoded(40, rate=25, container="avi", codec="mpeg2video"),
    "mkv vp9": lambda: encoded(40, rate=10, container="webm", codec="libvpx-vp9", options={"cpu-used": "8"}),
}


def sequential(data: bytes) -> tuple[list[float], list[np.ndarray]]:
    """Every frame's time from the stream's start and its pixels, by decoding in order.

    AVI has times of packets: the first picture that comes out takes the first, and so on.
    """
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        start = stream.start_time * stream.time_base
        ticks = [f.pts for f in frames]
        if container.format.name == "avi":
            container.seek(0)
            ticks = [packet.dts for packet in container.demux(stream) if packet.size]
        times = [float(tick * stream.time_base - start) for tick in ticks]
        return times, [f.to_ndarray(format="rgb24") for f in frames]


WINDOWS = [(0, 4, 8), (0, 30, 16), (0.61, 4, 4), (1.3, 10, 6), (1.9, 4, 9)]


def regular(start_s: float, fps: float, frames: int) -> list[float]:
    return [start_s + k / fps for k in range(frames)]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("start_s", "fps", "frames"), WINDOWS)
def test_pictures_are_those_on_screen(kind: str, start_s: float, fps: float, frames: int) -> None:
    data = FILES[kind]()
    times, pictures = sequential(data)
    clip = decode_clip(data, times_s=regular(start_s, fps, frames))
    assert [(image.shape, image.dtype) for image in clip] == [((48, 64, 3), np.uint8)] * frames
    for k in range(frames):
        on_screen = max((i for i, t in enumerate(times) if t <= start_s + k / fps + 1e-9), default=0)
        assert np.array_equal(clip[k], pictures[on_screen]), f"picture {k}: {number_of(clip[k])} is not {on_screen}"


def test_the_numbers_in_the_pictures_agree() -> None:
    """No decoder on the judge's side: frame i of 30 a second is on screen at i/30 s."""
    clip = decode_clip(encoded(60, rate=30), times_s=regular(0.5, 4, 6))
    assert [number_of(image) for image in clip] == [15, 22, 30, 37, 45, 52]
    clip = decode_clip(encoded(18, pts_ms=VARIABLE_MS, gop=4), times_s=regular(0.1, 4, 8))
    assert [number_of(image) for image in clip] == [2, 4, 7, 7, 8, 11, 12, 12]  # 100, 350, 600, … ms


def test_past_the_end_the_last_frame_repeats() -> None:
    clip = decode_clip(encoded(10, rate=10), times_s=regular(0.8, 4, 5))
    assert [number_of(image) for image in clip] == [8, 9, 9, 9, 9]
    assert clip[1] is clip[4]
    assert [number_of(image) for image in decode_clip(encoded(10, rate=10), times_s=[7, 7.25])] == [9, 9]


def rotated(data: bytes) -> bytes:
    """The same mp4 with the display matrix of a quarter turn clockwise (what phones write for upright video)."""
    at = data.index(b"tkhd") + 4 + 40
    unit, turn = (1 << 16).to_bytes(4, "big"), b"".join
    identity = turn([unit, bytes(4), bytes(4), bytes(4), unit])
    assert data[at : at + 20] == identity
    quarter = turn([bytes(4), unit, bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True), bytes(4)])
    # Corner of the turned picture: its height becomes the x offset.
    return data[:at] + quarter + bytes(4) + (48 << 16).to_bytes(4, "big") + data[at + 28 :]


def test_rotation_metadata_is_honoured() -> None:
    data = encoded(4, rate=4, gop=1)
    upright, turned = (decode_clip(d, times_s=[0.75])[0] for d in (data, rotated(data)))
    assert turned.shape == (64, 48, 3)
    # Clockwise: what was the left column is the top row.
    assert np.array_equal(turned[0], upright[::-1, 0])
    facts = probe_video(rotated(data))
    assert (facts.width, facts.height) == (48, 64)


def test_facts() -> None:
    facts = probe_video(encoded(60, rate=30))
    assert facts.frames == 60
    assert facts.duration == pytest.approx(2.0, abs=1e-3)
    assert facts.fps == pytest.approx(30)
    assert (facts.width, facts.height) == (64, 48)
    facts = probe_video(encoded(18, pts_ms=VARIABLE_MS, container="matroska"))
    assert facts.frames == 18
    assert facts.fps == pytest.approx(17 / 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero length"),
        (b"these are not the frames you are looking for\n" * 40, "unreadable"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "unreadable"),
        (audio_only(), "no video stream"),
        (encoded(60)[:2000], "unreadable"),
        (encoded(60, faststart=True)[:-1200], "does not decode to the end"),
        (encoded(60, container="matroska")[:-1200], "does not decode to the end"),
        (encoded(60, container="avi", codec="mpeg4")[:-5000], "does not decode to the end"),
    ],
    ids=["empty", "text", "playlist", "audio", "mp4 without index", "faststart mp4 cut", "mkv cut", "avi cut"],
)
def test_what_is_no_video_is_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        probe_video(data)
    assert caught.value.reason == reason


def test_an_image_is_not_a_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        out.mux(stream.encode(av.VideoFrame(64, 48, "rgb24")))
        out.mux(stream.encode())
    with pytest.raises(DecodeError, match="not a video"):
        probe_video(buffer.getvalue())


def test_every_kind_of_good_file_is_accepted() -> None:
    for kind, make in FILES.items():
        assert probe_video(make()).frames in (18, 40, 60), kind
