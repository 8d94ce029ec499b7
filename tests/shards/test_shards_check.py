"""check names every damage; index makes a manifest for shards that others wrote; what a kill leaves is finished."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.chain import ROOT, tool
from tests.processes import LIMIT_S
from tests.shared import contents
from tests.videos import encoded, number_of, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.index import index_shards
from vjepa_scale.video.decode import decode_clip

TOOL = ROOT / "tools" / "make_shards.py"


def checked(folder: Path, *, decode: bool = False) -> list[str]:
    return check_shards(folder, decode=decode, workers=1, progress=quiet)


# -- check ----------------------------------------------------------------------------------------


def test_shards_as_they_were_made_have_nothing_wrong(shards: Manifest) -> None:
    assert checked(shards.folder, decode=True) == []
    run = tool("make_shards", "check", shards.folder)
    assert (run.returncode, run.stdout) == (0, f"{shards.folder}: all is as the manifest says\n")
    listed = "".join(f"{shard.sha256}  {shards.folder / shard.name}\n" for shard in shards.shards)
    subprocess.run(["sha256sum", "--check", "--quiet"], input=listed, text=True, check=True)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


def flip_in_a_video(folder: Path) -> None:
    manifest = Manifest.open(folder)
    flip(folder / "shard-000001.tar", int(manifest.column("video.offset")[5] + manifest.column("video.size")[5] - 900))


def change_column(folder: Path, name: str, record: int, value: float) -> None:
    """A value in a column, with a checksum to match."""
    values = np.load(folder / "columns" / f"{name}.npy")
    values[record] = value
    np.save(folder / "columns" / f"{name}.npy", values)
    tree = json.loads((folder / "manifest.json").read_text())
    summed = subprocess.run(
        ["sha256sum", folder / "columns" / f"{name}.npy"], capture_output=True, text=True, check=True
    )
    (column,) = (column for column in tree["columns"] if column["name"] == name)
    column["sha256"] = summed.stdout.split()[0]
    (folder / "manifest.json").write_text(json.dumps(tree))


def lose_a_member(folder: Path) -> None:
    """Shard 0 written again by tar without its second sample, of the same length."""
    path, size = folder / "shard-000000.tar", (folder / "shard-000000.tar").stat().st_size
    subprocess.run(["tar", "--delete", "-f", path, "000000001.json"], check=True)
    with open(path, "ab") as file:
        file.write(bytes(size - path.stat().st_size))


def truncate(folder: Path) -> None:
    os.truncate(folder / "shard-000001.tar", 3000)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flip": (flip_in_a_video, ["shard-000001.tar: other bytes"]),
    "missing": (lambda f: (f / "shard-000002.tar").unlink(), ["shard-000002.tar: missing"]),
    "truncated": (truncate, ["shard-000001.tar: 3000 bytes", "shard-000001.tar: record 000000007: not in the shard"]),
    "rejected": (lambda folder: (folder / "rejected.jsonl").unlink(), ["rejected.jsonl is missing"]),
    "member": (
        lose_a_member,
        ["shard-000000.tar: other bytes", "shard-000000.tar: record 000000001: its video is elsewhere"],
    ),
    "stranger": (lambda f: shutil.copy(f / "shard-000000.tar", f / "more.tar"), ["more.tar: not in the manifest"]),
    "column bytes": (lambda f: flip(f / "columns" / "fps.npy", 140), ["columns/fps.npy: other bytes"]),
    "column gone": (lambda f: (f / "columns" / "key.npy").unlink(), ["columns/key.npy: missing"]),
    "fact": (lambda f: change_column(f, "frames", 8, 7), ["shard-000002.tar: record 000000008: frames is 7 in the"]),
    "place": (
        lambda f: change_column(f, "video.offset", 2, 512),
        ["shard-000000.tar: record 000000002: its video is elsewhere"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_named(kind: str, shards: Manifest, tmp_path: Path) -> None:
    shutil.copytree(shards.folder, tmp_path / "copy")
    damage, expected = DAMAGES[kind]
    damage(tmp_path / "copy")
    found = checked(tmp_path / "copy")
    for start in expected:
        assert any(line.startswith(start) for line in found), found


def test_the_tool_says_what_is_wrong_and_fails(shards: Manifest, tmp_path: Path) -> None:
    shutil.copytree(shards.folder, tmp_path / "copy")
    (tmp_path / "copy" / "shard-000002.tar").unlink()
    run = tool("make_shards", "check", tmp_path / "copy", check=False)
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout == f"shard-000002.tar: missing\n{tmp_path / 'copy'}: 1 thing is wrong\n"


def test_a_folder_without_manifest_cannot_be_checked(tmp_path: Path) -> None:
    run = tool("make_shards", "check", tmp_path, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path}: no manifest.json")


def test_decoding_finds_what_checksums_bless(shards: Manifest, tmp_path: Path) -> None:
    """A video damaged before its shard's checksum was taken."""
    folder = tmp_path / "copy"
    shutil.copytree(shards.folder, folder)
    offset, size = (int(shards.column(name)[5]) for name in ("video.offset", "video.size"))
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    tree = json.loads((folder / "manifest.json").read_text())
    summed = subprocess.run(["sha256sum", folder / "shard-000001.tar"], capture_output=True, text=True, check=True)
    tree["shards"][1]["sha256"] = summed.stdout.split()[0]
    joined = "\n".join(shard["sha256"] for shard in tree["shards"])
    total = subprocess.run(["sha256sum"], input=joined, capture_output=True, text=True, check=True)
    tree["identity"] = total.stdout.split()[0]
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert checked(folder) == []
    (line,) = checked(folder, decode=True)
    assert line.startswith("shard-000001.tar: record 000000005: unreadable")


