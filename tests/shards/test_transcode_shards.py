"""Shards of transcoded videos."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from tests.chain import tool
from tests.shards.test_shards_inputs import samples
from tests.shards.transcoding import coloured, numbers, on_screen
from tests.video.test_decode import VARIABLE_MS, rotated, sequential
from tests.videos import encoded, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards import encode
from vjepa_scale.shards import write as write_module
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.make import Part, Settings, begin, finish, make_shards, plan, probe, summarize, write
from vjepa_scale.shards.plan import Plan
from vjepa_scale.shards.transcode import Transcode
from vjepa_scale.video.container import DecodeError


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long video, a turned one, one of variable rate, one in yuv444p, an image, a copy, and two that are broken."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "long.mp4").write_bytes(encoded(130, rate=30, gop=250))
    (folder / "same.mp4").write_bytes((folder / "long.mp4").read_bytes())
    (folder / "turned.mp4").write_bytes(rotated(encoded(20, rate=10)))
    (folder / "variable.mkv").write_bytes(encoded(len(VARIABLE_MS), pts_ms=VARIABLE_MS, container="matroska"))
    (folder / "444.mkv").write_bytes(coloured("libx264", "yuv444p", size=(49, 65)))
    (folder / "still.png").write_bytes(still_image(5, codec="png"))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    return folder


def test_shards_of_transcoded_segments(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--transcode", "32", "--segment", "2", "--shard-records", "3", "--images"]
    said = tool("make_shards", videos, out, *flags, "--workers", 2).stdout
    assert check_shards(out, decode=True, workers=1, progress=quiet) == []
    assert "8 clips" in said
    reasons = {row["path"]: row["reason"] for row in read_jsonl(out / "rejected.jsonl")}
    assert reasons == {"same.mp4": "duplicate", "empty.mp4": "zero length", "cut.mp4": "does not decode to the end"}
    clips = {(known["path"], known.get("start")): (known, clip) for known, clip in samples(out)}
    assert clips["still.png", None][1] == (videos / "still.png").read_bytes()
    for n, frames in enumerate((range(60), range(60, 120), range(120, 130))):
        known, clip = clips["long.mp4", 2.0 * n]
        assert (known["end"], known["frames"]) == (pytest.approx(frames[-1] / 30 + 1 / 30), len(frames))
        assert numbers(clip) == [k % 64 for k in frames]
        assert (known["width"], known["height"], known["fps"]) == (42, 32, pytest.approx(30))
    assert clips["turned.mp4", 0.0][0]["width"] == 32
    assert sequential(clips["444.mkv", 0.0][1])[1][0].shape == (32, 42, 3)
    manifest = Manifest.open(out)
    assert manifest.records == len(clips) == 8
    sizes = sorted(len(clip) for _, clip in clips.values())
    assert sorted(manifest.column("video.size").tolist()) == sizes  # not the estimates
    same = Settings(transcode=True, short_side=32, segment_s=2.0, shard_records=3, images=True)
    assert make_shards(videos, out, same, workers=1, progress=quiet).existed
    size_kept = replace(same, short_side=None)
    for other in (
        replace(same, short_side=48),
        size_kept,
        replace(size_kept, transcode=False),
        replace(same, fps="15"),
    ):
        with pytest.raises(UserError, match="OUT holds another data set: settings differ"):
            make_shards(videos, out, other, workers=1, progress=quiet)


def test_a_list_cuts_exactly_and_keeps_the_size(videos: Path, tmp_path: Path) -> None:
    rows = ["path,label,start,end", "long.mp4,a,0.5,1.5", "long.mp4,b,3.9,", "long.mp4,c,9,", "long.mp4,a,0.501,1.499"]
    (videos / "list.csv").write_text("\n".join(rows) + "\n")
    try:
        settings = Settings(transcode=True, fps="30000/1001")
        make_shards(videos / "list.csv", tmp_path / "out", settings, workers=1, progress=quiet)
    finally:
        (videos / "list.csv").unlink()
    made = {known["label"]: (known, clip) for known, clip in samples(tmp_path / "out")}
    assert set(made) == {"a", "b"}
    known, clip = made["a"]
    assert (known["start"], known["end"], known["width"], known["height"]) == (0.5, 1.5, 64, 48)
    assert known["fps"] == pytest.approx(30000 / 1001)
    assert numbers(clip) == on_screen((videos / "long.mp4").read_bytes(), Fraction(1, 2), Fraction(30000, 1001), 30)
    reasons = sorted(row["reason"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl"))
    assert reasons == ["duplicate", "no such part"]


@pytest.mark.parametrize("writes", [False, True])
def test_a_run_that_is_interrupted_goes_on_with_the_same_bytes(writes: bool, videos: Path, tmp_path: Path) -> None:
    settings = Settings(transcode=True, short_side=32, segment_s=1.0, shard_records=2)
    whole, again = tmp_path / "whole", tmp_path / "again"
    make_shards(videos, whole, settings, workers=2, progress=quiet)

    class Killed(Exception):
        pass

    def interrupt(doing: str, done: int, total: int) -> None:
        if done == 3 and doing == ("writing" if writes else "probing"):
            raise Killed

    with pytest.raises(Killed):
        make_shards(videos, again, settings, workers=1, progress=interrupt)
    make_shards(videos, again, settings, workers=2, progress=quiet)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_a_source_that_changes_before_it_is_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "a.mp4"
    path.write_bytes(encoded(30, rate=30))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the same length
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"changed since it was probed.*run the command again"):
        write(work, Part(0, 1), workers=1, progress=quiet)
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert make_shards(tmp_path / "videos", tmp_path / "out", Settings(transcode=True), workers=1, progress=quiet).clips


def test_what_cannot_be_encoded_is_rejected_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four is a shard of its own, and a class."""
    for n in range(4):
        (tmp_path / f"videos/class {n // 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"videos/class {n // 2}/{n}.mp4").write_bytes(encoded(10 + n, rate=10))
    settings = Settings(transcode=True, shard_records=1)
    make_shards(tmp_path / "videos", tmp_path / "whole", settings, workers=1, progress=quiet)
    whole = {known["path"]: clip for known, clip in samples(tmp_path / "whole")}
    work = begin(tmp_path / "videos", tmp_path / "out", replace(settings, shard_records=2))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    order = [record.path for shard in range(2) for _, record in Plan.open(work).records(shard)]
    spoilt = {order[0], *(path for path in order if path.startswith("class 1"))}
    sound = write_module.transcode

    def fails(path: Path, part: Transcode) -> bytes:
        if str(path.relative_to(tmp_path / "videos")) in spoilt:
            raise DecodeError("cannot be transcoded", "picture 0 differs by 9.9 of 255 levels")
        return sound(path, part)

    monkeypatch.setattr(write_module, "transcode", fails)
    for shard in range(2):
        write_module._write_shard(work, shard)
    finish(work)
    summary = summarize(tmp_path / "out")
    kept = [path for path in order if path not in spoilt]
    assert [(known["path"], clip) for known, clip in samples(tmp_path / "out")] == [(p, whole[p]) for p in sorted(kept)]
    assert summary.rejected == {"cannot be transcoded": len(spoilt)}
    assert sorted(row["path"] for row in read_jsonl(tmp_path / "out/rejected.jsonl")) == sorted(spoilt)
    manifest = Manifest.open(tmp_path / "out")
    assert [manifest.read(r) for r in range(manifest.records)] == [whole[path] for path in kept]
    assert manifest.classes == ["class 0"]
    assert manifest.column("label").tolist() == [0] * len(kept)
    assert check_shards(tmp_path / "out", decode=True, workers=1, progress=quiet) == []


def test_where_nothing_can_be_encoded_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(encoded(10, rate=10))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    plan(work)
    monkeypatch.setattr(encode, "_TOLERANCE", -1.0)
    write_module._write_shard(work, 0)
    with pytest.raises(UserError, match="none of 1 files can be used: 1 cannot be transcoded"):
        finish(work)
    assert not (tmp_path / "out").exists()


def test_shards_are_filled_by_an_estimate(tmp_path: Path) -> None:
    """64 × 48 pixels × 500 frames × 0.12 bits = 23 kB a clip, whatever it comes to."""
    for n in range(3):
        (tmp_path / "videos" / f"{n}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{n}.mp4").write_bytes(encoded(500 + n, rate=30))
    work = begin(tmp_path / "videos", tmp_path / "out", Settings(transcode=True))
    assert work is not None
    probe(work, Part(0, 1), workers=1, progress=quiet)
    lines = [line for path in sorted((work.folder / "probed").iterdir()) for line in path.read_text().splitlines()]
    sizes = [record["size"] for line in lines for record in json.loads(line)["records"]]
    assert sizes == [64 * 48 * (500 + n) * 12 // 800 for n in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transcode", "15"], "make_shards.py --transcode: 15 is too small"),
        (["--transcode", "0"], "make_shards.py --transcode: 0 is too small"),
        (["--transcode", "-4"], "make_shards.py --transcode: -4 is too small"),
        (["--fps", "30"], "make_shards.py --fps: only for --transcode"),
        (["--transcode", "--fps", "0"], "make_shards.py --fps: 0 is no frame rate"),
        (["--transcode", "--fps", "fast"], "make_shards.py --fps: fast is no frame rate"),
        (["--transcode", "--trajectories", "droid"], "make_shards.py --transcode: not with --trajectories"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: list[str], message: str, videos: Path, tmp_path: Path) -> None:
    run = tool("make_shards", videos, tmp_path / "out", *flags, check=False)
    assert run.returncode == 2
    said = run.stderr
    assert said.startswith(f"error: {message}"), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_copy_and_transcode_exclude_each_other(videos: Path, tmp_path: Path) -> None:
    run = tool("make_shards", videos, tmp_path / "out", "--copy", "--transcode", 32, check=False)
    assert run.returncode == 2
    assert "not allowed with argument --copy" in run.stderr
    assert not (tmp_path / "out").exists()
