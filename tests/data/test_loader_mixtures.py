"""Pictures beside videos, each data set with frames and a rate of its own: every clip, from any worker and step."""

import io
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.videos import encoded, number_of, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.data import host_limits
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.clips import ClipRef, clip_refs, dump_order
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.stage_data import data_order
from vjepa_scale.data.substitution import Place
from vjepa_scale.launch.plan import describe
from vjepa_scale.model import flops
from vjepa_scale.recipe import Phase, Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.training.preflight import preflight

FRAMES = {"pictures": 2, "videos": 4, "slow": 8}
FPS = {"pictures": 4.0, "videos": 4.0, "slow": 2.5}
WHOLE = {"area": 1.0, "aspect": 4 / 3, "flip": 0.0}
FIRST, LAST = 2, 6  # the second phase, whose batch is larger


@pytest.fixture(scope="module")
def sets(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Nine videos in several shards, four pictures in one, and one video alone: fewer records than slots."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("pictures", 4), ("slow", 1)):
        (folder / name).mkdir()
        for i in range(count):
            made = still_image(i + 9, codec="png") if name == "pictures" else encoded(60, rate=10, gop=7)
            (folder / name / f"{i}.{'png' if name == 'pictures' else 'mp4'}").write_bytes(made)
        make_shards(folder / name, folder / f"{name}-shards", Settings(images=True), workers=1, progress=quiet)
    return {
        "videos": shards,
        "pictures": Manifest.open(folder / "pictures-shards"),
        "slow": Manifest.open(folder / "slow-shards"),
    }


def recipe_for(
    sets: dict[str, Manifest], *, micro_batch: int = 2, workers: int = 0, augment: dict | None = None, **sections: dict
) -> Recipe:
    tree = {
        "run": {"dir": "unused", "seed": 11},
        "data": {
            "sets": {
                "videos": {"path": str(sets["videos"].folder), "weight": 3},
                "pictures": {"path": str(sets["pictures"].folder), "weight": 2, "frames": 2},
                "slow": {"path": str(sets["slow"].folder), "weight": 1, "frames": 8, "fps": 2.5},
            },
            "seed": 7,
            "workers": workers,
            "lanes": 2,
            "augment": {**WHOLE, **(augment or {})},
        },
        "model": {"encoder": "vit_tiny"},
        "masks": {"group": 2, "generators": [{"blocks": 1, "spatial_scale": 0.3}]},
        "pretrain": {
            "steps": LAST,
            "clip": {"frames": 4, "size": [48, 64]},
            "global_batch": 16,
            "micro_batch": micro_batch,
            "phases": [
                {"name": "warmup", "steps": FIRST, "start_lr": 1e-4, "global_batch": 8},
                {"name": "constant"},
            ],
        },
    }
    return validate_recipe({**tree, **sections}, source="test")


def load(
    sets: dict[str, Manifest], recipe: Recipe, *, ranks: int = 1, first: int = FIRST, known: dict | None = None
) -> dict[int, list[MicroBatch]]:
    """All ranks' micro-batches by step, of the second phase."""
    phases = stages_of(recipe)["pretrain"].phases
    out: dict[int, list[MicroBatch]] = {}
    for rank in range(ranks):
        with PhaseLoader(
            stage=stages_of(recipe)["pretrain"],
            phase=phases[1],
            order=data_order(stages_of(recipe)[phases[0].stage], sets, phases, {}),
            manifests=sets,
            dp_rank=rank,
            dp_world_size=ranks,
            first_step=first,
            known=known,
        ) as loader:
            for step, batch in zip(range(first, LAST), loader, strict=True):
                out.setdefault(step, []).extend(batch)
    return out


def by_slot(
    batches: dict[int, list[MicroBatch]],
) -> dict[tuple[int, int], tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Data set, pixels and masks of every clip, by step and slot; in the order of ranks and micro-batches."""
    return {
        (step, slot): (part.datasets[i], part.clips[i], [t[i] for m in part.masks for t in (m.context, m.target)])
        for step, batch in batches.items()
        for part in batch
        for i, slot in enumerate(part.slots)
    }


def assert_same(left: dict[int, list[MicroBatch]], right: dict[int, list[MicroBatch]]) -> None:
    mine, theirs = by_slot(left), by_slot(right)
    assert list(mine) == list(theirs)
    for place, (dataset, clip, masks) in mine.items():
        assert dataset == theirs[place][0]
        assert torch.equal(clip, theirs[place][1])
        assert all(torch.equal(a, b) for a, b in zip(masks, theirs[place][2], strict=True))


def refs_of(sets: dict[str, Manifest], recipe: Recipe, step: int) -> list[ClipRef]:
    phases = stages_of(recipe)["pretrain"].phases
    order = data_order(stages_of(recipe)[phases[0].stage], sets, phases, {})
    return clip_refs(recipe.data, phases[1], order, sets, step=step, slots=range(phases[1].global_batch))


def shown(manifest: Manifest, record: int, times_s: list[float]) -> list[np.ndarray]:
    """What is on screen at some times, by decoding a video in order with PyAV."""
    with av.open(io.BytesIO(manifest.read(record))) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    begin = frames[0][0]
    return [([image for t, image in frames if t - begin <= time_s + 1e-9] or [frames[0][1]])[-1] for time_s in times_s]


@pytest.fixture(scope="module")
def reference(sets: dict[str, Manifest]) -> dict[int, list[MicroBatch]]:
    return load(sets, recipe_for(sets))


def test_each_micro_batch_has_the_geometry_of_its_data_sets(reference: dict[int, list[MicroBatch]]) -> None:
    clips = Counter()
    for step in range(FIRST, LAST):
        assert [part.slots for part in reference[step]] == [range(i, i + 2) for i in range(0, 16, 2)]
        for part in reference[step]:
            (frames,) = {FRAMES[name] for name in part.datasets}
            assert part.clips.shape == (2, 3, frames, 48, 64)
            tokens = frames // 2 * 3 * 4
            for pair in part.masks:
                assert int(torch.cat([pair.context, pair.target], 1).max()) < tokens
                assert pair.target.shape[1] >= frames // 2  # blocks take all of time
                both = [set(c) | set(t) for c, t in zip(pair.context.tolist(), pair.target.tolist(), strict=True)]
                assert all(len(union) > tokens // 2 for union in both)
            clips.update(part.datasets)
    assert len({frames for part in reference[FIRST] for frames in [part.clips.shape[2]]}) == 3
    assert {name: round(n / 64, 1) for name, n in clips.items()} == {"videos": 0.5, "pictures": 0.3, "slow": 0.2}


def test_a_picture_is_shown_in_every_frame(sets: dict[str, Manifest], reference: dict[int, list[MicroBatch]]) -> None:
    loaded, seen = by_slot(reference), set()
    for step in range(FIRST, LAST):
        for ref in refs_of(sets, recipe_for(sets), step):
            dataset, clip, _ = loaded[step, ref.slot]
            assert dataset == ref.dataset
            if dataset == "pictures":
                with av.open(io.BytesIO(sets["pictures"].read(ref.record))) as container:
                    (frame,) = container.decode(video=0)
                assert torch.equal(clip[:, 0], clip[:, 1])
                assert np.array_equal(clip[:, 0].permute(1, 2, 0).numpy(), frame.to_ndarray(format="rgb24"))
                seen.add(number_of(clip[:, 0].permute(1, 2, 0).numpy()))
    assert seen == {9, 10, 11, 12}


@pytest.mark.parametrize("rate", [[1, 1], [0.5, 2]])
def test_videos_are_shown_at_the_rate_of_their_data_set_times_the_jitter(
    sets: dict[str, Manifest], rate: list[float]
) -> None:
    """The times are those of the dumped order, which says when a clip starts and at which rate it goes on."""
    recipe = recipe_for(sets, augment={"rate": rate})
    loaded = by_slot(load(sets, recipe))
    phases = stages_of(recipe)["pretrain"].phases
    order = data_order(stages_of(recipe)[phases[0].stage], sets, phases, {})
    keys = {name: [manifest.key(r) for r in range(manifest.records)] for name, manifest in sets.items()}
    rates = []
    for step in range(FIRST, LAST):
        for line, ref in zip(
            dump_order(recipe.data, phases[1], order, sets, step), refs_of(sets, recipe, step), strict=True
        ):
            _, slot, name, key, start, frames, fps, _ = line.split("\t")
            assert int(frames) == FRAMES[name]
            rates.append(float(fps) / FPS[name])
            if name == "pictures":
                continue
            record = keys[name].index(key)
            # To the last digit: a picture that changes at this very moment may be either one.
            assert ref.times_s == pytest.approx([float(start) + k / float(fps) for k in range(int(frames))], abs=1e-5)
            assert ref.times_s[0] >= 0
            length, duration = int(frames) / float(fps), float(sets[name].column("duration")[record])
            assert ref.times_s[0] <= max(0.0, duration - length) + 1e-6
            expected = shown(sets[name], record, list(ref.times_s))
            clip = loaded[step, int(slot)][1].permute(1, 2, 3, 0).numpy().astype(int)
            assert np.abs(clip - np.stack(expected)).max() <= 1
    if rate == [1, 1]:
        assert set(rates) == {1}
    else:
        assert len(set(rates)) == len(rates)
        assert min(rates) >= 0.5
        assert max(rates) <= 2
        # Uniform in [0.5, 2]: mean 1.25, standard deviation 0.433, of 64 clips
        assert np.mean(rates) == pytest.approx(1.25, abs=4 * 0.433 / 8)
        assert min(rates) < 0.75
        assert max(rates) > 1.75


def test_jitter_changes_nothing_but_times(sets: dict[str, Manifest], reference: dict[int, list[MicroBatch]]) -> None:
    plain, jittered, doubled = (
        [ref for step in range(FIRST, LAST) for ref in refs_of(sets, recipe_for(sets, augment={"rate": rate}), step)]
        for rate in (1, [0.9, 1.1], 2)
    )
    for a, b, c in zip(plain, jittered, doubled, strict=True):
        assert (a.dataset, a.record, len(a.times_s)) == (b.dataset, b.record, len(b.times_s))
        assert c.fps == 2 * FPS[a.dataset]
    again = by_slot(load(sets, recipe_for(sets, augment={"rate": 2})))
    for place, (dataset, clip, masks) in by_slot(reference).items():
        assert all(torch.equal(x, y) for x, y in zip(masks, again[place][2], strict=True))
        if dataset == "pictures":
            assert torch.equal(clip, again[place][1])


def test_a_replacement_keeps_frames_and_rate_of_its_slot(sets: dict[str, Manifest]) -> None:
    recipe = recipe_for(sets, augment={"rate": [0.5, 2]})
    refs = [ref for ref in refs_of(sets, recipe, FIRST) if ref.dataset == "videos"]
    known = {Place(r.step, r.slot, r.dataset, r.record): ("unreadable", "") for r in refs}
    loaded = load(sets, recipe, known=known)
    replaced = {a.slot: a.replacement for part in loaded[FIRST] for a in part.failures}
    checked = 0
    for ref in refs:
        record = replaced[ref.slot]
        assert record not in (None, ref.record)
        clip = by_slot(loaded)[FIRST, ref.slot][1].permute(1, 2, 3, 0).numpy().astype(int)
        # Somewhere in the video that is named there is a window of this rate that shows just this.
        room = max(0.0, float(sets["videos"].column("duration")[record]) - 4 / ref.fps)
        starts = np.linspace(0, room, 400)
        windows = (shown_at(sets["videos"], record, start, ref.fps) for start in starts)
        assert any(np.abs(clip - window).max() <= 1 for window in windows)
        checked += 1
    assert checked >= 6


def shown_at(manifest: Manifest, record: int, start_s: float, fps: float) -> np.ndarray:
    if (manifest.folder, record) not in _DECODED:
        with av.open(io.BytesIO(manifest.read(record))) as container:
            frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        _DECODED[manifest.folder, record] = np.array([t for t, _ in frames]), np.stack([image for _, image in frames])
    times, images = _DECODED[manifest.folder, record]
    wanted = start_s + np.arange(4) / fps + times[0] + 1e-9
    return images[np.maximum(np.searchsorted(times, wanted, side="right") - 1, 0)].astype(int)


_DECODED: dict[tuple[Path, int], tuple[np.ndarray, np.ndarray]] = {}


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(4, 1, 2), (2, 3, 2), (2, 0, 1), (8, 0, 2)])
def test_pixels_do_not_depend_on_who_loads_them(
    sets: dict[str, Manifest], ranks: int, workers: int, micro_batch: int
) -> None:
    changing = {"area": [0.3, 1.0], "aspect": [0.75, 1.35], "flip": 0.5, "rate": [0.8, 1.25]}
    recipe = recipe_for(sets, augment=changing)
    other = recipe_for(sets, augment=changing, workers=workers, micro_batch=micro_batch)
    assert_same(load(sets, other, ranks=ranks), load(sets, recipe))


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 1])
def test_a_restart_at_any_step_of_a_phase_gives_the_same_batches(
    sets: dict[str, Manifest], reference: dict[int, list[MicroBatch]], workers: int
) -> None:
    for first in range(FIRST, LAST):
        rest = {step: batch for step, batch in reference.items() if step >= first}
        assert_same(load(sets, recipe_for(sets, workers=workers), first=first), rest)


# -- what is refused and planned before the first step ---------------------------------------------


def changed(sets: dict[str, Manifest], name: str, **keys: object) -> dict:
    tree = recipe_for(sets).model_dump(mode="json", exclude_none=True)["data"]
    tree["sets"][name].update(keys)
    return tree


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("frames", 3, "data.sets.pictures.frames: 3 frames do not divide into tubelets of 2"),
        ("frames", 0, "data.sets.pictures.frames: must be greater than 0"),
        ("frames", 2.0, "data.sets.pictures.frames: must be a whole number"),
        ("fps", 0, "data.sets.pictures.fps: must be greater than 0"),
    ],
)
def test_geometries_that_cannot_be_are_refused_by_key(
    sets: dict[str, Manifest], key: str, value: object, what: str
) -> None:
    with pytest.raises(UserError) as refusal:
        recipe_for(sets, data=changed(sets, "pictures", **{key: value}))
    assert what in str(refusal.value)


@pytest.mark.parametrize("rate", [[2, 0.5], [0, 1], "fast"])
def test_a_range_of_rates_goes_up_from_above_zero(sets: dict[str, Manifest], rate: object) -> None:
    with pytest.raises(UserError, match=r"data\.augment\.rate"):
        recipe_for(sets, augment={"rate": rate})


def test_masks_are_tried_on_every_geometry_before_a_process_starts(sets: dict[str, Manifest]) -> None:
    future = {"group": 2, "generators": [{"kind": "future"}]}
    preflight(stages_of(recipe_for(sets))["pretrain"], will_have_run=set())
    recipe = recipe_for(sets, masks=future, data=changed(sets, "pictures", frames=4))
    preflight(stages_of(recipe)["pretrain"], will_have_run=set())
    with pytest.raises(UserError, match=r"masks\.generators\.0: a future mask takes 2 time steps at least, .* has 1"):
        preflight(stages_of(recipe_for(sets, masks=future))["pretrain"], will_have_run=set())


def test_a_stages_mixture_decides_which_geometries_there_are(sets: dict[str, Manifest]) -> None:
    stage = recipe_for(sets).model_dump(mode="json", exclude_none=True)["pretrain"]
    alone = recipe_for(sets, pretrain={**stage, "mixture": {"videos": 1, "slow": 0}})
    assert [phase.geometries for phase in stages_of(alone)["pretrain"].phases] == [{4: {"videos": 1.0}}] * 2
    longer = recipe_for(sets, pretrain={**stage, "clip": {"frames": 8, "size": [48, 64]}})
    assert stages_of(longer)["pretrain"].phases[0].geometries == {8: {"videos": 3.0, "slow": 1.0}, 2: {"pictures": 2.0}}


def test_the_longest_clips_decide_about_shared_memory(sets: dict[str, Manifest]) -> None:
    recipe = recipe_for(sets, workers=1)
    # 1 worker with 2 prepared and 1 in hand, and 2 at the rank: 5 micro-batches of 2 clips of 8 frames
    least = 5 * 2 * 3 * 8 * 48 * 64
    assert least < host_limits.shared_memory_needed(stages_of(recipe)["pretrain"]) < 1.1 * least


def test_the_plan_and_its_flops_count_every_geometry(sets: dict[str, Manifest]) -> None:
    """Masks that take all of space and the first half of time: lengths are known beforehand."""
    four = changed(sets, "pictures", frames=4)
    four["sets"]["videos"]["frames"] = 16
    recipe = recipe_for(sets, data=four, masks={"group": 2, "generators": [{"kind": "future"}]})
    phase: Phase = stages_of(recipe)["pretrain"].phases[1]
    place = 3 * 4
    of_frames = {
        T: flops.jepa_step(recipe.model, T // 2 * place, [(T // 4 * place, T // 4 * place)]) for T in (4, 8, 16)
    }
    expected = 16 * (3 * of_frames[16] + 2 * of_frames[4] + of_frames[8]) / 6
    assert stages_of(recipe)[phase.stage].step_flops(phase) == pytest.approx(expected, rel=1e-12)
    lines = list(describe([stages_of(recipe)["pretrain"]], where="here"))
    assert any(line.endswith("records in 1 shards, weight 1, 8 frames, 2.5 frames per second") for line in lines)
    line = next(line for line in lines if "constant:" in line)
    assert "16 × 48×64 px = 96 tokens (0.5 of the clips: videos)" in line
    assert "4 × 48×64 px = 24 tokens (0.333 of the clips: pictures)" in line
    assert "8 × 48×64 px = 48 tokens (0.167 of the clips: slow)" in line
