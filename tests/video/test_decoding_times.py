"""Files that tell only when packets are decoded (AVI, ASF, bare MPEG): picture i comes on screen at i / 25 s.

The judge is the picture, in which its number is written; of what ffmpeg plays, the order.
"""

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.video.test_decode import sequential
from tests.videos import encoded, number_of
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.remux import checked_cut, plan_cuts
from vjepa_scale.shards.transcode import plan_transcodes
from vjepa_scale.video.decode import decode_clip, times_of_frames
from vjepa_scale.video.inspect import decode_whole, probe_video
from vjepa_scale.video.stream import stream_pictures

FRAMES, RATE = 40, 25
OPEN = "open-gop=1:bframes=2:keyint=12:min-keyint=12:scenecut=0"


def made(container: str, codec: str, **options: str) -> Callable[[], bytes]:
    return lambda: encoded(FRAMES, rate=RATE, gop=12, container=container, codec=codec, options=options)


def chunks_of(b_frames: int) -> list[bytes]:
    """MPEG-4 as it lies in an AVI: a packet for each picture, in the order of decoding."""
    data = encoded(FRAMES, rate=RATE, gop=12, container="avi", codec="mpeg4", options={"bf": str(b_frames)})
    with av.open(io.BytesIO(data)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def packed(chunks: list[bytes]) -> list[bytes]:
    """B-frames packed as DivX and Xvid do: the first of a run with the picture that it needs, a stand-in in its place.

    VOP_coding_type, the two bits behind the start code of a picture, is 2 for B.
    """
    out = list[bytes]()
    mark = b"\0\0\1\xb2DivX503b1393p"
    chunks = [chunks[0].replace(b"\0\0\1\xb6", mark + b"\0\0\1\xb6"), *chunks[1:]]
    run = list[bytes]()
    for chunk in [*chunks, None]:
        is_b = chunk is not None and chunk[chunk.index(b"\0\0\1\xb6") + 4] >> 6 == 2
        if is_b:
            run.append(chunk)
            continue
        if len(run) > 1:
            run = [run[0] + run[1], *run[2:], b"\0\0\1\xb6\x51\x7f"]
        out += run
        run = [] if chunk is None else [chunk]
    assert len(out) == len(chunks)
    return out


def muxed(chunks: list[bytes], container: str) -> bytes:
    """Chunk i at i / 25 s, in the order of decoding."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, RATE)
            packet.is_keyframe = chunk[chunk.index(b"\0\0\1\xb6") + 4] >> 6 == 0
            out.mux(packet)
    return buffer.getvalue()


def matroska_of_avi(chunks: list[bytes]) -> bytes:
    """As mkvmerge copies an AVI: V_MS/VFW/FOURCC with a BITMAPINFOHEADER, and the times of decoding."""
    data = muxed(chunks, "matroska")
    with av.open(io.BytesIO(data)) as container:
        private = container.streams.video[0].codec_context.extradata
    header = struct.pack("<IiiHH4sIiiII", 40, 64, 48, 1, 24, b"XVID", 0, 0, 0, 0, 0)
    data = data.replace(private, header.ljust(len(private), b"\0"), 1)
    return data.replace(b"V_MPEG4/ISO/ASP", b"V_MS/VFW/FOURCC", 1)


KINDS: dict[str, Callable[[], bytes]] = {
    "h264 in AVI": made("avi", "h264", bf="0"),
    "h264 in AVI, B-frames": made("avi", "h264", bf="2"),
    "h264 in AVI, B-frames on B-frames": made("avi", "h264", bf="3", x264opts="b-pyramid=normal:b-adapt=0"),
    "h264 in AVI, open groups": made("avi", "h264", **{"x264-params": OPEN}),
    "h264 in ASF, B-frames": made("asf", "h264", bf="2"),
    "mpeg4 in AVI": made("avi", "mpeg4"),
    "mpeg4 in AVI, B-frames": made("avi", "mpeg4", bf="2"),
    "mpeg4 in AVI, packed B-frames": lambda: muxed(packed(chunks_of(2)), "avi"),
    "mpeg4 in AVI, pairs packed": lambda: muxed(packed(chunks_of(1)), "avi"),
    "mpeg4 in Matroska from AVI": lambda: matroska_of_avi(chunks_of(2)),
    "mpeg4 in Matroska from AVI, packed": lambda: matroska_of_avi(packed(chunks_of(2))),
    "mpeg2 in AVI": made("avi", "mpeg2video", bf="2"),
    "mpeg2 alone": made("mpeg2video", "mpeg2video", bf="2"),
    "mpeg1 alone": made("mpeg1video", "mpeg1video", bf="2"),
    "wmv2 in ASF": made("asf", "wmv2"),
    "vp8 in IVF, whose header counts milliseconds": lambda: encoded(
        FRAMES, pts_ms=[i * 1000 // RATE for i in range(FRAMES)], container="ivf", codec="libvpx"
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def video(request: pytest.FixtureRequest) -> bytes:
    return KINDS[request.param]()


def test_every_frame_comes_at_its_time(video: bytes) -> None:
    facts = probe_video(video)
    assert (facts.frames, facts.fps) == (FRAMES, pytest.approx(RATE))
    assert facts.duration == pytest.approx(FRAMES / RATE, abs=2e-3)
    middles = [(i + 0.5) / RATE for i in range(FRAMES)]
    assert [number_of(picture) for picture in decode_clip(video, times_s=middles)] == list(range(FRAMES))
    for i, time_s in enumerate(middles):  # each alone, so that it is sought
        assert number_of(decode_clip(video, times_s=[time_s])[0]) == i
    assert [number_of(picture) for picture in stream_pictures(video, fps=RATE)] == list(range(FRAMES))
    assert times_of_frames(video, range(FRAMES)) == pytest.approx([i / RATE for i in range(FRAMES)], abs=2e-3)


@pytest.mark.system("torchcodec")
def test_torchcodec_is_not_asked_where_it_would_guess(video: bytes) -> None:
    clip = decode_clip(video, times_s=[0.5 / RATE, 13.5 / RATE, 30.5 / RATE], decoder="torchcodec")
    assert [number_of(picture) for picture in clip] == [0, 13, 30]


COPIED = ["h264 in AVI", "h264 in AVI, B-frames", "mpeg4 in AVI", "h264 in ASF, B-frames"]


@pytest.mark.parametrize("kind", COPIED)
def test_parts_keep_their_times(kind: str, tmp_path: Path) -> None:
    """Copied into a container that tells when pictures are shown, and encoded anew."""
    path = tmp_path / "video"
    path.write_bytes(KINDS[kind]())
    decoded = decode_whole(path)
    cuts = plan_cuts(path, decoded, start_s=None, end_s=None, segment_s=0.6)
    assert cuts is not None
    parts = [checked_cut(path, decoded, cut) for cut in cuts]
    assert len(cuts) > 2
    numbers = []
    for data, facts in parts:
        assert facts.fps == pytest.approx(RATE)
        numbers += [number_of(picture) for picture in sequential(data)[1]]
    assert numbers == list(range(FRAMES))
    (plan,) = plan_transcodes(decoded, short_side=None)
    assert [number_of(picture) for picture in sequential(transcode(path, plan))[1]] == list(range(FRAMES))