# -- index ----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards by webdataset's own writer, and one by tar."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(5):
            clip = {"__key__": f"vid/{i:04d}", "mp4": encoded(20 + i, rate=10)}
            extra = [
                {"cls": i % 2},
                {"json": {"label": "b", "n": i}},
                {},
                {"json": {"n": i}, "txt": "words"},
                {"cls": 1},
            ]
            writer.write(clip | extra[i])
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "a.mp4").write_bytes(encoded(30, rate=10))
    (loose / "b.mp4").write_bytes(encoded(30, rate=10)[:-700])
    (loose / "c.jpg").write_bytes(still_image(5))
    (loose / "d.json").write_text("{}")
    subprocess.run(["tar", "-cf", folder / "more.tar", "a.mp4", "b.mp4", "c.jpg", "d.json"], cwd=loose, check=True)
    return folder


def test_shards_of_others_are_indexed_as_they_are(foreign: Path) -> None:
    before = contents(foreign)
    tool("make_shards", "index", foreign, "--workers", 2)
    assert before.items() <= contents(foreign).items()
    shards = Manifest.open(foreign)
    assert [(shard.name, shard.records) for shard in shards.shards] == [
        ("more.tar", 2),
        ("train-000.tar", 3),
        ("train-001.tar", 2),
    ]
    assert [shards.key(r) for r in range(7)] == ["a", "c", *(f"vid/{i:04d}" for i in range(5))]
    assert shards.column("frames").tolist() == [30, 1, 20, 21, 22, 23, 24]
    labels = [shards.classes[number] if number >= 0 else None for number in shards.column("label")]
    assert labels == [None, None, "0", "b", None, None, "1"]
    for record, key in enumerate(shards.key(r) for r in range(7)):
        with tarfile.open(foreign / shards.shard_of(record).name) as tar:
            (name,) = (n for n in tar.getnames() if n.rpartition(".")[0] == key and n.endswith(("mp4", "jpg")))
            assert shards.read(record) == tar.extractfile(name).read()  # type: ignore[union-attr]
    assert number_of(decode_clip(shards.read(1), times_s=[2])[0]) == 5
    assert {row["path"]: row["reason"] for row in read_jsonl(foreign / "rejected.jsonl")} == {
        "more.tar:b": "unreadable",
        "more.tar:d": "not one video",
    }
    assert checked(foreign, decode=True) == []
    again = index_shards(foreign, workers=1, progress=quiet)
    assert again.existed


