"""Recipes for one GPU and for one node: their plans, and that each trains as it stands, at toy size on CPU."""

import math
from pathlib import Path

import pytest

from tests.chain import ROOT, launch, metrics, tool
from tests.pages import TOY

NAMES = ["vitb_1gpu", "vitl_1gpu", "vitl_1node", "continue_published_1node"]


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_says_memory_and_time(name: str, two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    published = ("pretrain.init_from=null",) if "published" in name else ()
    options = (f"data.sets.mine.path={two_data_sets['left']}", f"run.dir={tmp_path / 'run'}", *published)
    done = tool("launch", ROOT / "recipes" / f"{name}.yaml", "--dry-run", "--cluster", "slurm", *options, check=False)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert sum(line.startswith("memory: ") and line.endswith("computed, not measured)") for line in lines) == 3
    assert sum(line.startswith("time: ") and line.endswith("computed, not measured)") for line in lines) == 3
    assert not any("MORE THAN FITS" in line for line in lines)
    for said in (line for line in lines if line.startswith("refused now")):
        assert "sbatch" in said or "Slurm" in said, said


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[2:])  # tests/launch/test_readme.py trains vitb_1gpu; vitl_1gpu is it in large
def test_it_trains_and_cools_down_at_toy_size(name: str, two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    published = ("pretrain.init_from=null",) if "published" in name else ()
    launch(
        ROOT / "recipes" / f"{name}.yaml",
        f"data.sets.mine.path={two_data_sets['left']}",
        f"run.dir={tmp_path / 'run'}",
        "launch.tasks_per_node=1",
        *TOY,
        *published,
    )
    for stage, steps in (("pretrain", [0, 1]), ("cooldown", [2, 3])):
        rows = metrics(tmp_path / "run", stage)
        assert [row["step"] for row in rows] == steps
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
