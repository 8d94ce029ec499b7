"""Pictures as they are shown.

Upright, judged by Pillow and by ffmpeg's command; with square pixels, judged by FFmpeg's scale filter.
"""

import io
import subprocess
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.video.display import (
    MATRICES,
    TIMES_S,
    Picture,
    assert_alike,
    assert_equal,
    by_pillow,
    cut,
    drawn,
    stored,
    video,
)
from vjepa_scale.shards.check import _check_video
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.transcode import plan_transcodes
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import PYAV, TORCHCODEC, decode_clip
from vjepa_scale.video.inspect import decode_whole
from vjepa_scale.video.stream import stream_pictures

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