def test_a_damaged_shard_of_others_gives_what_lies_before_the_damage(foreign: Path) -> None:
    with open(foreign / "train-000.tar", "rb") as file, tarfile.open(fileobj=file) as tar:
        third = tar.getmember("vid/0002.mp4")
    os.truncate(foreign / "train-000.tar", third.offset_data + 100)
    index_shards(foreign, workers=1, progress=quiet)
    assert {shard.name: shard.records for shard in Manifest.open(foreign).shards}["train-000.tar"] == 2
    rows = {row["path"]: row["reason"] for row in read_jsonl(foreign / "rejected.jsonl")}
    assert rows["train-000.tar"] == "damaged shard"


def test_names_in_a_tar_are_never_paths(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "evil.tar", "w") as tar:
        for name in ("../../out.mp4", "/etc/out.mp4", "good.mp4"):
            info = tarfile.TarInfo(name)
            data = encoded(10 + len(name), rate=10)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index_shards(folder, workers=1, progress=quiet)
    assert Manifest.open(folder).records == 3
    assert [row["reason"] for row in read_jsonl(folder / "rejected.jsonl")] == ["unreadable member"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_what_cannot_be_indexed_is_refused(tmp_path: Path, shards: Manifest) -> None:
    with pytest.raises(UserError, match="no such folder"):
        index_shards(tmp_path / "nowhere", workers=1, progress=quiet)
    with pytest.raises(UserError, match=r"no \.tar files"):
        index_shards(tmp_path, workers=1, progress=quiet)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"no sample that can be used.*a\.tar: damaged shard"):
        index_shards(tmp_path, workers=1, progress=quiet)


def test_ones_own_shards_are_found_indexed(tmp_path: Path, shards: Manifest) -> None:
    shutil.copytree(shards.folder, tmp_path / "own")
    before = contents(tmp_path / "own")
    summary = index_shards(tmp_path / "own", workers=1, progress=quiet)
    assert (summary.existed, summary.clips) == (True, 9)
    assert contents(tmp_path / "own") == before
    shutil.copyfile(tmp_path / "own/shard-000000.tar", tmp_path / "own/more.tar")
    with pytest.raises(UserError, match=r"more\.tar is not in the manifest, which make_shards has written \(move"):
        index_shards(tmp_path / "own", workers=1, progress=quiet)
    (tmp_path / "own/manifest.json").unlink()
    index_shards(tmp_path / "own", workers=1, progress=quiet)
    (tmp_path / "own/more.tar").unlink()
    with pytest.raises(UserError, match="not as they were when they were indexed: 4 tars, now 3"):
        index_shards(tmp_path / "own", workers=1, progress=quiet)


# -- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """A list with videos, segments, parts and images; the whole process group dies each time."""
    rows = ["path,label,start,end"]
    for i in range(12):
        (tmp_path / f"{i}.mp4").write_bytes(encoded(40 + i, rate=10, gop=5))
        rows.append(f"{i}.mp4,{i % 3},{'1.5' if i % 4 == 0 else ''},")
    (tmp_path / "still.jpg").write_bytes(still_image(3))
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    (tmp_path / "list.csv").write_text("\n".join([*rows, "still.jpg,0,,", "broken.mp4,0,,", "0.mp4,1,1.5,"]) + "\n")
    options = ["--segment", "1.5", "--images", "--shard-records", "3", "--workers", "2", "--seed", "5"]

    def command(out: Path) -> list[object]:
        return [sys.executable, TOOL, tmp_path / "list.csv", out, *options]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=LIMIT_S)
    took = time.monotonic() - began
    with subprocess.Popen(command(tmp_path / "out"), start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "out" / ".work").exists():  # once for sure, on a machine of any speed
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
    moment = random.Random(11)
    for attempt in range(40):
        with subprocess.Popen(
            command(tmp_path / "out"), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                # Later and later, so that the end is reached on any machine.
                process.wait(moment.uniform(0.2, 0.4 + 0.2 * attempt) * took)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                continue
            assert process.returncode == 0, process.stderr.read() if process.stderr else ""
            break
    assert Manifest.open(tmp_path / "out").records > 12
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
