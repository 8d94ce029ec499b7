"""preprocess, against PyAV's own decoding and arithmetic written here."""

import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.inference.checkpoint import FRAMES, MEAN, SIZE, STD
from tests.inference.judge import PIXEL, clip_of, frames_of, sampled
from tests.videos import audio_only, encoded, number_of, picture
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.model import Model
from vjepa_scale.video.decode import decode_clip
from vjepa_scale.video.inspect import probe_video
from vjepa_scale.video.stream import stream_pictures


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return float((ours - theirs).abs().max())


def test_default_clip(model: Model, video: Path) -> None:
    assert off(model.preprocess(video), clip_of(sampled(video, 20)[:FRAMES])) <= PIXEL
    assert torch.equal(model.preprocess(str(video)), model.preprocess(video))


def test_window_rate_and_size(model: Model, video: Path) -> None:
    clip = model.preprocess(video, frames=6, fps=10, size=24, start=1.33)
    assert off(clip, clip_of(sampled(video, 20, fps=10, start_s=1.33)[:6], 24)) <= PIXEL


def test_not_square(model: Model, video: Path) -> None:
    clip = model.preprocess(video, frames=1, size=(24, 64))
    # 24 × 64 of 48 × 64: 24 full rows of the middle, nothing resized.
    middle = (frames_of(video)[0][12:36] / 255 - MEAN) / STD
    assert off(clip, torch.from_numpy(middle).permute(2, 0, 1)[None, :, None].float()) <= 1e-5


def test_whole_video_has_every_picture_once_and_a_window_past_the_end_repeats(model: Model, video: Path) -> None:
    pictures = sampled(video, 20)
    assert len(pictures) == 21
    assert off(model.preprocess(video, frames="all"), clip_of(pictures)) <= PIXEL
    late = model.preprocess(video, start=3.6)
    assert off(late, clip_of(pictures[18:] + pictures[-1:] * 5)) <= PIXEL
    with pytest.raises(UserError, match=r"long\.mp4: the video ends before 4\.2 s"):
        model.preprocess(video, start=4.2)


def test_pictures_in_memory(model: Model) -> None:
    pictures = [picture(k) for k in range(7)]
    expected = clip_of(pictures)
    assert off(model.preprocess(np.stack(pictures)), expected) <= PIXEL
    assert off(model.preprocess(torch.from_numpy(np.stack(pictures))), expected) <= PIXEL
    assert off(model.preprocess(np.stack(pictures), start=0.4, frames=3), expected[:, :, 2:5]) <= PIXEL
    still = model.preprocess(pictures[3])
    assert off(still, expected[:, :, 3:4].expand(-1, -1, FRAMES, -1, -1)) <= PIXEL


def image_file(path: Path, image: np.ndarray, codec: str, pix_fmt: str) -> Path:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as out:
        stream = out.add_stream(codec, rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = pix_fmt
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(("codec", "pix_fmt", "name"), [("png", "rgb24", "a.png"), ("mjpeg", "yuvj444p", "no suffix")])
def test_an_image_is_a_static_clip(model: Model, tmp_path: Path, codec: str, pix_fmt: str, name: str) -> None:
    path = image_file(tmp_path / name, picture(37), codec, pix_fmt)
    (image,) = frames_of(path)
    assert number_of(image) == 37
    clip = model.preprocess(path)
    assert off(clip, clip_of([image] * FRAMES)) <= PIXEL
    assert model.preprocess(path, frames=2).shape == (1, 3, 2, SIZE, SIZE)
    features = model.encode(path)
    assert torch.equal(features.tokens, model.encode_clips(clip))


STREAMED = {
    "mp4": lambda: encoded(50, rate=30),
    "mkv, variable": lambda: encoded(
        12, pts_ms=[0, 70, 80, 400, 900, 910, 1500, 1600, 2200, 2600, 2650, 3000], gop=5, container="matroska"
    ),
    "mpegts": lambda: encoded(40, rate=25, container="mpegts"),
    "mpeg": lambda: encoded(40, rate=25, container="mpeg", codec="mpeg1video"),
}


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("start_s", [0.0, 0.77])
def test_streamed_pictures_are_those_of_the_sequence(kind: str, start_s: float, tmp_path: Path) -> None:
    """Times by PyAV's timestamps; the number of pictures by the duration that make_shards writes down."""
    data = STREAMED[kind]()
    path = tmp_path / "video.jpg"  # the name says nothing
    path.write_bytes(data)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        timed = [
            (float((f.pts - stream.start_time) * stream.time_base), f.to_ndarray(format="rgb24"))
            for f in container.decode(stream)
        ]
    duration = probe_video(data).duration
    expected = []
    while start_s + len(expected) / 7 < duration - 1e-6:
        time = start_s + len(expected) / 7
        expected.append(timed[max((i for i, (t, _) in enumerate(timed) if t <= time + 1e-9), default=0)][1])
    for source in (data, path):
        found = list(stream_pictures(source, fps=7, start_s=start_s))
        assert len(found) == len(expected) > 5
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    clip = decode_clip(path, times_s=[start_s + k / 7 for k in range(len(expected))])
    assert np.array_equal(np.stack(clip), np.stack(expected))


def scratched(data: bytes) -> bytes:
    """Sixty bytes in the middle are others; FFmpeg goes on, and shows something."""
    middle = len(data) // 2
    return data[:middle] + bytes((7 * k + 13) % 256 for k in range(60)) + data[middle + 60 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zero length"),
        (scratched(encoded(60, container="mpegts")), "damaged packet"),
        (scratched(encoded(60, container="avi", codec="mpeg4")), "damaged frame"),
        (b"these are not the frames you are looking for\n" * 40, "unreadable|not a video"),
        (audio_only(), "no video stream"),
        (encoded(60, faststart=True)[:-1200], "does not decode to the end"),
        (encoded(60, container="matroska")[:-1200], "does not decode to the end"),
    ],
    ids=["empty", "scratched ts", "scratched avi", "text", "sound", "cut mp4", "cut mkv"],
)
def test_what_cannot_be_read_is_named(model: Model, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        model.encode(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video": "nowhere.mp4"}, "nowhere.mp4: no such file"),
        ({"frames": 0}, "0 frames"),
        ({"fps": 0}, "0 pictures per second"),
        ({"size": 30}, "30×30 pixels"),
        ({"start": -1}, "-1 s"),
        ({"video": np.zeros((4, 3, 8, 8), np.uint8)}, "[4, 3, 8, 8]"),
        ({"video": np.zeros((8, 8, 3), np.float32)}, "float32"),
    ],
)
def test_arguments_that_do_not_fit(model: Model, video: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model.preprocess(**{"video": video, **arguments})
