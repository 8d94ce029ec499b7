"""Clips that do not decode: what is shown in their place depends on nothing but seed, step, slot and attempt."""

import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from tests.chain import write_four_stages
from tests.data.faulty import with_faulty_decoder
from tests.data.test_loader import as_global, recipe_for
from tests.processes import LIMIT_S
from tests.videos import encoded
from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.data import host_limits
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.clips import ClipRef, clip_refs
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.loader import PhaseLoader, Prefetched
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.data.substitution import DecodeFailure, Known, clip_or_substitute
from vjepa_scale.recipe import Recipe, load_recipe, stages_of
from vjepa_scale.video.container import open_video

WHOLE = {"area": 1.0, "aspect": 4 / 3, "flip": 0.0}  # the crop is the picture
SIZE = (48, 64)


def overwrite(folder: Path, shards: Manifest, record: int, content: bytes) -> None:
    offset, size = (int(shards.column(f"video.{what}")[record]) for what in ("offset", "size"))
    with open(folder / shards.shard_of(record).name, "r+b") as file:
        file.seek(offset)
        file.write(content[:size].ljust(size, b"\0"))


def order_of(recipe: Recipe, shards: Manifest) -> DataOrder:
    phases = stages_of(recipe)["pretrain"].phases
    return DataOrder(seed=7, sets=[(n, shards.records_per_shard) for n in "ab"], phases=phases, lanes=2)


def load(
    shards: Manifest, *, ranks: int = 1, first: int = 2, known: Known | None = None, **settings: int
) -> dict[int, list[MicroBatch]]:
    """All ranks' micro-batches by step, from a step to the end."""
    recipe = recipe_for(shards, size=SIZE, augment=WHOLE, **settings)
    out: dict[int, list[MicroBatch]] = {}
    for rank in range(ranks):
        with PhaseLoader(
            stage=stages_of(recipe)["pretrain"],
            phase=stages_of(recipe)["pretrain"].phases[1],
            order=order_of(recipe, shards),
            manifests={"a": shards, "b": shards},
            dp_rank=rank,
            dp_world_size=ranks,
            first_step=first,
            known=known,
        ) as loader:
            for step, batch in zip(range(first, 6), loader, strict=True):
                out.setdefault(step, []).extend(batch)
    return out


def told(batches: dict[int, list[MicroBatch]]) -> list[DecodeFailure]:
    return [failure for batch in batches.values() for part in batch for failure in part.failures]


