"""What a checkpoint says of itself, where a real run has written it."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.chain import launch, tool, write_recipe
from vjepa_scale.checkpoint.manifest import read_manifest
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.recipe import load_recipe

FSDP: dict[str, Any] = {"replicate": 2, "activation_checkpointing": "full"}
ZERO: dict[str, Any] = {"kind": "deepspeed", "zero_stage": 2}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "mesh", "words"),
    [
        pytest.param(FSDP, {"replicate": 2, "shard": 1}, "fsdp, float32, activation checkpointing full", id="fsdp"),
        pytest.param(ZERO, {"shard": 2}, "deepspeed, ZeRO 2, float32", id="zero"),
    ],
)
def test_a_checkpoint_of_a_run_tells_where_it_comes_from(
    engine: dict[str, Any], mesh: dict[str, int], words: str, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "launch": {"tasks_per_node": 2},
        "engine": {"device": "cpu", "precision": "float32", **engine},
        "pretrain": {"steps": 2, "phases": [{"name": "all", "start_lr": 1e-4}]},
        "cooldown": None,
    }
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, **sections)
    launch(path)
    checkpoint = tmp_path / "run" / "pretrain" / "checkpoints" / "step_00000002"
    manifest = read_manifest(checkpoint)
    libraries = {"torch": torch.__version__, "python": platform.python_version()}
    if engine is ZERO:
        libraries["deepspeed"] = importlib.metadata.version("deepspeed")
    assert manifest["libraries"].items() >= libraries.items()
    assert ("deepspeed" in manifest["libraries"]) == (engine is ZERO)
    assert manifest["mesh"] == mesh

    told = tool("consolidate", "--describe", tmp_path / "run").stdout
    lines = told.splitlines()
    assert "format      vjepa_scale.checkpoint version 1" in lines
    assert "stage       pretrain" in lines
    assert "phase       all" in lines
    assert "step        2" in lines
    assert "saved by    2 ranks: " + " × ".join(f"{name} {size}" for name, size in mesh.items()) in lines
    assert f"rope        {load_recipe(path).model.rope.layout}" in lines
    (line,) = (line for line in lines if line.startswith("engine"))
    assert words in line
    assert "1 threads on cpu" in line
    (line,) = (line for line in lines if line.startswith("libraries"))
    assert all(f"{name} {version}" in line for name, version in libraries.items())
    for name, folder in two_data_sets.items():
        assert f"data        {name}: {Manifest.open(folder).identity}" in lines
    # The recipe that was resolved, which makes the same run again.
    (tmp_path / "again.yaml").write_text(told.partition("\nrecipe\n")[2])
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(path)
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["engine"]["replicate"] == engine.get("replicate", 1)
