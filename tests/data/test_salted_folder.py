"""Real videos and what accidents make of them, through tools/make_shards.py: every file is accounted for."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.chain import tool
from tests.video.judge import timeline
from tests.video.real_videos import real_video
from tests.video.test_real_videos import VERDICTS, assert_same_pictures
from tests.videos import still_image
from vjepa_scale.core.files import read_jsonl

WHOLE = ["realshort.mp4", "motion.mov", "hello.avi", "hello.mpeg", "hello.ogg", "newtonscradle.gif", "bikes.mp4"]
# These say in their header how long they are; of the others the first half is a shorter video, as good as any.
SAYS_ITS_LENGTH = (".mp4", ".mov", ".avi")


def broken(name: str, data: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """(what became of it, its bytes, whether it must be left out) of one video and many accidents."""
    says = name.endswith(SAYS_ITS_LENGTH)
    for percent in (10, 30, 60, 90):
        yield f"cut at {percent} percent", data[: len(data) * percent // 100], says
    yield "first 64 bytes zeroed", bytes(64) + data[64:], False
    yield "without its first 1000 bytes", data[1000:], False
    yield "all zero", bytes(len(data)), True
    for size in (16, 2_000, len(data) // 4):
        middle = len(data) // 2
        yield f"{size} bytes in the middle zeroed", data[:middle] + bytes(size) + data[middle + size :], False
    noise = np.random.default_rng(0)
    for _ in range(3):
        at, size = int(noise.integers(len(data) // 4, len(data) - 600)), 500
        yield f"noise at {at}", data[:at] + noise.bytes(size) + data[at + size :], False


@pytest.fixture(scope="module")
def salted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    """A folder, and for each file in it whether it must be left out (False: it may be)."""
    folder = tmp_path_factory.mktemp("salted") / "videos"
    folder.mkdir()
    must: dict[str, bool] = {}

    def put(name: str, data: bytes, out: bool) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        must[name] = out

    for name in (*WHOLE, "cockatoo.mp4"):
        put(name, real_video(name).read_bytes(), VERDICTS[name] is not None)
    for name in WHOLE:
        for what, data, out in broken(name, real_video(name).read_bytes()):
            put(f"broken/{what} {name}", data, out)
    put("empty.mp4", b"", True)
    put("text.mp4", b"Dear Ada, the videos are on the other disk.\n" * 200, True)
    put("picture.mp4", still_image(3), True)
    put("sound.mp4", real_video("sound.ogg").read_bytes(), True)
    put("z copy of motion.mov", real_video("motion.mov").read_bytes(), True)
    put("folder.mp4/z copy of bikes.mp4", real_video("bikes.mp4").read_bytes(), True)
    put("locked.mp4", real_video("realshort.mp4").read_bytes() + bytes(100), os.geteuid() != 0)
    (folder / "locked.mp4").chmod(0)
    (folder / "empty folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder, must | {"gone.mp4": True, "pipe.mp4": True}


@pytest.mark.slow
def test_every_file_of_a_salted_folder_is_accounted_for(salted, tmp_path: Path, record_property) -> None:
    folder, must = salted
    out = tmp_path / "shards"
    tool("make_shards", folder, out, "--workers", 2)
    rejected = {row["path"]: row for row in read_jsonl(out / "rejected.jsonl")}
    kept = samples(out)
    files = [str((Path(top) / name).relative_to(folder)) for top, _, names in os.walk(folder) for name in names]
    assert sorted(files) == sorted([*rejected, *kept])
    assert sorted(files) == sorted(must)
    assert all(row["reason"] for row in rejected.values())
    assert [name for name, out_it_must in must.items() if out_it_must and name in kept] == []
    assert set(WHOLE) <= set(kept)
    assert {name: rejected[name]["reason"] for name in must if "/" not in name and name in rejected} == {
        "cockatoo.mp4": "decode mismatch after seek",
        "empty.mp4": "zero length",
        "text.mp4": "unreadable",
        "picture.mp4": "not a video",
        "sound.mp4": "no video stream",
        "z copy of motion.mov": "duplicate",
        "gone.mp4": "unreadable",
        "pipe.mp4": "unreadable",
        **({"locked.mp4": "unreadable"} if os.geteuid() else {}),
    }
    assert rejected["folder.mp4/z copy of bikes.mp4"]["reason"] == "duplicate with another label"
    for name, data in kept.items():
        assert data == (folder / name).read_bytes()
    unseen = sorted(name for name in kept if name.startswith("broken/"))
    for name in unseen:  # damage that the decoder paints over shows the same picture whichever way it is reached
        assert_same_pictures(folder / name, timeline(folder / name))
    counts = Counter(row["reason"] for row in rejected.values())
    said = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    record_property("measured", f"{len(files)} files, {len(kept)} kept, left out: {said}")
    record_property("measured", f"damaged and kept, as they decode: {len(unseen)}: " + "; ".join(unseen))


def samples(folder: Path) -> dict[str, bytes]:
    """Path → bytes of every clip in the shards, each once."""
    found: dict[str, bytes] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, known in members.items():
            if name.endswith(".json"):
                (clip,) = (n for n in members if n.startswith(name[:-4]) and n != name)
                path = json.loads(known)["path"]
                assert path not in found
                found[path] = members[clip]
    return found
