"""Batches are a function of recipe and step: not of ranks, workers, micro-batches or restarts."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import submitit
import torch

from tests.processes import LIMIT_S
from tests.videos import encoded, number_of, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.batch import MicroBatch, draw_masks
from vjepa_scale.data.clips import clip_refs, dump_order
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest, labels_of
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.shards.make import Settings, make_shards


def recipe_for(
    shards: Manifest, *, micro_batch: int = 4, workers: int = 0, size: tuple[int, int] = (32, 48), **data: object
) -> Recipe:
    tree = {
        "run": {"dir": "unused", "seed": 11},
        "data": {
            "sets": {"a": {"path": str(shards.folder)}, "b": {"path": str(shards.folder), "weight": 0.5}},
            "seed": 7,
            "workers": workers,
            "lanes": 2,
            **data,
        },
        "model": {"encoder": "vit_tiny"},
        "masks": {"group": 4, "generators": [{"blocks": 1, "spatial_scale": 0.3}]},
        "pretrain": {
            "steps": 6,
            "clip": {"frames": 4, "size": list(size)},
            "global_batch": 8,
            "micro_batch": micro_batch,
            "phases": [{"name": "warmup", "steps": 2, "start_lr": 1e-4}, {"name": "constant"}],
        },
    }
    return validate_recipe(tree, source="test")


def batches(
    shards: Manifest, *, ranks: int = 1, first: int = 2, recipe: Recipe | None = None, **kwargs: int
) -> dict[int, list[MicroBatch]]:
    """The micro-batches of all ranks by step, in the order of slots, of the phase that begins at step 2."""
    recipe = recipe or recipe_for(shards, **kwargs)
    manifests = {"a": shards, "b": shards}
    phases = stages_of(recipe)["pretrain"].phases
    order = DataOrder(
        seed=recipe.data.seed,
        sets=[(name, m.records_per_shard) for name, m in manifests.items()],
        phases=phases,
        lanes=recipe.data.lanes,
    )
    out: dict[int, list[MicroBatch]] = {}
    for rank in range(ranks):
        with PhaseLoader(
            stage=stages_of(recipe)["pretrain"],
            phase=phases[1],
            order=order,
            manifests=manifests,
            dp_rank=rank,
            dp_world_size=ranks,
            first_step=first,
        ) as loader:
            for step, step_batch in zip(range(first, 6), loader, strict=True):
                assert {m.step for m in step_batch} == {step}
                out.setdefault(step, []).extend(step_batch)
    return out


def as_global(step_batch: list[MicroBatch]) -> tuple[list[int], tuple[str, ...], list[torch.Tensor]]:
    """Slots, data sets and tensors of a whole step."""
    tensors = [torch.cat([m.clips for m in step_batch])]
    for j in range(len(step_batch[0].masks)):
        tensors += [torch.cat([m.masks[j].context for m in step_batch])]
        tensors += [torch.cat([m.masks[j].target for m in step_batch])]
    return [s for m in step_batch for s in m.slots], sum((m.datasets for m in step_batch), ()), tensors


def halves(step_batch: list[MicroBatch]) -> list[list[MicroBatch]]:
    """A step's micro-batches by mask group (of 4 slots, whose lists have their own length)."""
    return [[m for m in step_batch if m.slots.start // 4 == group] for group in (0, 1)]


def assert_same(left: dict[int, list[MicroBatch]], right: dict[int, list[MicroBatch]]) -> None:
    assert left.keys() == right.keys()
    for step in left:
        for a, b in zip(halves(left[step]), halves(right[step]), strict=True):
            slots, datasets, tensors = as_global(a)
            others = as_global(b)
            assert (slots, datasets) == others[:2]
            assert all(torch.equal(x, y) for x, y in zip(tensors, others[2], strict=True))


@pytest.fixture(scope="module")
def reference(shards: Manifest) -> dict[int, list[MicroBatch]]:
    return batches(shards)


def test_a_micro_batch_is_what_its_parts_say(shards: Manifest, reference: dict[int, list[MicroBatch]]) -> None:
    assert list(reference) == [2, 3, 4, 5]
    for step, step_batch in reference.items():
        assert [m.slots for m in step_batch] == [range(0, 4), range(4, 8)]
        for m in step_batch:
            assert m.clips.shape == (4, 3, 4, 32, 48)
            assert m.clips.dtype == torch.uint8
            assert m.clips.permute(0, 2, 3, 4, 1).is_contiguous(), "channels last, as resizing leaves them"
            masks = draw_masks(recipe_for(shards).masks, seed=11, step=step, slots=m.slots, grid=(2, 2, 3))
            assert all(torch.equal(x.target, y.target) for x, y in zip(m.masks, masks, strict=True))
    counts = [m.datasets.count("a") for b in reference.values() for m in b]
    assert abs(sum(counts) - 32 * 2 / 3) < 2


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(4, 1, 2), (2, 2, 4), (2, 0, 1), (1, 2, 2), (8, 0, 1)])
def test_pixels_do_not_depend_on_who_loads_them(
    shards: Manifest, reference: dict[int, list[MicroBatch]], ranks: int, workers: int, micro_batch: int
) -> None:
    assert_same(batches(shards, ranks=ranks, workers=workers, micro_batch=micro_batch), reference)


