"""Labels, class names and metadata of evaluated clips, against plain webdataset reading the same shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from tests.videos import encoded, number_of, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import evaluation_clips, segment_draws
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.index import index_shards
from vjepa_scale.shards.make import Settings, make_shards

GEOMETRY = {"frames": 2, "size": (48, 64), "fps": 4.0}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A list of JSON lines with captions: five videos and two pictures in three classes, shuffled into shards."""
    folder = tmp_path_factory.mktemp("listed")
    rows = []
    for i in range(7):
        path = folder / f"{i}.{'png' if i > 4 else 'mp4'}"
        path.write_bytes(still_image(i, codec="png") if i > 4 else encoded(16 + 8 * i, rate=8, gop=8))
        label = ["walks", "sits", "läuft"][i % 3]
        rows.append({"path": path.name, "label": label, "caption": f"number {i}", "scores": [i, None]})
    videos = folder / "videos.jsonl"
    videos.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shards(videos, folder / "shards", Settings(shard_records=3, images=True), workers=1, progress=quiet)
    return Manifest.open(folder / "shards")


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_names_and_metadata_are_those_that_plain_webdataset_reads(listed: Manifest, workers: int) -> None:
    urls = sorted(str(path) for path in listed.folder.glob("*.tar"))
    theirs = [json.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    shown = list(evaluation_clips(listed, **GEOMETRY, batch=3, metadata=True, workers=workers))
    assert [len(part.clips) for part in shown] == [3, 3, 1]
    assert [record for part in shown for record in part.records] == list(range(7))
    ours = [known for part in shown for known in part.metadata]
    assert ours == theirs
    assert sorted(known["metadata"]["caption"] for known in ours) == [f"number {i}" for i in range(7)]
    names = [name for part in shown for name in part.classes]
    assert names == [known["label"] for known in theirs]
    labels = torch.cat([part.labels for part in shown]).tolist()
    assert len({(label, name) for label, name in zip(labels, names, strict=True)}) == 3
    assert sorted(set(labels)) == [0, 1, 2]


def test_classes_of_the_task_and_chosen_records(listed: Manifest) -> None:
    task = ["läuft", "stands", "sits", "walks"]
    (part,) = evaluation_clips(listed, **GEOMETRY, batch=9, classes=task, records=[5, 0], metadata=False)
    assert part.metadata is None
    assert part.records == (5, 0)
    for record, label, name in zip(part.records, part.labels.tolist(), part.classes, strict=True):
        assert task[label] == name == json.loads(listed.read(record, "json"))["label"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), verbose=0) as writer:
        for i in range(3):
            known = {} if i == 1 else {"json": {"caption": f"number {i}"}}
            writer.write({"__key__": f"sample{i}", "mp4": encoded(16), "cls": i % 2, **known})
    return tmp_path


def test_indexed_samples_have_the_json_that_their_maker_gave_them_if_any(theirs: Path) -> None:
    index_shards(theirs, workers=1, progress=quiet)
    (part,) = evaluation_clips(Manifest.open(theirs), **GEOMETRY, batch=9, metadata=True)
    assert part.metadata == ({"caption": "number 0"}, {}, {"caption": "number 2"})
    assert part.classes == ("0", "1", "0")


def test_json_that_was_damaged_names_its_record(theirs: Path) -> None:
    index_shards(theirs, workers=1, progress=quiet)
    manifest = Manifest.open(theirs)
    with open(theirs / manifest.shards[0].name, "r+b") as file:
        file.seek(int(manifest.column("json.offset")[2]))
        file.write(b"[")
    list(evaluation_clips(manifest, **GEOMETRY, batch=9))  # nobody asked for it
    with pytest.raises(UserError, match=r"s-000\.tar: the JSON of record sample2 is no JSON object"):
        list(evaluation_clips(manifest, **GEOMETRY, batch=9, metadata=True))


@pytest.mark.parametrize(
    ("duration", "window", "segments", "starts"),
    [
        (10.0, 4.0, 1, [3.0]),
        (10.0, 4.0, 2, [0.5, 5.5]),  # two halves of 5 s, a window in the middle of each
        (12.0, 2.0, 3, [1.0, 5.0, 9.0]),
        (6.0, 4.0, 3, [0.0, 1.0, 2.0]),  # parts too short: overlapping, from start to end
        (3.0, 4.0, 2, [0.0, 0.0]),  # too short a video: its last picture is repeated
    ],
)
def test_segments_are_evenly_spread(duration: float, window: float, segments: int, starts: list[float]) -> None:
    draws = segment_draws(duration, window, segments)
    assert [draw * max(0.0, duration - window) for draw in draws] == pytest.approx(starts, abs=1e-12)


def test_views_of_a_video_are_its_segments_and_crops(tmp_path: Path) -> None:
    """60 numbered pictures at 8 per second, the number in the columns of each; three windows of two, 1/4 s apart."""
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "video.mp4").write_bytes(encoded(60, rate=8, gop=8))
    (tmp_path / "videos" / "a" / "short.mp4").write_bytes(encoded(12, rate=8, gop=8))
    make_shards(tmp_path / "videos", tmp_path / "shards", Settings(), workers=1, progress=quiet)
    manifest = Manifest.open(tmp_path / "shards")
    record = int(manifest.column("duration").argmax())
    kind: dict[str, Any] = {"frames": 2, "fps": 4.0, "batch": 2, "records": [record]}
    (part,) = evaluation_clips(manifest, size=(48, 64), **kind, segments=3)
    assert part.clips.shape == (3, 3, 2, 48, 64)
    assert (len(part.labels), part.records) == (1, (record,))
    # Parts of 2.5 s; a window of 0.5 s in the middle of each begins after 1, 3.5 and 6 s: pictures 8, 28 and 48.
    shown = [[number_of(view[:, t].permute(1, 2, 0).numpy()) for t in range(2)] for view in part.clips]
    assert shown == [[8, 10], [28, 30], [48, 50]]

    (middle,) = evaluation_clips(manifest, size=(48, 64), **kind)
    assert torch.equal(middle.clips, part.clips[1:2])
    (crops,) = evaluation_clips(manifest, size=(48, 48), **kind, crops=3)
    (whole,) = evaluation_clips(manifest, size=(48, 64), **kind)
    for view, left in zip(crops.clips, (0, 8, 16), strict=True):
        assert torch.equal(view, whole.clips[0, ..., left : left + 48])
    (both,) = evaluation_clips(manifest, size=(48, 48), **kind, segments=3, crops=3)
    assert torch.equal(both.clips[3:6], crops.clips)
    batched = list(evaluation_clips(manifest, size=(48, 48), frames=2, fps=4.0, batch=2, segments=3, crops=3))
    assert torch.equal(batched[0].clips[9 * record : 9 * record + 9], both.clips)
    assert len(batched[0].clips) == 18
