"""One small folder of videos and its shards for all tests of this room."""

from pathlib import Path

import pytest

from tests.data.videos import audio_only, encoded
from vjepa_scale.data.ingest.shards import Settings, make_shards
from vjepa_scale.data.manifest import Manifest

VARIABLE_MS = [0, 40, 180, 300, 420, 700, 1000, 1100, 1500, 2000, 2300, 2400, 2900, 3100]


def quiet(doing: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good videos in two classes, and five bad files."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "up").mkdir()
    (folder / "down" / "deep").mkdir(parents=True)
    for i in range(5):
        (folder / "up" / f"clip {i}.mp4").write_bytes(encoded(30 + 7 * i, rate=20, gop=8))
    for i in range(3):
        (folder / "down" / "deep" / f"{i}.MKV").write_bytes(
            encoded(14, pts_ms=[ms + 10 * i for ms in VARIABLE_MS], gop=5, container="matroska")
        )
    (folder / "no.class.avi").write_bytes(encoded(50, rate=25, container="avi", codec="mpeg4"))
    (folder / "up" / "empty.mp4").write_bytes(b"")
    (folder / "up" / "notes.txt").write_text("not a video\n")
    (folder / "up" / "sound.wav").write_bytes(audio_only())
    (folder / "cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    return folder


@pytest.fixture(scope="session")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("made") / "shards"
    make_shards(videos, out, Settings(seed=3, shard_records=4), workers=2, progress=quiet)
    return Manifest.open(out)
