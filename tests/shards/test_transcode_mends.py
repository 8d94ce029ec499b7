"""What copying refuses and transcoding mends: timestamps that go backwards, files that cannot be sought in."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from tests.shards.test_damage import avi, chunks
from tests.shards.test_shards_inputs import rejected, samples
from tests.video.test_decode import sequential
from tests.videos import encoded, number_of, quiet
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.video import inspect


def shuffled(frames: int, rate: int) -> bytes:
    """An MP4 whose pictures come out of the decoder in their order, every fourth with the time of the next."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(encoded(frames, rate=rate, options={"bf": "0"}))) as source:
        stream = source.streams.video[0]
        with av.open(buffer, "w", format="mp4") as out:
            copy = out.add_stream_from_template(stream)
            packets = [packet for packet in source.demux(stream) if packet.size]
            gap = packets[1].pts - packets[0].pts
            for number, packet in enumerate(packets):
                packet.pts += gap * {0: 1, 1: -1}.get(number % 4, 0) + gap
                packet.stream = copy
                out.mux(packet)
    return buffer.getvalue()


def unseekable() -> bytes:
    """An AVI with a lost packet, after which its index counts other pictures than are there."""
    data = avi(numbers := [*range(20), *[40] * 20, *range(20), *[40] * 6], list(range(len(numbers))), gop=5)
    lost = chunks(data)[41]
    return data[:lost] + bytes(8) + data[lost + 8 :]


@pytest.mark.parametrize(
    ("kind", "reason", "rate"),
    [
        ("shuffled", "timestamps go backwards", 20),
        ("unseekable", "decode mismatch after seek", 25),
    ],
)
def test_transcoding_takes_every_picture_in_order(kind: str, reason: str, rate: int, tmp_path: Path) -> None:
    data = shuffled(30, rate) if kind == "shuffled" else unseekable()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.video").write_bytes(data)
    (tmp_path / "videos/b.mp4").write_bytes(encoded(8))
    make_shards(tmp_path / "videos", tmp_path / "copied", Settings(), workers=1, progress=quiet)
    assert rejected(tmp_path / "copied") == {"a.video": reason}
    settings = Settings(transcode=True, segment_s=1.0)
    make_shards(tmp_path / "videos", tmp_path / "made", settings, workers=1, progress=quiet)
    assert rejected(tmp_path / "made") == {}
    parts = sorted((known["start"], clip) for known, clip in samples(tmp_path / "made") if known["path"] == "a.video")
    shown = [sequential(clip) for _, clip in parts]
    wanted = sequential(data)[1]
    assert [number_of(image) for _, images in shown for image in images] == [number_of(image) for image in wanted]
    for times, images in shown:
        assert times == pytest.approx(np.arange(len(images)) / rate)


def test_a_file_that_declares_no_rate_is_rejected_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_constant_rate", lambda data: None)
    with pytest.raises(inspect.DecodeError, match="timestamps go backwards"):
        inspect.decode_whole(shuffled(30, 20), in_order=True)
