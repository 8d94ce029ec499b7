"""Run folders that were moved, clocks that were set, data and manifests that do not belong to the run."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.chain import launch, metrics, tool
from tests.faults.material import change_recipe, stopped_run, write_rows
from vjepa_scale.checkpoint.manifest import identity, read_manifest
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.monitor.jobs import launcher_process, this_process

TEN_DAYS_S = 864_000.0


def assert_same_end(run: Path, finished: Path, stage: str, end: str) -> None:
    assert metrics(run, stage) == metrics(finished, stage)
    ends = [read_manifest(folder / stage / "checkpoints" / end) for folder in (run, finished)]
    assert identity(ends[0]) == identity(ends[1])


@pytest.mark.fault(
    "launches",
    "a run folder is moved and renamed between two stages",
    "launched with its new `run.dir`, the next stage starts from the moved one, to the same bits",
)
@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_was_moved_goes_on_with_its_next_stage(finished: Path, tmp_path: Path) -> None:
    here = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("cooldown"))
    moved = Path(here).rename(tmp_path / "other place")
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(finished.parent / "recipe.yaml", recipe)
    change_recipe(recipe, lambda tree: tree["run"].update(dir=str(moved)))
    done = launch(recipe)
    assert "pretrain is complete" in done.stdout
    assert f"continue from {moved}/pretrain/checkpoints/step_00000012" in done.stdout
    assert_same_end(moved, finished, "cooldown", "step_00000018")
    assert tool("launch", "status", moved).returncode == 0


@pytest.mark.fault(
    "launches",
    "the clock is set back by ten days between two attempts",
    "the run resumes from its newest checkpoint, which is known by its step; `status` and the report are right",
)
@pytest.mark.slow
@pytest.mark.distributed
def test_a_clock_that_was_set_back_changes_nothing(finished: Path, tmp_path: Path) -> None:
    """All that the first attempt wrote lies in the future."""
    run = stopped_run(finished, tmp_path)
    history = run / "pretrain" / "history.jsonl"
    write_rows(history, [{**row, "time": row["time"] + TEN_DAYS_S} for row in read_jsonl(history)])
    later = time.time() + TEN_DAYS_S
    for path in run.rglob("*"):
        os.utime(path, (later, later))
    launch(tmp_path / "recipe.yaml")
    assert_same_end(run, finished, "pretrain", "step_00000012")
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "started"] == [0, 8]
    assert rows[-1]["time"] < rows[0]["time"]
    status = json.loads(tool("launch", "status", run, "--json").stdout)
    (stage,) = status["stages"]
    assert (stage["state"], stage["step"], status["exit_code"]) == ("done", 12, 0)
    tool("report", run)


@pytest.mark.fault(
    "launches",
    "the clock is set while a run is at work",
    "its launcher is still known to be alive: a second launch is refused, `status` says running",
)
def test_a_launcher_is_known_whatever_the_clock_says() -> None:
    """A process's time of creation is counted from the boot, whose time moves when the clock is set."""
    row = this_process()
    for shift_s in (-3600, 0, 3600):
        found = launcher_process(row | {"created": row["created"] + shift_s})
        assert found is not None
        assert found.pid == os.getpid()
    assert launcher_process(row | {"started_ticks": row["started_ticks"] + 1}) is None
    assert launcher_process(row | {"boot": "another"}) is None
    older = {key: value for key, value in row.items() if key not in ("boot", "started_ticks")}  # of an earlier version
    assert launcher_process(older) is not None
    assert launcher_process(older | {"created": older["created"] - 60}) is None


@pytest.mark.fault(
    "data",
    "the manifest of another data set lies among the shards, or a data set was replaced since the run was killed",
    "refused before anything starts: exit code 2, one line that names the shard, or the data set and the checkpoint",
)
@pytest.mark.distributed
def test_data_that_do_not_belong_to_the_run(finished: Path, two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    run, recipe = stopped_run(finished, tmp_path), tmp_path / "recipe.yaml"
    before = sorted(run.rglob("*"))
    mixed = Path(shutil.copytree(two_data_sets["left"], tmp_path / "mixed"))
    shutil.copy(two_data_sets["right"] / "manifest.json", mixed)
    for path, said in (
        (mixed, "the manifest says"),
        (two_data_sets["right"], "data.sets.left.path: not the shards that"),
        (tmp_path / "nowhere", "no such data folder"),
    ):
        change_recipe(recipe, lambda tree, path=path: tree["data"]["sets"]["left"].update(path=str(path)))
        done = launch(recipe, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert said in line, line
        assert "Traceback" not in done.stderr
    left = {path.name for path in run.rglob("*") if path not in before}
    assert left <= {".launch.lock", ".lock"}