@pytest.mark.parametrize("first", [3, 4, 5])
def test_a_restart_at_any_step_gives_the_same_batches(
    shards: Manifest, reference: dict[int, list[MicroBatch]], first: int
) -> None:
    assert_same(batches(shards, first=first), {step: b for step, b in reference.items() if step >= first})


def test_windows_lie_in_the_video_and_the_dump_is_what_is_loaded(
    shards: Manifest, reference: dict[int, list[MicroBatch]]
) -> None:
    recipe, manifests = recipe_for(shards), {"a": shards, "b": shards}
    phases = stages_of(recipe)["pretrain"].phases
    sets = [(name, shards.records_per_shard) for name in manifests]
    order = DataOrder(seed=7, sets=sets, phases=phases, lanes=2)
    keys = [shards.key(r) for r in range(shards.records)]
    starts = []
    for step in range(2, 6):
        lines = [line.split("\t") for line in dump_order(recipe.data, phases[1], order, manifests, step)]
        assert [(int(line[0]), int(line[1])) for line in lines] == [(step, slot) for slot in range(8)]
        assert [line[2] for line in lines] == [name for m in reference[step] for name in m.datasets]
        refs = clip_refs(recipe.data, phases[1], order, manifests, step=step, slots=range(8))
        for line, ref in zip(lines, refs, strict=True):
            record = keys.index(line[3])
            assert (ref.record, f"{ref.start_s:.6f}") == (record, line[4])
            assert line[5:] == ["4", "4", phases[1].stage]
            assert 0 <= ref.start_s <= max(0, shards.column("duration")[record] - 1)
            starts.append(ref.start_s)
    assert len(set(starts)) == len(starts)


