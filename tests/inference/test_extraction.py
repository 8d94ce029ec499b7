"""tools/extract_features.py: files and index against Hugging Face's model; broken videos, kills, shards of an array."""

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load_file
from transformers import VJEPA2Model

from tests.chain import ROOT, tool
from tests.data.faulty import with_faulty_decoder
from tests.inference.checkpoint import FPS, GRID, write_checkpoint
from tests.inference.judge import close, sampled
from tests.inference.test_model import chunks_by_hand
from tests.processes import LIMIT_S
from tests.videos import encoded, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.inference import extraction
from vjepa_scale.inference.model import Model

RATE = 20
LENGTHS = {"walk/a.mp4": 84, "walk/b.mp4": 30, "run/c.mp4": 64, "run/d.mp4": 32, "run/e.mp4": 33, "f.mp4": 8}
BROKEN = {"walk/cut.mp4": "does not decode to the end", "notes.txt": "unreadable", "empty.mp4": "zero length"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for path, frames in LENGTHS.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(encoded(frames, rate=RATE, gop=10))
    (folder / "walk/cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    (folder / "notes.txt").write_text("these are not the frames you are looking for\n" * 40)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not under a temporary name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def extract(source: Path, checkpoint: Path, out: Path, *flags: object) -> str:
    """The tool in this process, which has imported torch already; what it printed."""
    arguments = [source, checkpoint, out, "--part", 4, "--workers", 1, *flags]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["extract_features.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "extract_features.py"))["main"]()
    return said.getvalue()


@pytest.fixture(scope="module")
def extracted(videos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("extracted") / "features"
    done = tool("extract_features", videos, checkpoint, out, "--part", 4, "--workers", 1, "--pool", "none")
    return out, done.stdout


def by_hand(model: Model, published: VJEPA2Model, path: Path, chunk: int) -> torch.Tensor:
    """Tokens [steps, h, w, D] of a video, of frames decoded by PyAV in order."""
    clip = model.preprocess(np.stack(sampled(path, RATE)))
    tokens = chunks_by_hand(published, clip, min(chunk, clip.shape[2] + clip.shape[2] % 2))
    return tokens[0].unflatten(0, (-1, *GRID[1:]))


def test_features_and_index(videos: Path, extracted: tuple[Path, str], model: Model, published: VJEPA2Model) -> None:
    out, said = extracted
    index = rows(out / "index.jsonl")
    assert {row["source"] for row in index} == set(LENGTHS)
    files = {name: load_file(out / name)["features"] for name in {row["file"] for row in index}}
    # Nothing in the third part can be used.
    assert {path.name for path in (out / "parts").glob("*.safetensors")} == {"000000.safetensors", "000001.safetensors"}
    assert set(files) == {"parts/000000.safetensors", "parts/000001.safetensors"}
    for path, frames in LENGTHS.items():
        mine = [row for row in index if row["source"] == path]
        values = torch.cat([files[row["file"]][row["row"] : row["row"] + row["rows"]] for row in mine])
        assert close(values, by_hand(model, published, videos / path, 8)), path
        assert {row["label"] for row in mine} == {path.split("/")[0] if "/" in path else None}
        pictures = int(np.ceil(frames / RATE * FPS))
        starts = range(0, pictures, 8)
        assert [row["start_s"] for row in mine] == pytest.approx([k / FPS for k in starts])
        assert [row["end_s"] for row in mine] == pytest.approx(
            [min(min(k + 8, pictures) / FPS, frames / RATE) for k in starts]
        )
    # Every row of every file belongs to exactly one line.
    for name, features in files.items():
        taken = [k for row in index if row["file"] == name for k in range(row["row"], row["row"] + row["rows"])]
        assert sorted(taken) == list(range(len(features)))
    rejected = rows(out / "rejected.jsonl")
    assert {row["path"]: row["reason"] for row in rejected} == BROKEN
    assert said.splitlines()[-1] == (
        f"{out}: {len(index)} chunks in 3 parts; rejected: 3 videos (see {out / 'rejected.jsonl'})"
    )


@pytest.mark.parametrize(("pool", "layers"), [("mean", None), ("time", None), ("mean", "0,-1"), ("none", "1,2")])
def test_pooling_and_layers(
    videos: Path, checkpoint: Path, model: Model, published: VJEPA2Model, tmp_path: Path, pool: str, layers: str | None
) -> None:
    flags = ["--pool", pool, "--chunk", 6, "--dtype", "float16", *(["--layers", layers] if layers else [])]
    extract(videos / "run", checkpoint, tmp_path / "out", *flags)
    index = rows(tmp_path / "out" / "index.jsonl")
    features = load_file(tmp_path / "out" / "parts" / "000000.safetensors")["features"]
    assert features.dtype == torch.float16
    clip = model.preprocess(np.stack(sampled(videos / "run/c.mp4", RATE)))  # 16 pictures: 6, 6, and 4 of the last 6
    with torch.no_grad():
        for row, (first, new) in zip(index, [(0, 6), (6, 6), (10, 4)], strict=False):
            hidden = published.encoder.embeddings(clip[:, :, first : first + 6].transpose(1, 2))
            outputs = []
            for layer in published.encoder.layer:
                hidden = layer(hidden, None)[0]
                outputs.append(published.encoder.layernorm(hidden)[0].unflatten(0, (3, *GRID[1:]))[-new // 2 :])
            chosen = {None: outputs[-1], "0,-1": [outputs[0], outputs[2]], "1,2": outputs[1:]}[layers]
            wanted = chosen if layers is None else torch.stack(chosen, dim=3)  # [steps, h, w, (L,) D]
            wanted = {"mean": lambda w: w.mean((0, 1, 2))[None], "time": lambda w: w.mean((1, 2)), "none": lambda w: w}[
                pool
            ](wanted)
            assert row["source"] == "c.mp4"
            value = features[row["row"] : row["row"] + row["rows"]].float()
            assert close(value, wanted, 1e-3)  # float16 on disk
    assert index[2]["start_s"] == pytest.approx(12 / FPS)


def test_shards_give_the_features_of_their_videos(
    videos: Path, checkpoint: Path, extracted: tuple[Path, str], tmp_path: Path
) -> None:
    tool("make_shards", videos, tmp_path / "shards", "--shard-records", 4, "--workers", 1)
    out = tmp_path / "out"
    extract(tmp_path / "shards", checkpoint, out, "--pool", "none")
    from_files = {(row["source"], row["start_s"]): row for row in rows(extracted[0] / "index.jsonl")}
    from_shards = {(row["source"], row["start_s"]): row for row in rows(out / "index.jsonl")}
    assert from_files.keys() == from_shards.keys()
    for key, row in from_shards.items():
        theirs = from_files[key]
        assert (row["label"], row["end_s"]) == (theirs["label"], pytest.approx(theirs["end_s"]))
        assert row["shard"].startswith("shard-00000")
        assert len(row["key"]) == 9
        a, b = (
            load_file(folder / r["file"])["features"][r["row"] : r["row"] + r["rows"]]
            for folder, r in ((out, row), (extracted[0], theirs))
        )
        assert close(a, b)  # they share a forward pass with other clips: not to the bit
    assert (out / "rejected.jsonl").read_bytes() == b""


@pytest.mark.slow
def test_a_record_that_crashes_the_decoder_is_left_out_and_the_others_are_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name, length in {"a": 30, "b": 64, "c": 32}.items():
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(encoded(length, rate=RATE, gop=10))
    tool("make_shards", tmp_path / "videos", tmp_path / "shards", "--workers", 1)
    shards = Manifest.open(tmp_path / "shards")
    paths = [json.loads(shards.read(record, "json"))["path"] for record in range(3)]
    flags = ("--part", "4", "--workers", "2", "--pool", "none", "--chunk", "2", "--batch", "2")  # many jobs of a video
    extract(tmp_path / "shards", checkpoint, tmp_path / "whole", *flags)
    at = int(shards.column("video.offset")[1])
    with open(shards.folder / shards.shard_of(1).name, "r+b") as file:
        file.seek(at)
        file.write(b"DIES")
    command = [ROOT / "tools" / "extract_features.py", tmp_path / "shards", checkpoint, tmp_path / "out", *flags]
    environment = with_faulty_decoder(tmp_path)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    (left_out,) = rows(tmp_path / "out" / "rejected.jsonl")
    assert (left_out["path"], left_out["reason"]) == (paths[1], "crashes the decoder")
    whole, found = (
        {
            (row["source"], row["start_s"]): load_file(folder / row["file"])["features"][row["row"]]
            for row in rows(folder / "index.jsonl")
        }
        for folder in (tmp_path / "whole", tmp_path / "out")
    )
    assert {source for source, _ in found} == {paths[0], paths[2]}
    assert found.keys() == {key for key in whole if key[0] != paths[1]}
    assert all(close(found[key], whole[key]) for key in found)  # they shared forward passes with other clips


def test_array_jobs_share_the_work(videos: Path, checkpoint: Path, extracted: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = extract(videos, checkpoint, out, "--pool", "none", "--shard", "1/2")
    assert "2 parts of other shards are missing" in said
    assert {p.name.split(".")[0] for p in (out / "parts").iterdir()} == {"000001"}
    assert not (out / "index.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    extract(videos, checkpoint, out, "--pool", "none", "--shard", "0/2")
    assert contents(out) == contents(extracted[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_killed_and_repeated_is_undisturbed(
    videos: Path, checkpoint: Path, extracted: tuple[Path, str], tmp_path: Path
) -> None:
    """kill -9 when the first part is whole, and again between a part's features and its index."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools" / "extract_features.py", videos, checkpoint, out]
    flags = ["--pool", "none", "--part", "4", "--workers", "1"]
    for awaited in ("000000.jsonl", "000001.safetensors"):
        process = subprocess.Popen([*map(str, command), *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + LIMIT_S
        while not (out / "parts" / awaited).exists():
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "index.jsonl").exists()
    (out / "parts" / ".000001.safetensors.77.tmp").write_bytes(b"left by a kill")
    (out / "parts" / "000001.jsonl").unlink(missing_ok=True)  # as if the kill had come before it in any case
    first = (out / "parts" / "000000.jsonl").stat().st_mtime_ns
    extract(videos, checkpoint, out, "--pool", "none")
    assert contents(out) == contents(extracted[0])
    assert (out / "parts" / "000000.jsonl").stat().st_mtime_ns == first
    assert not list((out / "parts").glob(".*"))


def test_what_is_refused(videos: Path, checkpoint: Path, extracted: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").write_text("")
    (tmp_path / "bad" / "x").mkdir(parents=True)
    (tmp_path / "bad" / "x" / "notes.txt").write_text("nothing here\n")
    cases = [
        ([videos, extracted[0], "--pool", "mean"], "features of another pool ("),
        ([videos / "run", extracted[0], "--pool", "none"], "features of another source"),
        ([videos, tmp_path / "full"], "OUT is not empty"),
        ([tmp_path / "bad", tmp_path / "none"], "none of 1 videos can be used: 1 "),
        ([tmp_path / "nowhere", tmp_path / "new"], "nowhere: no such folder"),
        ([videos, tmp_path / "new", "--chunk", 3], "--chunk: 3 frames (a multiple of 2)"),
        ([videos, tmp_path / "new", "--layers", "0,3"], "--layers"),
        ([videos, tmp_path / "new", "--shard", "2/2"], "--shard: '2/2'"),
    ]
    for (source, out, *flags), message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            extract(source, checkpoint, out, *flags)
    assert not (tmp_path / "new").exists()


def test_features_of_another_checkpoint_are_never_mixed_in(checkpoint: Path, tmp_path: Path) -> None:
    """A job of an array has begun; the next is given other weights, or the same ones for other pictures."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(encoded(30, rate=RATE, gop=10))
    out = tmp_path / "out"
    extract(tmp_path / "videos", checkpoint, out, "--shard", "1/2")  # of one part: nothing is left for it to do
    before = contents(out)
    assert set(before) == {"extract.json"}
    others = {"trained on": {"moved": 1e-3}, "other pixels": {"mean": (0.1, 0.2, 0.3)}, "other rate": {"fps": 4.0}}
    for name, values in others.items():
        other = write_checkpoint(tmp_path / name, **values)
        with pytest.raises(UserError, match=r"OUT holds features of another model \(give another OUT"):
            extract(tmp_path / "videos", other, out, "--shard", "0/2")
    assert contents(out) == before


def test_shards_with_pictures_and_shards_of_others(checkpoint: Path, tmp_path: Path) -> None:
    """A picture is no video; a record that others have made may come without a word about itself."""
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.mp4").write_bytes(encoded(40, rate=RATE))
    (tmp_path / "mixed" / "b.jpg").write_bytes(still_image())
    tool("make_shards", tmp_path / "mixed", tmp_path / "shards", "--images", "--workers", 1)
    extract(tmp_path / "shards", checkpoint, tmp_path / "out")
    assert {row["source"] for row in rows(tmp_path / "out" / "index.jsonl")} == {"a.mp4"}
    (rejected,) = rows(tmp_path / "out" / "rejected.jsonl")
    assert (rejected["path"], rejected["reason"]) == ("b.jpg", "a picture")

    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs" / "s-%03d.tar"), verbose=0) as writer:
        writer.write({"__key__": "one", "mp4": encoded(40, rate=RATE)})
    tool("make_shards", "index", tmp_path / "theirs")
    extract(tmp_path / "theirs", checkpoint, tmp_path / "out2")
    assert {row["source"] for row in rows(tmp_path / "out2" / "index.jsonl")} == {"s-000.tar:one"}


def test_features_that_an_earlier_version_began_go_on_beside_what_a_file_manager_left(tmp_path: Path) -> None:
    """It counted such files among the sources, whose stretches have numbers."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "out").mkdir()
    for name in (".DS_Store", "a.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"x")
    assert extraction._folder(tmp_path / "videos", tmp_path / "out").count == 1
    listing = hashlib.sha256(b"'.DS_Store' 1\n'a.mp4' 1\n").hexdigest()
    begun = {"source": {"videos": 2, "listing": listing}}
    (tmp_path / "out" / extraction.SETTINGS).write_text(json.dumps(begun))
    assert extraction._folder(tmp_path / "videos", tmp_path / "out").count == 2
