"""Stages that run on other nodes than the recipe's others; and a mission without the data of one stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain import ACTION, ROOT, launch, tool, write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.plan import describe
from vjepa_scale.recipe import load_recipe, stages_of

FLAGSHIP = ROOT / "recipes" / "vitg_384.yaml"


def dry_run(*words: object) -> list[str]:
    return tool("launch", FLAGSHIP, "--dry-run", "--cluster", "slurm", *words, check=False).stdout.splitlines()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"pretrain": (16, 8), "cooldown": (16, 8), "action": (4, 8)}),
        (["launch.nodes=32"], {"pretrain": (32, 8), "cooldown": (32, 8), "action": (4, 8)}),
        (["action.launch.nodes=2", "action.launch.tasks_per_node=4"], {"action": (2, 4)}),
        (["cooldown.launch.cpus_per_task=3"], {"cooldown": (16, 8), "pretrain": (16, 8)}),
        (["action.launch=null"], {"action": (16, 8)}),
    ],
)
def test_a_stage_says_what_differs(overrides: list[str], expected: dict[str, tuple[int, int]]) -> None:
    stages = stages_of(load_recipe(FLAGSHIP, overrides))
    found = {name: (stage.launch.nodes, stage.launch.tasks_per_node) for name, stage in stages.items()}
    assert found == found | expected
    assert stages["cooldown"].launch.cpus_per_task == (3 if "cooldown" in str(overrides) else 16)


def test_the_flagship_is_the_whole_mission() -> None:
    lines = dry_run()
    (action,) = (line for line in lines if line.startswith("action:"))
    assert action == "action: 94500 steps, starts from the weights of cooldown, on 4 nodes × 8 = 32 ranks"
    assert [line.partition(":")[0] for line in lines if " steps, " in line and line[0] != " "] == [
        "pretrain",
        "cooldown",
        "action",
    ]
    assert any("batch 256 = 32 ranks × 1 × 8" in line for line in lines)
    for without in (("action=null",), ("--stages", "pretrain,cooldown")):
        assert not any("action" in line for line in dry_run(*without))


def test_ranks_that_do_not_divide_a_stages_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"256 clips in micro-batches of 8 are 32, which 128 ranks cannot share"):
        list(describe(list(stages_of(load_recipe(FLAGSHIP, ["action.launch=null"])).values()), where="here"))


def test_missing_data_of_a_stage_is_refused_before_anything_is_submitted(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, action=ACTION)
    sets = {name: {"path": str(folder)} for name, folder in two_data_sets.items()}
    robot = {"robot": {"path": str(tmp_path / "no robot"), "weight": 0}}
    given = f"data.sets={json.dumps({**sets, **robot})}"
    done = tool("launch", path, given, "--cluster", "local", "--wait", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}:data.sets.robot.path: {tmp_path / 'no robot'}: no such data folder")
    assert done.stderr.rstrip().endswith("; or leave 'action' out: action=null, or --stages pretrain,cooldown)")
    assert not (tmp_path / "run").exists()
    # What another stage needs too is not to be had by leaving one out.
    sets["left"]["path"] = str(tmp_path / "none")
    done = tool("launch", path, f"data.sets={json.dumps({**sets, **robot})}", "--cluster", "local", check=False)
    assert "none: no such data folder" in done.stderr
    assert "leave" not in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_each_stage_has_its_own_number_of_processes(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    few: dict[str, Any] = {"steps": 2, "phases": [{"name": "all", "start_lr": 1e-4}]}
    path = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        pretrain={**few, "launch": {"tasks_per_node": 2}},
        cooldown={**few},
    )
    launch(path, "--cluster", "local")
    for stage, ranks in (("pretrain", 2), ("cooldown", 1)):
        rows = [json.loads(line) for line in (tmp_path / "run" / stage / "history.jsonl").read_text().splitlines()]
        assert [row["world_size"] for row in rows if row["event"] == "started"] == [ranks]
        assert rows[-1]["event"] == "done"
