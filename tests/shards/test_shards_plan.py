"""Listing, planning and writing at scale, against the plain ways of doing the same."""

import io
import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.shards.test_shards_inputs import rejected, samples
from tests.videos import encoded, quiet
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards import sources
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.shards.plan import duplicates, shard_ends
from vjepa_scale.shards.sources import Source, list_sources, read_list
from vjepa_scale.shards.tars import TarWriter
from vjepa_scale.shards.write import keys

# -- sources --------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files whose names sort one way as names and another as paths, links, and a ring of links."""
    folder = tmp_path / "tree"
    names = ["a/1", "a b", "a-/x", "a.b/y", "a0", "A/z", "b/c/d/e", "b/c.d", "b/c!", "ü", "b/\udcff", "new\nline"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "b" / "ring").symlink_to(folder / "b")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "self").symlink_to("self")
    (folder / "zz").symlink_to(folder / "a")  # comes after the folder itself
    return folder


@pytest.mark.parametrize("held", [2, 500_000])
def test_files_come_in_the_order_of_their_paths(
    tree: Path, held: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "_NAMES_HELD", held)
    found = subprocess.run(["find", ".", "!", "-type", "d", "-print0"], cwd=tree, capture_output=True, check=True)
    paths = [os.fsdecode(path).removeprefix("./") for path in found.stdout.split(b"\0")[:-1]]
    expected = sorted(path for path in paths if path not in ("b/ring", "zz"))
    assert len(expected) == 14
    assert list_sources(tree, tmp_path / "out") == expected


def test_a_folder_that_cannot_be_listed_is_rejected(tmp_path: Path) -> None:
    """Folders inside each other until the path is longer than the system takes."""
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(encoded(8))
    name = "d" * 200
    subprocess.run(
        ["sh", "-c", f"for i in $(seq 22); do mkdir {name} && cd -P {name} || exit 1; done"], cwd=videos, check=True
    )
    try:
        summary = make_shards(videos, tmp_path / "out", Settings(), workers=1, progress=quiet)
        (row,) = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    finally:
        subprocess.run(["rm", "-rf", name], cwd=videos, check=True)
    assert set(row["path"].split("/")) == {name}
    assert (row["reason"], row["detail"]) == ("unreadable", "File name too long")
    assert (summary.clips, summary.rejected) == (1, {"unreadable": 1})


def test_cells_of_a_csv_list_may_hold_lines_and_other_separators(tmp_path: Path) -> None:
    text = 'path,caption\r\na.mp4,"first\nsecond, ""quoted"""\r\nb.mp4,one\x0btwo\u2028three\r\n'
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_list(tmp_path / "list.csv")) == [
        Source("a.mp4", metadata={"caption": 'first\nsecond, "quoted"'}),
        Source("b.mp4", metadata={"caption": "one\x0btwo\u2028three"}),
    ]


# -- planning -------------------------------------------------------------------------------------


def test_duplicates_are_those_of_a_dictionary() -> None:
    random = np.random.default_rng(3)
    for n, values in itertools.product((0, 1, 2, 50, 1000), (1, 3, 10**6)):
        first, second = (random.integers(0, values, n).astype(np.uint64) << np.uint64(40) for _ in range(2))
        seen: dict[tuple[int, int], int] = {}
        expected = []
        for i, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            if seen.setdefault(pair, i) != i:
                expected.append((i, seen[pair]))
        copies, firsts = duplicates(first, second)
        assert list(zip(copies.tolist(), firsts.tolist(), strict=True)) == expected


