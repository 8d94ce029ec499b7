"""A copy of packets is compared with its source, so a copy that shows something else is refused, not written."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.videos import encoded
from vjepa_scale.shards import remux
from vjepa_scale.shards.remux import Cut, checked_cut, checked_retimed, copy_cut, plan_cuts, retimed
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.inspect import decode_whole

RATE, GROUP, FRAMES = 20, 10, 40


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds, a keyframe every half."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    path.write_bytes(encoded(FRAMES, rate=RATE, gop=GROUP, options={"sc_threshold": "0"}))
    return path


def cuts_of(video: Path) -> list[Cut]:
    cuts = plan_cuts(video, decode_whole(video), start_s=None, end_s=None, segment_s=0.5)
    assert cuts is not None
    assert [(cut.first, cut.last) for cut in cuts] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    return cuts


def test_a_copied_part_is_compared_with_its_source(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file that is changed between probing and writing, or a library that seeks elsewhere, would bring."""
    cuts, decoded = cuts_of(video), decode_whole(video)
    data, facts = checked_cut(video, decoded, cuts[1])
    assert (facts.frames, facts.duration) == (10, pytest.approx(0.5))
    assert data == copy_cut(video, cuts[1])
    others = {
        "the part before it": copy_cut(video, cuts[0]),
        "the part after it": copy_cut(video, cuts[2]),
        "a picture less": copy_cut(video, replace(cuts[1], last=19)),
        "a group more": copy_cut(video, replace(cuts[1], last=30)),
    }
    for name, other in others.items():
        monkeypatch.setattr(remux, "copy_cut", lambda path, cut, other=other: other)
        with pytest.raises(DecodeError, match=r"the part from 0\.500 s does not decode to the same pictures"):
            pytest.fail(f"{name}: {checked_cut(video, decoded, cuts[1])[1]}")


@pytest.mark.parametrize("rate", [19, 21])
def test_a_copied_part_keeps_the_times(video: Path, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures at another rate: the last of ten is 24 ms away from where it was."""
    cut, decoded = cuts_of(video)[0], decode_whole(video)
    other, _ = retimed(video, np.arange(FRAMES) / rate)
    (path := video.with_name(f"{rate}.mp4")).write_bytes(other)
    monkeypatch.setattr(remux, "copy_cut", lambda *_: copy_cut(path, replace(cut)))
    with pytest.raises(DecodeError, match=r"the part from 0\.000 s does not keep the times"):
        checked_cut(video, decoded, cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pictures", "the copy does not decode to the same pictures"),
        ("late", r"frames of the copy are -0\.\d+ to -?0\.\d+ s early"),
        ("early", r"frames of the copy are -?0\.\d+ to 0\.\d+ s early"),
    ],
)
def test_a_copy_at_other_times_is_compared_with_its_source(
    change: str, message: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, times_s = decode_whole(video), np.arange(FRAMES) / 15
    data, _, seen = checked_retimed(video, decoded, times_s)
    assert seen.times_s == pytest.approx(times_s, abs=1e-4)
    if change == "pictures":
        (tmp_path / "other.mp4").write_bytes(encoded(FRAMES + 1, rate=RATE, gop=GROUP))
        data, _ = retimed(tmp_path / "other.mp4", np.arange(FRAMES + 1) / 15)
    else:
        shift = 1e-3 if change == "late" else -1e-3
        data, _ = retimed(video, times_s + shift * (np.arange(FRAMES) == FRAMES - 2))
    monkeypatch.setattr(remux, "retimed", lambda *_: (data, "mp4"))
    with pytest.raises(DecodeError, match=message):
        checked_retimed(video, decoded, times_s)
