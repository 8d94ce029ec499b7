"""What damage looks like that no decoder complains of, and what looks like damage and is none."""

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from tests.video.test_decode import sequential
from tests.videos import encoded, picture
from vjepa_scale.video.container import DecodeError, open_video
from vjepa_scale.video.decode import pictures_at, timed_frames
from vjepa_scale.video.inspect import decode_whole, probe_video


def avi(numbers: list[int], ticks: list[int], *, gop: int) -> bytes:
    """MPEG-4 in AVI at 25 ticks a second: these pictures, each at its tick."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        for number, tick in zip(numbers, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def chunks(data: bytes) -> list[int]:
    """Where the chunks of the video begin in an AVI, then the rows of its index."""
    return [i for i in range(len(data)) if data.startswith(b"00dc", i)]


def test_a_lost_packet_after_which_index_and_order_disagree() -> None:
    """The same picture stands in the middle and at the end, where a difference of one frame cannot be seen."""
    numbers = [*range(20), *[40] * 20, *range(20), *[40] * 6]
    data = avi(numbers, list(range(len(numbers))), gop=5)
    assert probe_video(data).frames == len(numbers)
    lost = chunks(data)[41]
    damaged = data[:lost] + bytes(8) + data[lost + 8 :]  # not what a chunk begins with: looked for further on
    times, shown = sequential(damaged)
    assert len(shown) == len(numbers) - 1
    # Plain PyAV, too, seeks to a picture that is not the one in order there.
    at = next(i for i in range(45, 60) if i % 5 == 0)
    (sought,), _ = pictures_at(damaged, [times[at] + 0.01])
    assert not np.array_equal(sought.to_ndarray(format="rgb24"), shown[at])
    with pytest.raises(DecodeError) as caught:
        probe_video(damaged)
    assert caught.value.reason == "decode mismatch after seek"


def test_streams_that_begin_inside_the_file_do_not_matter() -> None:
    """PyAV's demux raises IndexError at its end, or not, by what is in memory that it has not set."""

    class Stumbling:
        def __init__(self, container: InputContainer) -> None:
            self._container, self.format = container, container.format

        def demux(self, stream: VideoStream) -> Iterator[Packet]:
            yield from self._container.demux(stream)
            raise IndexError("list index out of range")

    with open_video(encoded(20, container="flv", codec="flv1")) as (container, stream):
        assert len(list(timed_frames(cast(InputContainer, Stumbling(container)), stream))) == 20


def test_an_avi_may_leave_frames_out() -> None:
    """A picture that stays on screen for six ticks is one frame of an AVI and six of what its header counts."""
    numbers, ticks = list(range(12)), [6 * i for i in range(12)]
    data = avi(numbers, ticks, gop=4)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == ticks[-1] + 1
    decoded = decode_whole(data)
    assert decoded.facts.frames == 12
    assert np.allclose(decoded.times_s * 25, ticks)
    with pytest.raises(DecodeError, match="does not decode to the end"):
        decode_whole(data[: chunks(data)[len(ticks) * 5]])
