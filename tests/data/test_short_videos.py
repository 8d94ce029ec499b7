"""Videos shorter than a clip: how many a plan, a report and the making of shards say there are."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.chain import tool
from tests.data.test_loader_mixtures import recipe_for
from tests.videos import encoded, still_image
from vjepa_scale.data.clips import ClipRef, repeats_last, with_window
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.demo import summary
from vjepa_scale.launch.plan import describe
from vjepa_scale.recipe import Recipe, stages_of


def videos(count: int) -> dict[str, np.ndarray]:
    """Columns of a manifest: constant rates, and pictures."""
    chosen = random.Random(0)
    fps = np.array([chosen.choice([0, 3.9, 4, 10, 15, 24, 29.97, 30.004, 60]) for _ in range(count)])
    frames = np.array([chosen.choice([1, chosen.randrange(1, 400), 128, 16, 64]) for _ in range(count)])
    return {"fps": fps, "frames": frames, "duration": np.where(fps > 0, frames / np.where(fps > 0, fps, 1), 0.0)}


@pytest.mark.parametrize("frames", [2, 16, 64])
@pytest.mark.parametrize("sampling", ["time", "stride"])
def test_those_are_counted_whose_clips_go_past_the_end(sampling: str, frames: int) -> None:
    columns = videos(300)
    manifest = SimpleNamespace(column=columns.__getitem__, records=300)
    found = repeats_last(manifest, frames=frames, fps=4.0, sampling=sampling)
    for record in range(300):
        (fps, count, duration) = (columns[name][record] for name in ("fps", "frames", "duration"))
        clip = with_window(ClipRef(0, 0, "", record, (), 4.0), manifest, 0.5, frames=frames, sampling=sampling)
        if sampling == "stride" and fps:
            assert clip.numbers is not None
            filled = frames - len(np.linspace(0, count, num=count // max(1, round(fps) // 4))[:frames])
            assert found[record] == (filled > 0 and count <= frames * max(1, round(fps) // 4))
        else:
            assert found[record] == bool(fps and clip.times_s[-1] >= duration - 1e-9)
    assert 0 < found.sum() < 300


@pytest.fixture
def recipe(shards: Manifest) -> Recipe:
    """Nine videos of 1.5 to 3.2 s: 3 / 6 of the clips have 4 frames, 2 / 6 have 2, and 1 / 6 have 8 at 2.5 a second."""
    return recipe_for({"videos": shards, "pictures": shards, "slow": shards})


def test_the_plan_says_how_many_and_how_much_of_the_mixture(shards: Manifest, recipe: Recipe) -> None:
    short = int((shards.column("duration") <= 7 / 2.5).sum())
    assert 0 < short < 9
    lines = list(describe([stages_of(recipe)["pretrain"]], where="here"))
    told = f"{short} of 9 of slow (shorter than 8 frames at 2.5 a second): {short / 9 / 6:.1%} of the clips"
    assert [line.strip() for line in lines if "last picture" in line] == [f"repeat their last picture: {told}"] * 2


def test_the_report_says_it_too(shards: Manifest, recipe: Recipe) -> None:
    short = int((shards.column("duration") <= 7 / 2.5).sum())
    found = summary._short_videos(recipe)
    assert set(found) == {"pretrain.warmup", "pretrain.constant"}
    assert found["pretrain.constant"]["sets"] == {"slow": {"records": short, "of": 9}}
    assert found["pretrain.constant"]["share"] == pytest.approx(short / 9 / 6)


def test_the_making_of_shards_tells_the_lengths(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for frames in (10, 37, 38, 200):  # of 10 a second: the last of 16 pictures at 4 a second comes at 3.75 s
        (tmp_path / f"videos/{frames}.mp4").write_bytes(encoded(frames, rate=10))
    (tmp_path / "videos/still.jpg").write_bytes(still_image())
    said = tool("make_shards", tmp_path / "videos", tmp_path / "out", "--images", "--workers", 1).stdout
    line = "seconds: 1 to 20, half of them at most 3.75; shorter 2 (40.0%) than 16 frames, 3 (60.0%) than 64 frames"
    assert f"{line} at 4 a second, so that clips repeat their last picture\n" in said
