"""Trimmed MP4 and MOV: an edit list hides frames that are in the file. Judged by PyAV in order, and by ffmpeg."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.video.judge import edited
from tests.video.test_decode import sequential
from tests.videos import encoded, number_of
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.remux import checked_cut, checked_retimed, plan_cuts
from vjepa_scale.shards.transcode import plan_transcodes
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip, times_of_frames
from vjepa_scale.video.inspect import decode_whole, probe_video
from vjepa_scale.video.stream import stream_pictures

FRAME = 512  # ticks: 15,360 a second, 30 frames
# Codec: its options, and the number of the frame at tick 0 of the track: before it lies what B-frames are delayed by.
CODECS = {
    "h264": ({"bf": "0"}, 0),
    "h264, B-frames": ({"bf": "2"}, -2),
    "mpeg4, B-frames": ({"bf": "2"}, -1),
}
# What: (milliseconds, first frame of the track) of each edit, and the frames that it shows.
EDITS = {
    "from 17 on": ([(1000, 17)], [*range(17, 40)]),
    "up to 20": ([(700, 0)], [*range(21)]),
    "from the middle of a group to that of another": ([(500, 17)], [*range(17, 32)]),
    "after a pause": ([(300, -1), (500, 17)], [*range(17, 32)]),
    "the second half first": ([(300, 29), (400, 5)], [*range(29, 38), *range(5, 17)]),
    "twice": ([(300, 5), (300, 5)], [*range(5, 14), *range(5, 14)]),
}


def trimmed(codec: str, edit: str) -> bytes:
    options, zero = CODECS[codec]
    rows = [(ms, first if first < 0 else (first - zero) * FRAME) for ms, first in EDITS[edit][0]]
    return edited(encoded(40, gop=12, codec=codec.split(",")[0], options=options), *rows)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("codec", CODECS)
def test_what_an_edit_list_shows_is_the_video(codec: str, edit: str) -> None:
    data, numbers = trimmed(codec, edit), EDITS[edit][1]
    times, pictures = sequential(data)
    assert [number_of(picture) for picture in pictures] == numbers  # the judge agrees
    assert times == pytest.approx(np.arange(len(numbers)) / 30)
    facts = probe_video(data)
    assert (facts.frames, facts.fps) == (len(numbers), pytest.approx(30))
    assert facts.duration == pytest.approx(len(numbers) / 30)
    for i, time_s in enumerate(times):  # each alone, so that it is sought
        assert np.array_equal(decode_clip(data, times_s=[time_s + 0.01])[0], pictures[i])
    assert times_of_frames(data, range(len(numbers))) == pytest.approx(times)
    assert [number_of(picture) for picture in stream_pictures(data, fps=30.0)] == numbers


@pytest.mark.system("torchcodec")
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("codec", CODECS)
def test_torchcodec_or_what_takes_its_place_shows_the_same(codec: str, edit: str) -> None:
    data, numbers = trimmed(codec, edit), EDITS[edit][1]
    asked = [i / 30 + 0.01 for i in range(len(numbers))]
    found = decode_clip(data, times_s=asked, decoder="torchcodec")
    assert [number_of(picture) for picture in found] == numbers


@pytest.mark.parametrize("edit", ["from 17 on", "up to 20"])
def test_a_trimmed_file_that_breaks_off_is_still_refused(edit: str) -> None:
    options, zero = CODECS["h264"]
    data = edited(encoded(40, gop=12, options=options), *((ms, (n - zero) * FRAME) for ms, n in EDITS[edit][0]))
    place = data.index(b"mdat")
    end = place - 4 + int.from_bytes(data[place - 4 : place], "big")
    with pytest.raises(DecodeError, match="does not decode to the end"):
        probe_video(data[: end - 900] + bytes(900) + data[end:])


@pytest.mark.parametrize("codec", ["h264", "h264, B-frames"])
def test_parts_of_a_trimmed_file(codec: str, tmp_path: Path) -> None:
    """Copied, given other times and encoded anew: what was hidden stays hidden."""
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(trimmed(codec, "from 17 on"))
    decoded, numbers = decode_whole(path), EDITS["from 17 on"][1]
    cuts = plan_cuts(path, decoded, start_s=None, end_s=None, segment_s=0.3)
    assert cuts is not None
    parts = [checked_cut(path, decoded, cut)[0] for cut in cuts]
    assert len(parts) > 1
    assert [number_of(picture) for part in parts for picture in sequential(part)[1]] == numbers
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, len(numbers)))
    data, _, _ = checked_retimed(path, decoded, times - times[0])
    assert [number_of(picture) for picture in sequential(data)[1]] == numbers
    (plan,) = plan_transcodes(decoded, short_side=None)
    assert [number_of(picture) for picture in sequential(transcode(path, plan))[1]] == numbers


def test_what_a_copy_cannot_hide_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(trimmed("h264", "the second half first"))
    decoded = decode_whole(path)
    with pytest.raises(DecodeError, match="the log's times: an edit list hides frames"):
        checked_retimed(path, decoded, np.arange(21) / 15)
    cuts = plan_cuts(path, decoded, start_s=0.1, end_s=0.2, segment_s=None)
    with pytest.raises(DecodeError, match="by copying: an edit list hides frames"):
        [checked_cut(path, decoded, cut) for cut in cuts or []]


@pytest.mark.system("ffmpeg")
@pytest.mark.parametrize("name", ["trimmed.mp4", "trimmed.mov"])
def test_as_ffmpeg_trims_and_plays(name: str, tmp_path: Path) -> None:
    (tmp_path / "whole.mp4").write_bytes(encoded(60, gop=25, options={"bf": "2"}))
    ffmpeg = ["ffmpeg", "-v", "error"]
    cut = [*ffmpeg, "-ss", "1.3", "-i", tmp_path / "whole.mp4", "-t", "0.5", "-c", "copy", tmp_path / name]
    subprocess.run(cut, check=True)
    play = [*ffmpeg, "-i", tmp_path / name, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    played = np.frombuffer(subprocess.run(play, check=True, capture_output=True).stdout, np.uint8)
    shown = [number_of(picture) for picture in played.reshape(-1, 48, 64, 3)]
    facts = probe_video(tmp_path / name)
    assert facts.frames == len(shown) < 20
    assert shown[0] == 39
    clip = decode_clip(tmp_path / name, times_s=[(i + 0.5) / 30 for i in range(len(shown))])
    assert [number_of(picture) for picture in clip] == shown