def test_shards_are_filled_as_one_by_one() -> None:
    random = np.random.default_rng(4)
    for n in (1, 2, 200):
        sizes = random.integers(0, 3_500_000, n)
        ends, held = list[int](), 0
        for i, size in enumerate(sizes.tolist()):
            if i and held and held + size > 4_000_000:
                ends.append(i)
                held = 0
            held += size
        assert shard_ends(sizes, Settings(shard_mb=4)).tolist() == [*ends, n]
        counted = shard_ends(sizes, Settings(shard_records=7)).tolist()
        assert np.diff([0, *counted]).tolist() == [7] * (n // 7) + [n % 7] * (n % 7 > 0)


def test_keys_are_numbers_in_nine_digits() -> None:
    assert keys(12345).tolist() == [f"{i:09d}".encode() for i in range(12345)]
    assert keys(12345).dtype == "S9"


def test_what_is_the_same_is_told_by_its_bytes_and_the_first_is_named(tmp_path: Path) -> None:
    clips = [encoded(8 + i) for i in range(3)]
    (tmp_path / "videos").mkdir()
    for number, clip in enumerate([0, 1, 0, 2, 1, 0]):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(clips[clip])
    make_shards(tmp_path / "videos", tmp_path / "out", Settings(), workers=2, progress=quiet)
    rows = [(row["path"], row["detail"]) for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")]
    assert rows == [("2.mp4", "of 0.mp4"), ("4.mp4", "of 1.mp4"), ("5.mp4", "of 0.mp4")]
    assert set(rejected(tmp_path / "out").values()) == {"duplicate"}
    assert [known["path"] for known, _ in samples(tmp_path / "out")] == ["0.mp4", "1.mp4", "3.mp4"]


def test_a_copy_in_another_class_is_told_from_one_in_the_same(tmp_path: Path) -> None:
    clip, videos = encoded(8), tmp_path / "videos"
    for name in ("run/a.mp4", "run/b.mp4", "walk/a.mp4", "z.mp4"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(clip)
    summary = make_shards(videos, tmp_path / "out", Settings(), workers=1, progress=quiet)
    rows = {row["path"]: (row["reason"], row["detail"]) for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")}
    other = "duplicate with another label"
    assert rows == {
        "run/b.mp4": ("duplicate", "of run/a.mp4"),
        "walk/a.mp4": (other, "of run/a.mp4, whose label is 'run'; this one's is 'walk'"),
        "z.mp4": (other, "of run/a.mp4, whose label is 'run'; this one's is None"),
    }
    assert summary.rejected == {other: 2, "duplicate": 1}


# -- writing --------------------------------------------------------------------------------------


def test_a_shard_is_what_webdatasets_own_writer_makes(shards: Manifest, tmp_path: Path) -> None:
    for shard in shards.shards:
        with open(tmp_path / shard.name, "wb") as file:
            writer = webdataset.TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="")
            for sample in webdataset.WebDataset(str(shards.folder / shard.name), shardshuffle=False):
                writer.write(
                    {name: value for name, value in sample.items() if name in ("__key__", "json", "mp4", "mkv", "avi")}
                )
            writer.close()
        assert (tmp_path / shard.name).read_bytes() == (shards.folder / shard.name).read_bytes()


def test_a_large_member_is_read_back_by_tar(tmp_path: Path) -> None:
    blocks = [np.random.default_rng(i).bytes(2**20 + i) for i in range(40)]
    with open(tmp_path / "x.tar", "wb") as file:
        tar = TarWriter(file)
        place = tar.add("large.bin", sum(map(len, blocks)), blocks)
        tar.add("small.json", 2, [b"{}"])
        tar.close()
    subprocess.run(["tar", "-xf", "x.tar"], cwd=tmp_path, check=True)
    assert (tmp_path / "large.bin").read_bytes() == b"".join(blocks)
    assert (tmp_path / "small.json").read_bytes() == b"{}"
    data = (tmp_path / "x.tar").read_bytes()
    assert data[place.offset : place.offset + place.size] == b"".join(blocks)
    assert len(data) == tar.size
    summed = subprocess.run(["sha256sum", tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert summed.stdout.split()[0] == tar.sha256


def test_columns_are_as_numpy_saves_them(shards: Manifest) -> None:
    names = json.loads((shards.folder / "manifest.json").read_text())["columns"]
    assert len(names) == 11
    for described in names:
        path = shards.folder / described["file"]
        saved = io.BytesIO()
        np.save(saved, np.load(path))
        assert saved.getvalue() == path.read_bytes()
        summed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert summed.stdout.split()[0] == described["sha256"]


@pytest.mark.parametrize("change", ["longer", "shorter", "other", "gone"])
def test_a_file_that_has_changed_since_it_was_probed_is_an_error(change: str, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    data = encoded(8)
    (videos / "a.mp4").write_bytes(data)

    def spoil(doing: str, done: int, total: int) -> None:
        changed = {"longer": data + b"x", "shorter": data[:-1], "other": data[:-1] + b"x"}
        (videos / "a.mp4").unlink()
        if change != "gone":
            (videos / "a.mp4").write_bytes(changed[change])

    with pytest.raises(Exception, match="cannot be read any more" if change == "gone" else "has changed since"):
        make_shards(videos, tmp_path / "out", Settings(), workers=1, progress=spoil)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".shard*"))