def test_loaded_pictures_are_those_of_the_order(shards: Manifest, reference: dict[int, list[MicroBatch]]) -> None:
    """With the crop fixed to the whole picture, a clip is what plain PyAV shows at its times."""
    whole = {"area": 1.0, "aspect": 4 / 3, "flip": 0.0}
    recipe = recipe_for(shards, size=(48, 64), augment=whole)
    loaded = batches(shards, recipe=recipe)
    phases = stages_of(recipe)["pretrain"].phases
    order = DataOrder(seed=7, sets=[(n, shards.records_per_shard) for n in "ab"], phases=phases, lanes=2)
    for step in (2, 5):
        refs = clip_refs(recipe.data, phases[1], order, {"a": shards, "b": shards}, step=step, slots=range(8))
        clips = torch.cat([m.clips for m in loaded[step]])
        for clip, ref in zip(clips, refs, strict=True):
            with av.open(io.BytesIO(shards.read(ref.record))) as container:
                frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
            begin = frames[0][0]
            for k in range(4):
                shown = [image for t, image in frames if t - begin <= ref.start_s + k / 4 + 1e-9][-1:]
                expected = shown[0] if shown else frames[0][1]
                assert np.abs(clip[:, k].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_does_not_decode_is_one_user_error(shards: Manifest, tmp_path: Path, workers: int) -> None:
    """It names data set, shard, record and cause, and carries no traceback text from the worker."""
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    for record in range(shards.records):
        offset, size = (int(shards.column(f"video.{what}")[record]) for what in ("offset", "size"))
        with open(folder / shards.shard_of(record).name, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    with pytest.raises(UserError) as caught:
        batches(Manifest.open(folder), workers=workers)
    message = str(caught.value)
    assert "data set 'a'" in message or "data set 'b'" in message
    assert ".tar" in message
    assert "record 00000000" in message
    assert "unreadable" in message
    assert "Traceback" not in message
    assert "\n" not in message


def test_a_record_without_a_label_cannot_be_evaluated(shards: Manifest) -> None:
    with pytest.raises(UserError, match="has no label"):
        labels_of(shards)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("labelled")
    for i in range(5):
        path = folder / "videos" / ("odd" if i % 2 else "even") / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(16 + 8 * i, rate=8, gop=8))
    make_shards(folder / "videos", folder / "shards", Settings(shard_records=2), workers=1, progress=quiet)
    return Manifest.open(folder / "shards")


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_the_middle_of_every_record_in_order(labelled: Manifest, workers: int) -> None:
    got = list(evaluation_clips(labelled, frames=2, size=(48, 64), fps=4, batch=2, workers=workers))
    assert [tuple(part.clips.shape) for part in got] == [(2, 3, 2, 48, 64), (2, 3, 2, 48, 64), (1, 3, 2, 48, 64)]
    assert [part.records for part in got] == [(0, 1), (2, 3), (4,)]
    clips, labels = torch.cat([part.clips for part in got]), torch.cat([part.labels for part in got])
    for record in range(5):
        number = int(Path(json.loads(labelled.read(record, "json"))["path"]).stem)
        assert labels[record] == number % 2
        # 16 + 8·number frames at 8 a second; a window of half a second in the middle: frames 6 + 4·number and 2 on.
        shown = [number_of(clips[record, :, k].permute(1, 2, 0).numpy()) for k in range(2)]
        assert shown == [6 + 4 * number, 8 + 4 * number]


def test_labels_follow_the_classes_of_the_task(labelled: Manifest) -> None:
    own = labels_of(labelled)
    assert np.array_equal(labels_of(labelled, ["odd", "neither", "even"]), 2 - 2 * own)
    with pytest.raises(UserError, match="'odd' is not among"):
        labels_of(labelled, ["even"])


LOAD = """
import os, sys, time
from tests.data.test_loader import recipe_for
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import stages_of

def main():
    shards = Manifest.open(sys.argv[1])
    recipe = recipe_for(shards, workers=2)
    phases = stages_of(recipe)["pretrain"].phases
    order = DataOrder(seed=7, sets=[(n, shards.records_per_shard) for n in "ab"], phases=phases, lanes=2)
    with PhaseLoader(stage=stages_of(recipe)["pretrain"], phase=phases[0], order=order,
                     manifests={"a": shards, "b": shards}, dp_rank=0, dp_world_size=1, first_step=0) as loader:
        batches = iter(loader)
        next(batches)
        if "stay" in sys.argv:
            print("loaded", flush=True)
            time.sleep(1000)
        print(len([1 for _ in batches]), "more", flush=True)

if __name__ == "__main__":
    main()
"""


def start(how: str, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """A rank that loads, started as a script or as a module."""
    script = folder / "load_it.py"
    script.write_text(LOAD)
    command = {"script": [script], "module": ["-m", "load_it"]}[how]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["script", "module"])
def test_workers_start_under_any_main_program(shards: Manifest, tmp_path: Path, how: str) -> None:
    with start(how, tmp_path, shards.folder) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert out.split() == ["1", "more"]


def _load_under_submitit(folder: str) -> int:
    shards = Manifest.open(folder)
    return len(batches(shards, workers=1))


@pytest.mark.distributed
def test_workers_start_under_submitit(shards: Manifest, tmp_path: Path) -> None:
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=5)
    assert executor.submit(_load_under_submitit, str(shards.folder)).result() == 4


def session_processes(session: int) -> list[int]:
    """Living processes of a session, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_rank_that_is_killed(shards: Manifest, tmp_path: Path) -> None:
    with start("script", tmp_path, shards.folder, "stay") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loaded\n"
            assert len(session_processes(process.pid)) >= 4  # the rank, two workers and at least the fork server
            process.send_signal(signal.SIGKILL)
            process.wait()
            deadline = time.monotonic() + LIMIT_S
            while (left := session_processes(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left
        finally:
            for pid in session_processes(process.pid):
                os.kill(pid, signal.SIGKILL)
