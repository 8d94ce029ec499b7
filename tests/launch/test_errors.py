"""The error contract of tools/launch.py: exit code 2, one line that names file:key, nothing written."""

import json
import shutil
from pathlib import Path

import pytest

from tests.chain import tool, write_recipe


def refused(*arguments: object) -> str:
    done = tool("launch", *arguments, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_each_mistake_is_one_line(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    error = refused(recipe, "--wait", "optimiser.eps=1")
    assert "command line:optimiser" in error
    assert "did you mean 'optimizer'" in error

    error = refused(recipe, "--wait", f"data.sets.left.path={tmp_path / 'nowhere'}")
    assert "data.sets.left.path" in error
    assert str(tmp_path / "nowhere") in error

    error = refused(recipe, "--wait", "launch.tasks_per_node=3")
    assert f"{recipe}:pretrain.global_batch" in error
    assert "launch.tasks_per_node=2 or 4" in error

    error = refused(recipe, "--wait", "pretrain.global_batch=10")
    assert "pretrain.global_batch" in error

    for word in ("init_from", "continue_from"):
        weights = tmp_path / "w.pt"
        given = (f"pretrain.{word}={weights}", "pretrain.phases.0.start_lr=1e-4", "cooldown=null")
        error = refused(recipe, "--wait", *given)
        assert error.startswith(f"error: {recipe}:pretrain.{word}: {weights}: no such file or folder (")
        assert "checkpoints" not in error

    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(recipe, "--wait", f"run.dir={tmp_path / 'file'}")

    error = refused(tmp_path / "none.yaml")
    assert "none.yaml" in error
    assert not (tmp_path / "run").exists()


def test_damaged_shard_folders(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    copy = tmp_path / "shards"
    shutil.copytree(two_data_sets["left"], copy)
    override = f"data.sets.left.path={copy}"

    tar = next(copy.glob("*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1000])
    assert tar.name in refused(recipe, "--wait", override)
    tar.unlink()
    assert tar.name in refused(recipe, "--wait", override)
    tar.write_bytes(whole)

    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "records": 0, "shards": []}))
    assert "manifest.json" in refused(recipe, "--wait", override)
    (copy / "manifest.json").write_text("{")
    assert "manifest.json" in refused(recipe, "--wait", override)
    (copy / "manifest.json").unlink()
    assert "make_shards" in refused(recipe, "--wait", override)
    assert not (tmp_path / "run").exists()


def test_an_order_of_steps_that_do_not_exist(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)  # 12 steps, then 6
    for text, what in (
        ("3", "'3' is not a range of steps (FIRST:LAST, for example 0:20)"),
        ("9:2", "9:2 holds no step: it stops before step 2 (FIRST:LAST with FIRST < LAST, for example 9:10)"),
        ("4:4", "4:4 holds no step: it stops before step 4 (FIRST:LAST with FIRST < LAST, for example 4:5)"),
        ("18:30", "no step of the stages is in 18:30 (pretrain has steps 0 to 11, cooldown has steps 12 to 17)"),
    ):
        assert refused(recipe, "--dump-order", text) == f"error: --dump-order: {what}\n"
    error = refused(recipe, "--stages", "cooldown", "--dump-order", "0:12")
    assert "(cooldown has steps 12 to 17)" in error
    done = tool("launch", recipe, "--dump-order", "17:30")
    assert len(done.stdout.splitlines()) == 1 + 8


def test_an_order_names_the_stage_of_each_clip(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """Both stages have steps 0 and 1: only the stage tells their clips apart."""
    alone = {"continue_from": None, "steps": 2, "phases": [{"name": "all", "start_lr": 1e-4}]}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, cooldown=alone)
    header, *rows = tool("launch", recipe, "--dump-order", "0:2").stdout.splitlines()
    columns = header.removeprefix("# ").split("\t")
    found = [dict(zip(columns, row.split("\t"), strict=True)) for row in rows]
    expected = [(stage, str(step)) for stage in ("pretrain", "cooldown") for step in (0, 1) for _ in range(8)]
    assert [(row["stage"], row["step"]) for row in found] == expected


def test_the_plan_says_what_each_data_set_holds(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    left, right, nowhere = two_data_sets["left"], tmp_path / "shards", tmp_path / "nowhere"
    shutil.copytree(two_data_sets["right"], right)
    tar = sorted(right.glob("*.tar"))[1]
    done = tool("launch", recipe, "--dry-run", f"data.sets.right.path={right}")
    assert "refused now" not in done.stdout
    plan = done.stdout.splitlines()
    assert f"data    left: {left}, 24 records in 3 shards, weight 2" in plan
    assert f"data    right: {right}, 32 records in 4 shards, weight 2" in plan
    tar.unlink()
    paths = (f"data.sets.right.path={right}", f"data.sets.left.path={nowhere}")
    done = tool("launch", recipe, "--dry-run", *paths, check=False)
    assert done.returncode == 2
    plan = done.stdout.splitlines()
    assert plan[-1].startswith(f"refused now: {recipe}:data.sets.left.path: {nowhere}: no such data folder")
    assert f"data    left: {nowhere}, weight 2  (no manifest there yet)" in plan
    (line,) = (line for line in plan if line.startswith("data    right"))
    assert line.startswith(f"data    right: {right}, weight 2  (error: {tar}: the shard is missing")


def test_a_dry_run_of_nodes_that_this_machine_has_not_is_no_mistake(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    done = tool("launch", recipe, "--dry-run", "launch.nodes=2")
    assert done.stdout.splitlines()[-1].startswith(f"not on this machine: {recipe}:launch.nodes: 2 nodes, but this is")
    assert "launch.nodes: 2 nodes" in refused(recipe, "launch.nodes=2")


@pytest.mark.parametrize("name", ["vitl_256", "vith_256", "vitg_256", "vitg_384"])
def test_real_recipes_pass_dry_run(name: str) -> None:
    done = tool("launch", f"recipes/{name}.yaml", "--dry-run", "--cluster", "local", check=False)
    # This machine has not the data, and not the nodes: only the first is said to be refused, and counts.
    said = [line for line in done.stdout.splitlines() if line.startswith(("refused now", "not on this machine"))]
    assert ["no such data folder" in said[1], "launch.nodes" in said[0], len(said)] == [True, True, 2]
    assert done.returncode == 2
    assert "3072 = 128 ranks × 1 × 24" in done.stdout
    assert ("64 × 384×384 px = 18432 tokens" in done.stdout) == (name == "vitg_384")
