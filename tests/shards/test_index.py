"""index: members that lie apart in their tar, tars that are none, members that are too long to be held."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards import index
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.index import index_shards
from vjepa_scale.video.container import FileSlice, open_media


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [encoded(4 + i, rate=10) for i in range(3)]


def packed(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of members in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def indexed(folder: Path) -> tuple[Manifest, list[tuple[str, str]], list[str]]:
    """The manifest, (key, label) of its records, and what was rejected (path: reason)."""
    index_shards(folder, workers=1, progress=quiet)
    shards = Manifest.open(folder)
    labels = [shards.classes[number] if number >= 0 else "" for number in shards.column("label")]
    rejected = [f"{row['path']}: {row['reason']}" for row in read_jsonl(folder / "rejected.jsonl")]
    return shards, [(shards.key(r), label) for r, label in enumerate(labels)], rejected


def test_members_that_lie_apart_are_one_sample(tmp_path: Path, clips: list[bytes]) -> None:
    a, b, c = clips
    known = json.dumps({"label": "walk"}).encode()
    packed(tmp_path / "x.tar", [("b.cls", b"run"), ("c.json", known), ("a.mp4", a), ("b.mp4", b), ("a.txt", b"word")])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:  # "a": appended to
        for name, data in (("c.mp4", c), ("a.cls", b"jump"), ("c.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards, labels, rejected = indexed(tmp_path)
    assert labels == [("b", "run"), ("c", "walk"), ("a", "jump")]
    assert [shards.read(r) for r in range(3)] == [b, c, a]
    assert shards.read(1, "json") == known
    assert rejected == ["x.tar: unreadable member"]  # the second c.json
    assert check_shards(tmp_path, decode=True, workers=1, progress=quiet) == []


def test_where_it_is_not_known_what_belongs_together_the_sample_is_rejected(tmp_path: Path, clips: list[bytes]) -> None:
    a, b, c = clips
    packed(
        tmp_path / "x.tar",
        [
            *(("0.mp4", a), ("0.cls", b"x"), ("1.mp4", a), ("2.cls", b"x"), ("0.mp4", b), ("0.cls", b"y")),
            *(("1.mp4", b), ("1.cls", b"y"), ("1.cls", b"z")),
        ],
    )
    packed(tmp_path / "y.tar", [("1.cls", b"x"), ("1.mp4", a), ("3.mp4", c), ("1.mp4", b)])
    packed(tmp_path / "z.tar", [("1.mp4", a), ("3.mp4", c), ("1.mp4", b), ("3.cls", b"z"), ("1.cls", b"x")])
    labels, rejected = indexed(tmp_path)[1:]
    assert labels == [*(("0", "x"), ("1", ""), ("0", "y"), ("1", "y")), ("1", "x"), ("3", ""), ("1", ""), ("3", "z")]
    assert rejected == ["x.tar: unreadable member", "x.tar:2: not one video", "z.tar:1: members lie apart"]


def test_labels_that_lie_in_another_tar_are_told(tmp_path: Path, clips: list[bytes]) -> None:
    packed(tmp_path / "labels.tar", [("a.cls", b"x"), ("b.cls", b"y")])
    packed(tmp_path / "videos.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1])])
    summary = index_shards(tmp_path, workers=1, progress=quiet)
    assert (summary.clips, summary.classes, summary.unlabelled) == (2, 0, 2)
    details = [row["detail"] for row in read_jsonl(tmp_path / "rejected.jsonl")]
    assert details == ["members: cls; a video of this key must be in this tar"] * 2


def test_what_is_named_as_a_tar_and_is_no_file_is_told(tmp_path: Path, clips: list[bytes]) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar is not a file"):
        index_shards(tmp_path, workers=1, progress=quiet)
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to(tmp_path / "nowhere")
    packed(tmp_path / "x.tar", [("a.mp4", clips[0])])
    shards, _, rejected = indexed(tmp_path)
    assert shards.records == 1
    assert rejected == [f"{name}.tar: unreadable" for name in ("folder", "link", "pipe")]


def test_no_member_is_held_whole(tmp_path: Path, clips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_LONGEST_TEXT", 2**20)
    length = 2**25
    box = length.to_bytes(4, "big") + b"free"
    packed(tmp_path / "x.tar", [("a.mp4", clips[0] + box + bytes(length - 8)), ("b.mp4", clips[1])])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        info = tarfile.TarInfo("b.json")
        info.size = length
        tar.addfile(info, io.BytesIO(bytes(length)))
    tracemalloc.start()
    try:
        found = index._index(tmp_path / "x.tar")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [sample.key for sample in found.found] == ["a"]
    assert [(row.path, row.reason) for row in found.rejected] == [("x.tar:b", "a member is too long")]
    assert peak < 2**23


def test_a_slice_reads_as_the_file_that_it_is(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(whole)
    with open_media(FileSlice(tmp_path / "x", 100, 9000)) as ours, io.BytesIO(whole[100:9100]) as theirs:
        for offset, whence, length in ((0, 0, 10), (5, 1, 8200), (-30, 2, 100), (0, 2, 1), (9500, 0, 4), (17, 0, -1)):
            assert ours.seek(offset, whence) == theirs.seek(offset, whence)
            assert ours.read(length) == theirs.read(length)
            assert ours.tell() == theirs.tell()
