"""A run whose clips get a mask of every kind at once."""

import math
from pathlib import Path

import pytest

from tests.chain import RECIPE, checkpoint_tensors, launch, metrics, tool, write_recipe

pytestmark = pytest.mark.distributed

GENERATORS = [
    {"blocks": 2, "spatial_scale": 0.2},
    {"kind": "future", "context_share": [0.25, 0.75]},
    {"kind": "frame_dropout", "dropped_share": 0.5},
    {"kind": "multi_rate", "context_share": 0.5, "steps_ahead": [1, 3]},
]


def test_every_kind_of_mask_trains_with_its_own_mask_token(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """Four time steps a clip; mask tokens start at zero, and two steps of training move all of them."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        masks={"generators": GENERATORS},
        model={"predictor": {**RECIPE["model"]["predictor"], "mask_tokens": 4}},
        pretrain={"steps": 2, "clip": {"frames": 8, "size": 32}, "phases": [{"name": "all", "start_lr": 1e-3}]},
        cooldown=None,
    )
    launch(recipe)
    rows = metrics(tmp_path / "run", "pretrain")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    (checkpoint,) = (tmp_path / "run" / "pretrain" / "checkpoints").glob("*2")
    saved = checkpoint_tensors(checkpoint, tmp_path)
    assert all((saved[f"predictor.mask_tokens.{j}"] != 0).all() for j in range(4))


def test_clips_of_one_time_step_are_refused_before_anything_starts(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        masks={"generators": GENERATORS},
        pretrain={"clip": {"frames": 2, "size": 32}},
        cooldown=None,
    )
    done = tool("launch", recipe, "--dry-run", "pretrain.phases=[{name: all, start_lr: 1e-3}]", check=False)
    assert done.returncode == 2
    assert "masks.generators.1: a future mask takes 2 time steps at least, a clip has 1" in done.stderr
