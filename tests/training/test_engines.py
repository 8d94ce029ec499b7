"""One recipe under every engine and on any number of ranks: the same run, through the real tools."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from tests.chain import RECIPE, launch, metrics, tool, write_recipe
from tests.processes import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "ZeRO 1": {"kind": "deepspeed", "zero_stage": 1},
    "ZeRO 2": {"kind": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"kind": "deepspeed", "zero_stage": 3, "activation_checkpointing": "full"},
}
# Plain SGD moves every weight by its gradient, where AdamW makes whole steps out of noise; clipped, so that clipping
# is compared too.
SGD = {"kind": "sgd", "clip_grad_norm": 0.2}
LARGE_STEPS = {
    "pretrain": {
        "phases": [
            {"name": "warmup", "steps": 5, "start_lr": 0.1, "final_lr": 1.0},
            {"name": "constant", "clip": {"frames": 4, "size": [40, 32]}, "mixture": {"left": 1, "right": 3}},
        ]
    }
}

Sets = dict[str, Path]
Record = Callable[[str, object], None]


def recipe(folder: Path, sets: Sets, engine: str, **sections: Any) -> Path:
    options = {"device": "cpu", "precision": "float32", "timeout_s": LIMIT_S, **ENGINES[engine]}
    sections = {"launch": {"tasks_per_node": 2}, "optimizer": SGD, **LARGE_STEPS, **sections}
    return write_recipe(folder / "recipe.yaml", folder / "run", sets, engine=options, **sections)


def run(folder: Path, sets: Sets, engine: str, **sections: Any) -> Path:
    launch(recipe(folder, sets, engine, **sections))
    return folder / "run"


def losses(run_dir: Path, stage: str) -> list[float]:
    return [row["loss"] for row in metrics(run_dir, stage)]


def consolidated(run_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    tool("consolidate", run_dir, "--out", out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def by_fsdp(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("fsdp"), two_data_sets, "fsdp")


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "fsdp"])
def test_a_chain_is_the_same_under_zero(
    engine: str, by_fsdp: Path, two_data_sets: Sets, tmp_path: Path, record_property: Record
) -> None:
    run_dir = run(tmp_path, two_data_sets, engine)
    worst = 0.0
    for stage in ("pretrain", "cooldown"):
        wanted, found = losses(by_fsdp, stage), losses(run_dir, stage)
        assert stage == "cooldown" or wanted[0] - min(wanted) > 0.05 * wanted[0]
        assert found == pytest.approx(wanted, rel=1e-5)
        worst = max(worst, *(abs(a - b) / b for a, b in zip(found, wanted, strict=True)))
    record_property("measured", f"loss {worst:.1e}")
    wanted_weights, weights = (consolidated(d, tmp_path / d.parent.name) for d in (by_fsdp, run_dir))
    assert weights.keys() == wanted_weights.keys()
    for name, value in wanted_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_cooldown_may_follow_under_another_engine(by_fsdp: Path, two_data_sets: Sets, tmp_path: Path) -> None:
    shutil.copytree(by_fsdp, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cooldown")
    launch(recipe(tmp_path, two_data_sets, "ZeRO 2"), "--stages", "cooldown")
    assert losses(tmp_path / "run", "cooldown") == pytest.approx(losses(by_fsdp, "cooldown"), rel=1e-5)


def test_saved_on_four_ranks_goes_on_on_three_and_on_one(two_data_sets: Sets, tmp_path: Path) -> None:
    """With AdamW, whose moments and bias correction must come along. The batch is kept: 3, 4 and 12 clips a rank."""
    batch = {"pretrain": {**RECIPE["pretrain"], "global_batch": 12, "micro_batch": 1}, "cooldown": None}

    def trained(run_dir: Path, steps: int) -> list[float]:
        sections: dict[str, Any] = {"launch": {"tasks_per_node": 4}, **batch}
        path = write_recipe(run_dir.parent / f"{run_dir.name}.yaml", run_dir, two_data_sets, **sections)
        launch(path, f"pretrain.steps={steps}")
        return losses(run_dir, "pretrain")

    wanted = trained(tmp_path / "undisturbed", 12)
    trained(tmp_path / "half", 7)
    for ranks in (3, 1):
        run_dir = tmp_path / f"on{ranks}"
        shutil.copytree(tmp_path / "half", run_dir)
        launch(run_dir / "recipe.yaml", f"run.dir={run_dir}", "pretrain.steps=12", f"launch.tasks_per_node={ranks}")
        found = losses(run_dir, "pretrain")
        assert found[:7] == wanted[:7]
        numpy.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert [(row["kind"], row["world_size"]) for row in history(run_dir)] == [("fresh", 4), ("resume", ranks)]


def history(run_dir: Path) -> list[dict[str, Any]]:
    from vjepa_scale.core.files import read_jsonl

    return [row for row in read_jsonl(run_dir / "pretrain" / "history.jsonl") if row["event"] == "started"]
