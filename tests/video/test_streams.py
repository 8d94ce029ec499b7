"""Files with several video streams: the film that players show is taken, by every way of decoding."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.videos import number_of, picture
from vjepa_scale.video.container import open_container, shown_stream
from vjepa_scale.video.decode import decode_clip, times_of_frames
from vjepa_scale.video.inspect import probe_video
from vjepa_scale.video.stream import stream_pictures

SMALL, LARGE = (48, 64), (96, 128)
DEFAULT, NOTHING = Disposition.default, Disposition(0)


def streams(*rows: tuple, container: str = "mov", options: dict[str, str] | None = None) -> bytes:
    """A file with a video stream for each row: codec, size, number of the first picture, frames, disposition."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as out:
        made = []
        for codec, (height, width), first, frames, disposition in rows:
            stream = out.add_stream(codec, rate=10)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            made.append((stream, first, frames))
        packets = []
        for stream, first, frames in made:
            for i in range(frames):
                image = picture(first + i, stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                packets += stream.encode(frame)
            packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return buffer.getvalue()


def still(size: tuple[int, int], disposition: Disposition) -> tuple:
    return ("mjpeg", size, 63, 1, disposition)


def film(size: tuple[int, int], first: int, disposition: Disposition) -> tuple:
    return ("mpeg4", size, first, 12, disposition)


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
CASES = {
    "a still before the film": ([still(SMALL, NOTHING), film(SMALL, 8, DEFAULT)], {}),
    "a larger still before, both shown": ([still(LARGE, DEFAULT), film(SMALL, 8, DEFAULT)], {}),
    "the still alone is shown by default": ([still(LARGE, DEFAULT), film(SMALL, 8, NOTHING)], {}),
    "a still in a file that declares no counts": (
        [still(LARGE, DEFAULT), film(SMALL, 8, DEFAULT)],
        {"options": FRAGMENTED},
    ),
    "a still in Matroska": ([still(LARGE, DEFAULT), film(SMALL, 8, DEFAULT)], {"container": "matroska"}),
    "the second is shown by default": ([film(LARGE, 30, NOTHING), film(SMALL, 8, DEFAULT)], {}),
    "the second in Matroska": ([film(LARGE, 30, NOTHING), film(SMALL, 8, DEFAULT)], {"container": "matroska"}),
    "the larger of two": ([film(SMALL, 30, DEFAULT), film(LARGE, 8, DEFAULT)], {}),
    "the first of two equal ones": ([film(SMALL, 8, DEFAULT), film(SMALL, 30, DEFAULT)], {}),
}


@pytest.mark.parametrize("decoder", ["pyav", pytest.param("torchcodec", marks=pytest.mark.system("torchcodec"))])
@pytest.mark.parametrize("case", CASES)
def test_the_film_is_taken(case: str, decoder: str) -> None:
    rows, how = CASES[case]
    data = streams(*rows, **how)
    shown = decode_clip(data, times_s=[0.0, 0.55, 1.1], decoder=decoder)
    assert [number_of(image) for image in shown] == [8, 13, 19]


@pytest.mark.parametrize("case", CASES)
def test_it_is_probed_numbered_and_played(case: str) -> None:
    rows, how = CASES[case]
    data = streams(*rows, **how)
    facts = probe_video(data)
    (height, width) = next(size for _, size, first, *_ in rows if first == 8)
    assert (facts.frames, facts.width, facts.height) == (12, width, height)
    assert times_of_frames(data, [5]) == pytest.approx([0.5])
    assert [number_of(image) for image in stream_pictures(data, fps=5.0)] == list(range(8, 20, 2))


@pytest.mark.parametrize("kind", ["dependent", "still_image", "timed_thumbnails"])
def test_what_only_accompanies_a_film_is_not_taken(kind: str) -> None:
    """No muxer here writes these, but demuxers tell of them."""
    data = streams(film(LARGE, 30, DEFAULT), film(SMALL, 8, NOTHING))
    with open_container(data) as container:
        assert shown_stream(container, data) is container.streams[0]
        container.streams[0].disposition |= Disposition[kind]
        assert shown_stream(container, data) is container.streams[1]


def test_cover_art_is_no_video() -> None:
    """Nor where it comes first and is the only stream."""
    data = streams(still(LARGE, DEFAULT), film(SMALL, 8, DEFAULT))
    with open_container(data) as container:
        container.streams[0].disposition |= Disposition.attached_pic
        assert shown_stream(container, data) is container.streams[1]
        container.streams[1].disposition |= Disposition.attached_pic
        assert shown_stream(container, data) is None


def test_a_still_alone_is_as_before() -> None:
    """One track of one picture: a video of one frame."""
    data = streams(still(SMALL, DEFAULT))
    assert probe_video(data).frames == 1
    assert np.unique(decode_clip(data, times_s=[0.0])[0]).size > 1