def clips(batch: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([part.clips for part in batch])


@pytest.fixture(scope="module")
def whole(shards: Manifest) -> dict[int, list[MicroBatch]]:
    return load(shards)


@pytest.fixture(scope="module")
def broken(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The shards with two of nine videos overwritten."""
    folder = tmp_path_factory.mktemp("broken") / "shards"
    shutil.copytree(shards.folder, folder)
    for record in (2, 5):
        overwrite(folder, shards, record, b"not a video")
    return Manifest.open(folder)


@pytest.fixture(scope="module")
def replaced(broken: Manifest) -> dict[int, list[MicroBatch]]:
    return load(broken)


@pytest.mark.fault(
    "data",
    "a clip's bytes are damaged",
    "another clip of the data set takes its place, as its ledger row says; no other slot changes",
)
def test_only_the_slots_of_broken_clips_change_and_show_what_the_rows_say(
    shards: Manifest, whole: dict[int, list[MicroBatch]], replaced: dict[int, list[MicroBatch]]
) -> None:
    rows = {(a.step, a.slot): a for a in told(replaced)}
    hit = 0
    for step, batch in replaced.items():
        recipe, manifests = recipe_for(shards), {"a": shards, "b": shards}
        phase = stages_of(recipe)["pretrain"].phases[1]
        refs = clip_refs(recipe.data, phase, order_of(recipe, shards), manifests, step=step, slots=range(8))
        assert as_global(batch)[1] == as_global(whole[step])[1]  # of the same data sets
        for ref, now, then in zip(refs, clips(batch), clips(whole[step]), strict=True):
            if ref.record not in (2, 5):
                assert (step, ref.slot) not in rows
                assert torch.equal(now, then)
                continue
            hit += 1
            last = rows[step, ref.slot]
            assert (last.dataset, last.cause) == (ref.dataset, "unreadable")
            assert last.key == shards.key(last.record)
            assert last.shard.endswith(shards.shard_of(last.record).name)
            assert last.replacement not in (2, 5, None)
            with av.open(io.BytesIO(shards.read(last.replacement))) as container:
                pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
            for k in range(4):
                picture = now[:, k].permute(1, 2, 0).numpy()
                assert min(np.abs(picture - other).max() for other in pictures) <= 1  # of the video that is named
    assert hit >= 4
    assert {a.record for a in told(replaced)} == {2, 5}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(4, 1, 2), (2, 2, 4), (8, 0, 1)])
def test_replacements_do_not_depend_on_who_loads_them(
    broken: Manifest, replaced: dict[int, list[MicroBatch]], ranks: int, workers: int, micro_batch: int
) -> None:
    again = load(broken, ranks=ranks, workers=workers, micro_batch=micro_batch)
    assert told(again) == told(replaced)
    assert all(torch.equal(clips(again[step]), clips(replaced[step])) for step in replaced)


def test_known_failures_are_replayed_without_trying(
    shards: Manifest, whole: dict[int, list[MicroBatch]], replaced: dict[int, list[MicroBatch]]
) -> None:
    """The shards are whole again, and still the run shows what it showed."""
    known = {a.place: (a.cause, a.detail) for a in told(replaced)}
    again = load(shards, first=3, known=known)
    assert all(torch.equal(clips(again[step]), clips(replaced[step])) for step in again)
    assert any(not torch.equal(clips(again[step]), clips(whole[step])) for step in again)
    names = [(a.place, a.cause, a.detail, a.replacement) for a in told(again)]
    assert names == [(a.place, a.cause, a.detail, a.replacement) for a in told(replaced) if a.step >= 3]


def test_a_replacement_is_of_the_records_that_the_stage_draws_from(broken: Manifest) -> None:
    recipe, kept = recipe_for(broken), np.array([2, 7, 8])
    shown = set()
    for slot in range(12):
        ref = ClipRef(0, slot, "a", 2, (0.0, 0.25), 4.0)
        instead, _, met = clip_or_substitute(broken, ref, data=recipe.data, known={}, records=kept)
        assert [failure.replacement for failure in met] == [instead.record]
        shown.add(instead.record)
    assert shown == {7, 8}


def labelled_copy(shards: Manifest, folder: Path) -> Path:
    """The shards, all records of one class."""
    shutil.copytree(shards.folder, folder)
    column = json.loads((folder / "manifest.json").read_text())["columns"]
    np.save(folder / next(c["file"] for c in column if c["name"] == "label"), np.zeros(shards.records, np.int64))
    return folder


def test_evaluation_never_replaces(broken: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no label"):
        list(evaluation_clips(broken, frames=2, size=SIZE, fps=4, batch=2))
    labelled = labelled_copy(broken, tmp_path / "shards")
    with pytest.raises(UserError, match=f"record {broken.key(2)} cannot be decoded"):
        list(evaluation_clips(Manifest.open(labelled), frames=2, size=SIZE, fps=4, batch=2))


@pytest.mark.fault(
    "data",
    "a shard is removed or truncated during training",
    "an error that names the shard; no clip is replaced for it",
)
@pytest.mark.fault(
    "data",
    "a shard is replaced during training by one of another size",
    "an error that names the shard and both sizes; clips of another video are never taken for these",
)
@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_a_shard_that_is_gone_or_cut_is_no_clips_fault(shards: Manifest, tmp_path: Path, damage: str) -> None:
    shutil.copytree(shards.folder, tmp_path / "shards")
    opened = Manifest.open(tmp_path / "shards")
    for tar in (tmp_path / "shards").glob("*.tar"):
        if damage == "other":  # every record's place is in it
            tar.write_bytes(bytes(512) + tar.read_bytes())
        else:
            tar.unlink() if damage == "gone" else os.truncate(tar, 700)
    said = {"gone": "cannot read record", "short": "the shard ends inside record", "other": r"has \d+ bytes now"}
    with pytest.raises(UserError, match=rf"\.tar: .*{said[damage]}"):
        load(opened)


@pytest.mark.fault(
    "data",
    "a shard cannot be read: its file server has an I/O error",
    "an error that may pass, so another attempt follows; no clip is replaced for it",
)
def test_an_io_error_may_pass(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    opened = Manifest.open(shards.folder)
    monkeypatch.setattr("vjepa_scale.data.manifest.open", unreadable, raising=False)
    with pytest.raises(PassingError, match=r"\.tar: cannot read record .*Input/output error"):
        load(opened, workers=0)


LOAD_AND_EVALUATE = """
import json, sys
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from tests.data import test_loader_faults as here
from tests.processes import LIMIT_S
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.manifest import Manifest

def evaluated(folder):
    said = []
    shown = evaluation_clips(
        Manifest.open(folder), frames=2, size=here.SIZE, fps=4, batch=2, workers=2, segments=2, limit_s=here.DECODE_S
    )
    try:
        said += [" ".join(map(str, part.records)) for part in shown]
    except UserError as error:
        said.append(str(error))
    return said

def loaded(folder):
    batches = here.load(Manifest.open(folder), workers=2, first=3, faults={"decode_timeout_s": here.DECODE_S})
    rows = [[*a.place, a.cause, a.replacement] for a in here.told(batches)]
    sums = [here.clips(batch).long().sum(dim=(1, 2, 3, 4)).tolist() for batch in batches.values()]
    return {"rows": rows, "sums": sums}

def main():
    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.25,)  # every 5 s it looks for workers that are gone
    print(json.dumps([(loaded if kind == "load" else evaluated)(folder) for kind, folder in json.loads(sys.argv[1])]))

if __name__ == "__main__":
    main()
"""
DECODE_S = 3.0


@pytest.fixture(scope="module")
def faulty(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What a process with a faulty decoder loads, and what it evaluates: (kind, word) -> its answer."""
    folder = tmp_path_factory.mktemp("faulty")
    copies: dict[tuple[str, str], str] = {}
    for word in ("HANG", "DIES"):
        for kind in ("load", "evaluate"):
            copy = labelled_copy(shards, folder / f"{kind} {word}")
            overwrite(copy, shards, 5, word.encode())
            copies[kind, word] = str(copy)
    script = folder / "load_it.py"
    script.write_text(LOAD_AND_EVALUATE)
    asked = json.dumps([(kind, copy) for (kind, _), copy in copies.items()])
    done = subprocess.run(
        [sys.executable, script, asked],
        env=with_faulty_decoder(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(copies, json.loads(done.stdout), strict=True))


CAUSES = [("HANG", "time limit"), ("DIES", "crashes the decoder")]


@pytest.mark.fault(
    "data",
    "a clip makes the decoder hang, or crash its loader worker",
    "the worker is ended after `data.faults.decode_timeout_s`, the clip replaced and named in the "
    "ledger; a resume replays that without decoding",
)
@pytest.mark.distributed
@pytest.mark.parametrize(("word", "cause"), CAUSES)
def test_a_clip_that_takes_its_worker_with_it(
    shards: Manifest, faulty: dict[tuple[str, str], Any], tmp_path: Path, word: str, cause: str
) -> None:
    """The batches are those of a data set in which the same clip is merely unreadable."""
    shutil.copytree(shards.folder, tmp_path / "shards")
    overwrite(tmp_path / "shards", shards, 5, b"not a video")
    expected = load(Manifest.open(tmp_path / "shards"), first=3)
    found = faulty["load", word]
    rows = [[*a.place, cause, a.replacement] for a in told(expected)]
    assert len(rows) > 1  # the loader starts again more than once
    assert found["rows"] == rows
    assert found["sums"] == [clips(batch).long().sum(dim=(1, 2, 3, 4)).tolist() for batch in expected.values()]


@pytest.mark.fault(
    "data",
    "the same in an evaluation",
    "an error that names the record: an evaluation never replaces clips",
)
@pytest.mark.distributed
@pytest.mark.parametrize(("word", "cause"), CAUSES)
def test_an_evaluation_names_the_clip_that_takes_its_worker_with_it(
    shards: Manifest, faulty: dict[tuple[str, str], Any], word: str, cause: str
) -> None:
    *shown, error = faulty["evaluate", word]
    assert shown == ["0 1", "2 3"][: len(shown)]  # what was shown before it is right
    assert re.search(rf"record {shards.key(5)} cannot be decoded at [\d.]+ s: {cause}", error)


def _threads(data: bytes) -> tuple[int, int]:
    """PyTorch's threads of this process, and how many the decoder has started."""
    before = len(os.listdir("/proc/self/task"))
    with open_video(data) as (container, stream):
        next(container.decode(stream))
        return torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before


@pytest.mark.distributed
def test_a_worker_computes_and_decodes_in_one_thread() -> None:
    loader = Prefetched(_threads, [encoded(), encoded()], workers=1, prefetch=1)
    assert list(loader) == [(1, 0), (1, 0)]
    loader.close()


@pytest.mark.fault(
    "disks",
    "/dev/shm is too small for the loader's batches",
    "refused before the first step, with the sizes and the keys that help",
)
def test_too_little_shared_memory_or_too_few_handles(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(shards, workers=3)
    host_limits.check_limits(stages_of(recipe)["pretrain"], ranks_on_node=2)
    clip = 3 * 4 * 32 * 48
    # 3 workers with 2 prepared and 1 in hand each, and 2 at the rank: 11 micro-batches of 4 clips and their masks
    least = 11 * 4 * clip
    assert least < host_limits.shared_memory_needed(stages_of(recipe)["pretrain"]) < 1.1 * least
    free = os.statvfs(host_limits.SHM).f_bavail * os.statvfs(host_limits.SHM).f_frsize
    with pytest.raises(UserError, match=r"MB of shared memory .* are free .*data.workers") as refusal:
        host_limits.check_limits(stages_of(recipe)["pretrain"], ranks_on_node=2 * free // least)
    told = re.search(r"(\d+) MB of /dev/shm are free", str(refusal.value))
    assert told is not None
    assert int(told[1]) == pytest.approx(free / 10**6, rel=0.2)  # others use it too
    host_limits.check_limits(stages_of(recipe_for(shards, workers=0))["pretrain"], ranks_on_node=2 * free // least)


def test_open_files_are_raised_to_what_the_ranks_need(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 ranks: two gloo groups of all, with a socket to each of 511, and a hybrid mesh's; 1024 is the usual limit."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    stage = stages_of(recipe_for(shards, workers=3))["pretrain"]
    needed = host_limits.handles_needed(stage, world_size=512)
    assert needed - host_limits.handles_needed(stage, world_size=1) == 3 * 511
    for soft, hard, raised in (
        (1024, 1_048_576, [(needed, 1_048_576)]),
        (1024, resource.RLIM_INFINITY, [(needed, resource.RLIM_INFINITY)]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
        (needed, needed, []),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, now=(soft, hard): now)
        host_limits.raise_open_files(stage, world_size=512)
        assert asked == raised
        asked.clear()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1536))
    with pytest.raises(UserError, match=rf"needs {needed} open files \(512 ranks.*its limit is 1536 .*ulimit -Hn"):
        host_limits.raise_open_files(stage, world_size=512)
    host_limits.raise_open_files(stage, world_size=8)
    assert asked == []


@pytest.mark.parametrize(
    ("name", "bytes_beside", "tensors"),
    [
        ("action", 5 * 7 * 4, 1),  # states of the 5 frames of its longest clips
        ("probe", 8, 1),  # a label
    ],
)
def test_what_a_kind_adds_to_a_micro_batch_counts(name: str, bytes_beside: int, tensors: int, tmp_path: Path) -> None:
    sets, more = (dict.fromkeys(names, tmp_path) for names in (("left", "right"), ("held_out", "robot")))
    recipe = load_recipe(write_four_stages(tmp_path / "recipe.yaml", tmp_path / "run", sets, more))
    stage, workers = stages_of(recipe)[name], recipe.data.workers
    held = workers * (recipe.data.prefetch + 1) + 2
    if name == "action":  # after a probe's last step comes its evaluation
        assert host_limits.shared_memory_needed(stage) == held * 2 * (3 * 5 * 40 * 32 + bytes_beside)
    assert stage.beside_clips(5, (40, 32)) == (tensors, bytes_beside)
    assert host_limits.handles_needed(stage, world_size=1) == 256 + workers * 16 + held * (1 + tensors)
