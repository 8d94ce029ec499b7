"""Shards, as WebDataset reads them; what is rejected, what is refused, what is done again."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.chain import tool
from tests.shared import contents
from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.core.worker_pool import Crashed, map_in_workers
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Settings, make_shards

GOOD = {f"up/clip {i}.mp4" for i in range(5)} | {f"down/deep/{i}.MKV" for i in range(3)} | {"no.class.avi"}


def test_plain_webdataset_reads_the_source_files_byte_for_byte(videos: Path, shards: Manifest) -> None:
    urls = sorted(str(path) for path in shards.folder.glob("*.tar"))
    assert len(urls) == 3
    seen = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        known = json.loads(sample["json"])
        extension = Path(known["path"]).suffix[1:].lower()
        assert sample[extension] == (videos / known["path"]).read_bytes()
        parent = os.path.dirname(known["path"])
        assert known["label"] == (parent or None)
        assert set(known) == {"path", "label", "duration", "fps", "frames", "width", "height"}
        seen[known["path"]] = sample["__key__"]
    assert set(seen) == GOOD
    assert len(set(seen.values())) == len(GOOD)


def test_columns_say_where_each_member_lies_and_what_it_is(videos: Path, shards: Manifest) -> None:
    assert shards.records == 9
    assert shards.records_per_shard.tolist() == [4, 4, 1]
    assert shards.classes == ["down/deep", "up"]
    names = []
    for record in range(shards.records):
        known = json.loads(shards.read(record, "json"))
        assert shards.read(record) == (videos / known["path"]).read_bytes()
        for name in ("duration", "fps", "frames", "width", "height"):
            assert shards.column(name)[record] == known[name]
        label = shards.column("label")[record]
        assert (shards.classes[label] if label >= 0 else None) == known["label"]
        names.append(f"{shards.key(record)}.json")
    members = []
    for shard in shards.shards:
        with tarfile.open(shards.folder / shard.name) as tar:
            members += [m.name for m in tar if m.name.endswith(".json")]
            assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}
        assert hashlib.sha256((shards.folder / shard.name).read_bytes()).hexdigest() == shard.sha256
    assert members == names


def test_known_facts_of_a_known_video(shards: Manifest) -> None:
    by_path = {json.loads(shards.read(r, "json"))["path"]: r for r in range(shards.records)}
    record = by_path["up/clip 2.mp4"]  # 44 frames, 20 a second
    assert shards.column("frames")[record] == 44
    assert shards.column("duration")[record] == pytest.approx(2.2, abs=1e-6)
    assert shards.column("duration")[by_path["down/deep/0.MKV"]] > 3.1


def test_every_file_that_is_left_out_has_a_reason(shards: Manifest) -> None:
    rows = {row["path"]: row["reason"] for row in read_jsonl(shards.folder / "rejected.jsonl")}
    assert rows == {
        "cut.mp4": "does not decode to the end",
        "gone.mp4": "unreadable",
        "up/empty.mp4": "zero length",
        "up/notes.txt": "unreadable",
        "up/sound.wav": "no video stream",
    }


def test_the_same_plan_gives_the_same_bytes_whatever_the_workers(
    videos: Path, shards: Manifest, tmp_path: Path
) -> None:
    make_shards(videos, tmp_path / "out", Settings(seed=3, shard_records=4), workers=1, progress=quiet)
    assert contents(tmp_path / "out") == contents(shards.folder)
    make_shards(videos, tmp_path / "other", Settings(seed=4, shard_records=4), workers=2, progress=quiet)
    assert Manifest.open(tmp_path / "other").identity != shards.identity


def test_a_second_run_does_nothing(videos: Path, shards: Manifest) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.folder.rglob("*")}
    settings = Settings(seed=3, shard_records=4)

    def no_progress(*_: object) -> None:
        raise AssertionError("nothing should be done")

    summary = make_shards(videos, shards.folder, settings, workers=1, progress=no_progress)
    assert summary.existed
    assert summary.clips == 9
    assert {path: path.stat().st_mtime_ns for path in shards.folder.rglob("*")} == before


def test_an_interrupted_run_goes_on(videos: Path, shards: Manifest, tmp_path: Path) -> None:
    settings, stopped = Settings(seed=3, shard_records=4), []

    def stop_after_one_shard(doing: str, done: int, total: int) -> None:
        if doing == "writing":
            stopped.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(videos, tmp_path / "out", settings, workers=1, progress=stop_after_one_shard)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.open(tmp_path / "out")
    (tmp_path / "out" / "shard-000002.tar").unlink(missing_ok=True)  # as if killed inside the last one
    (tmp_path / "out" / ".shard-000002.tar.tmp").write_bytes(b"half")

    doings = set()
    make_shards(videos, tmp_path / "out", settings, workers=1, progress=lambda doing, *_: doings.add(doing))
    assert doings == {"writing"}  # not probed again
    assert contents(tmp_path / "out") == contents(shards.folder)


def test_out_that_holds_something_else_is_refused(videos: Path, shards: Manifest, tmp_path: Path) -> None:
    before = contents(shards.folder)
    for settings in (Settings(seed=9, shard_records=4), Settings(seed=3, shard_records=5)):
        with pytest.raises(UserError, match="OUT holds another data set"):
            make_shards(videos, shards.folder, settings, workers=1, progress=quiet)
    assert contents(shards.folder) == before
    (tmp_path / "foreign.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown origin"):
        make_shards(videos, tmp_path, Settings(), workers=1, progress=quiet)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("mine")
    (other / "pictures").mkdir()
    with pytest.raises(UserError, match=r"not empty: chapter\.tex and 1 more"):
        make_shards(videos, other, Settings(), workers=1, progress=quiet)
    assert sorted(path.name for path in other.iterdir()) == ["chapter.tex", "pictures"]
    with pytest.raises(UserError, match="inside VIDEOS"):
        make_shards(videos, videos / "out", Settings(), workers=1, progress=quiet)


def test_an_empty_folder_or_one_with_a_half_written_plan_is_taken(
    videos: Path, shards: Manifest, tmp_path: Path
) -> None:
    (tmp_path / ".work.4711.tmp").write_text("0")  # a kill while it began
    make_shards(videos, tmp_path, Settings(seed=3, shard_records=4), workers=2, progress=quiet)
    assert contents(shards.folder).items() <= contents(tmp_path).items()


def test_shards_fill_up_to_a_size(videos: Path, tmp_path: Path) -> None:
    big = tmp_path / "videos"
    big.mkdir()
    for i in range(5):  # five files of 0.4 MB: two fill a shard of 1 MB
        data = encoded(8, rate=8)
        free = (400_000 - len(data)).to_bytes(4, "big") + b"free" + bytes([i]) * (400_000 - len(data) - 8)
        (big / f"{i}.mp4").write_bytes(data + free)
    make_shards(big, tmp_path / "out", Settings(shard_mb=1), workers=1, progress=quiet)
    assert Manifest.open(tmp_path / "out").records_per_shard.tolist() == [2, 2, 1]


@pytest.mark.parametrize("case", ["missing", "empty", "unusable", "workers", "taken"])
def test_the_tool_reports_user_errors_in_one_line(case: str, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    if case != "missing":
        videos.mkdir()
    if case == "unusable":
        (videos / "notes.txt").write_text("no video")
    if case == "taken":
        (videos / "a.mp4").write_bytes(b"")
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    arguments = ["--workers", "0" if case == "workers" else "1"]
    run = tool("make_shards", videos, out, *arguments, check=False)
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("error: ")
    assert {"workers": "--workers", "taken": f"{out}: OUT is not empty: mine.txt"}.get(case, str(videos)) in run.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"] if case == "taken" else not out.exists()


def test_the_tool_sums_up(videos: Path, tmp_path: Path) -> None:
    run = tool("make_shards", videos, tmp_path / "out", "--workers", 2, "--shard-records", 4, "--seed", 3)
    assert "9 clips" in run.stdout
    assert "3 shards written" in run.stdout
    assert "rejected: 5" in run.stdout


def _abort_on_three(item: int) -> int:
    if item == 3:
        os.abort()
    return item * item


def test_an_item_that_kills_its_worker_is_named_and_the_others_are_done() -> None:
    results = dict(map_in_workers(_abort_on_three, range(8), workers=2))
    assert isinstance(results.pop(3), Crashed)
    assert results == {i: i * i for i in range(8) if i != 3}


def damaged(shards: Manifest, folder: Path) -> Path:
    shutil.copytree(shards.folder, folder)
    return folder


@pytest.mark.slow
def test_a_record_of_more_than_the_system_reads_at_once(shards: Manifest, tmp_path: Path) -> None:
    long = damaged(shards, tmp_path / "long")
    sizes, size = np.load(long / "columns" / "video.size.npy"), 2**31 + 1000
    sizes[0] = size
    np.save(long / "columns" / "video.size.npy", sizes)
    with open(long / "shard-000000.tar", "r+b") as file:
        file.truncate(size + 2**20)  # a hole: it takes no room
    manifest = json.loads((long / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = size + 2**20
    (long / "manifest.json").write_text(json.dumps(manifest))
    assert len(Manifest.open(long, look=False).read(0)) == size


def test_opening_what_is_not_whole(shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data folder"):
        Manifest.open(tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Manifest.open(tmp_path / "plain")

    short = damaged(shards, tmp_path / "short")
    with open(short / "shard-000001.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"shard-000001\.tar.*5000 bytes"):
        Manifest.open(short)
    (short / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar.*missing"):
        Manifest.open(short)

    for name, text, message in (
        ("cut", '{"version": 1,', "not valid JSON"),
        ("newer", '{"version": 2}', "version 2"),
        ("list", "[]", "version None"),
        ("keys", '{"version": 1}', "not a manifest"),
    ):
        folder = damaged(shards, tmp_path / name)
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Manifest.open(folder)

    empty = damaged(shards, tmp_path / "none")
    tree = json.loads((empty / "manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps({**tree, "records": 0, "shards": []}))
    with pytest.raises(UserError, match="no records"):
        Manifest.open(empty)

    column = damaged(shards, tmp_path / "column")
    np.save(column / "columns" / "duration.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"duration\.npy"):
        Manifest.open(column)
