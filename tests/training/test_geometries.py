"""A run of clips of three lengths: pictures, short and long videos in one mixture."""

import json
import math
from pathlib import Path

import pytest

from tests.chain import RECIPE, checkpoint_tensors, launch, metrics, tool, write_recipe
from tests.videos import still_image

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def sets(two_data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "files").mkdir()
    for i in range(6):
        (folder / "files" / f"{i}.jpg").write_bytes(still_image(i))
    tool("make_shards", folder / "files", folder / "shards", "--images")
    return {**two_data_sets, "pictures": folder / "shards"}


def recipe_of(path: Path, run_dir: Path, sets: dict[str, Path], *, ranks: int, micro_batch: int) -> Path:
    own = {"left": {}, "right": {"frames": 4, "fps": 8}, "pictures": {"frames": 2}}
    return write_recipe(
        path,
        run_dir,
        sets,
        launch={"tasks_per_node": ranks},
        data={
            "sets": {name: {"path": str(shards), **own[name]} for name, shards in sets.items()},
            "augment": {"rate": [0.8, 1.25]},
        },
        model={"predictor": {**RECIPE["model"]["predictor"], "mask_tokens": 2}},
        pretrain={
            "steps": 5,
            "clip": {"frames": 8, "size": [32, 40]},
            "global_batch": 16,
            "micro_batch": micro_batch,
            "phases": [{"name": "all", "start_lr": 1e-3}],
        },
        cooldown=None,
    )


def test_three_geometries_train_alike_on_any_number_of_ranks(sets: dict[str, Path], tmp_path: Path) -> None:
    """Four mask groups a step: with two ranks each has micro-batches of other lengths at the same time. Losses agree
    to the rounding of float32, since who computes which clips changes no clip and no mask."""
    runs = {}
    for ranks, micro_batch in ((1, 4), (2, 2)):
        run = tmp_path / f"run{ranks}"
        recipe = recipe_of(tmp_path / f"{ranks}.yaml", run, sets, ranks=ranks, micro_batch=micro_batch)
        launch(recipe)
        runs[ranks] = metrics(run, "pretrain")
        assert [row["step"] for row in runs[ranks]] == [0, 1, 2, 3, 4]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in runs[ranks])
        assert sum(row["effective_rank"] is not None for row in runs[ranks]) == 3
        (checkpoint,) = (run / "pretrain" / "checkpoints").glob("*5")
        saved = checkpoint_tensors(checkpoint, run)
        assert all((saved[f"predictor.mask_tokens.{j}"] != 0).all() for j in range(2))
        drawn = json.loads((checkpoint / "manifest.json").read_text())["drawn"]
        assert sum(drawn.values()) == 80
        assert all(n % 4 == 0 and abs(n - 80 / 3) <= 8 for n in drawn.values())  # whole mask groups, within two
    for one, two in zip(runs[1], runs[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        if one["effective_rank"] is not None:
            assert two["effective_rank"] == pytest.approx(one["effective_rank"], rel=1e-3)
