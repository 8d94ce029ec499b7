"""Labels, class names and metadata of evaluated clips, against plain webdataset reading the same shards."""

import json
from pathlib import Path

import pytest
import torch
import webdataset

from tests.data.conftest import quiet
from tests.data.videos import encoded, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.ingest.index import index_shards
from vjepa_scale.data.ingest.shards import Settings, make_shards
from vjepa_scale.data.manifest import Manifest

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
