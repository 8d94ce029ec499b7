"""Whole runs that send their metrics to W&B (offline) and TensorBoard: kills, a server that never answers."""

import os
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import launch, metrics, write_recipe
from tests.monitor.sinks_read import silent_server, tensorboard_series, wandb_records, wandb_series
from tests.training.test_kill import LONG, Run, newest_step
from vjepa_scale.run.events import History

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def publishers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "vjepa_scale.monitor.publish" in (process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.fault(
    "processes",
    "trainer and publishers are killed again and again",
    "W&B and TensorBoard show one series, without gaps and doubles",
)
def test_kills_of_trainer_and_publishers_leave_one_gapless_series(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    log = {"wandb": {"mode": "offline", "tags": ["a"]}, "tensorboard": True, "sink_timeout_s": 60, "every": 50}
    run_dir = tmp_path / "run"
    sections = {**LONG, "launch": {"tasks_per_node": 1}, "pretrain": {**LONG["pretrain"], "steps": 60}, "log": log}
    sections |= {"data": {"workers": 0}}
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, two_data_sets, **sections)
    dice = random.Random(8)
    for last in (10, 30, 45):
        run = Run(recipe)
        assert run.kill_when(lambda last=last: newest_step(run_dir) >= last)
        # Publishers live on until they see that the trainer has gone.
        for process in publishers():
            if dice.random() < 0.5 and str(tmp_path) in str(process.cwd()) + str(process.open_files()):
                process.kill()
        time.sleep(dice.uniform(0, 2))
    launch(recipe)

    for stage in ("pretrain", "cooldown"):
        rows = metrics(run_dir, stage)
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        records = wandb_records(run_dir / stage)
        for name, (found, values) in {
            "tensorboard": tensorboard_series(run_dir / stage, "loss"),
            "wandb": wandb_series(records, "loss"),
        }.items():
            assert found == steps, name
            assert values == pytest.approx(losses, rel=1e-6), name
        runs = [record["run"] for record in records if record["type"] == "run"]
        assert len({run["run_id"] for run in runs}) == 1
        assert {(run["run_group"], run["display_name"]) for run in runs} == {("run", f"run-{stage}")}
        assert records[-1]["type"] == "exit"
        assert records[-1]["exit"].get("exit_code", 0) == 0
    secret = KEY.encode()
    assert not [path for path in run_dir.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.fault(
    "launches",
    "the server of W&B never answers",
    "no step waits for it",
)
def test_a_server_that_never_answers_delays_nothing(
    two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Any = {"wandb": {"mode": "online"}, "tensorboard": True, "sink_timeout_s": 20, "every": 5}
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, two_data_sets, log=log, cooldown=None)
    with silent_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
        done = launch(recipe)
    waited = time.time() - History(run_dir / "pretrain").rows()[-1]["time"]

    said = [line for line in (done.stdout + done.stderr).splitlines() if "wandb" in line]
    assert len([line for line in said if "does not have all rows after 20 s" in line]) == 1, said
    assert waited < 80  # W&B itself waits for its server for 90 s
    assert [row["step"] for row in metrics(run_dir, "pretrain")] == list(range(12))
    assert tensorboard_series(run_dir / "pretrain", "loss")[0] == list(range(12))
    assert not [process for process in publishers() if str(tmp_path) in str(process.open_files())]
