"""Publishers of a run that is written by hand, with the real packages; what they wrote is read by their own readers."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import tool, write_recipe
from tests.monitor.sinks_read import Read, silent_server, tensorboard_series, wandb_records, wandb_series
from tests.monitor.wandb_server import wandb_server
from tests.processes import LIMIT_S
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.worker_pool import kill_processes, process_tree
from vjepa_scale.monitor.publish import Publishers, _End, _Rows, _send, last_exit_code
from vjepa_scale.monitor.sinks import Series, TensorBoard, _why_offline, numbers
from vjepa_scale.recipe import Stage, load_recipe, stages_of
from vjepa_scale.training.preflight import check_sinks_installed

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    write_recipe(run / "recipe.yaml", run, {"left": run / "no", "right": run / "no"})
    stage = stages_of(load_recipe(run / "recipe.yaml"))["pretrain"]
    stage.folder.mkdir()
    return stage


def row(step: int) -> dict[str, Any]:
    return {"step": step, "stage": "pretrain", "loss": 1 / (step + 1), "effective_rank": None if step % 3 else 7.5}


def write(stage: Stage, first: int, end: int, *, mode: str = "a") -> None:
    with open(stage.folder / "metrics.jsonl", mode) as file:
        file.writelines(json.dumps(row(step)) + "\n" for step in range(first, end))


def resume_at(stage: Stage, step: int) -> None:
    """As MetricsLog does: the rows before the step, in another file of the same name."""
    path = stage.folder / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:step]
    path.with_suffix(".new").write_text("".join(kept))
    path.with_suffix(".new").replace(path)


def assert_gapless(found: Read, end: int) -> None:
    assert found[0] == list(range(end))
    assert found[1] == pytest.approx([1 / (step + 1) for step in range(end)])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def series_of(stage: Stage) -> Series:
    return Series(stage.folder, "jepa", {}, None, {}, live=True)


# -- small parts -----------------------------------------------------------------------------------


def test_numbers_of_a_row() -> None:
    values = {
        "step": 3,
        "phase": "warmup",
        "loss": 0.5,
        "n": 2,
        "rank": None,
        "ok": True,
        "by": {"a": 1, "b": {"c": 2.0}},
    }
    assert numbers(values) == {"loss": 0.5, "n": 2, "by/a": 1, "by/b/c": 2.0}


def test_rows_of_a_file_that_is_cut_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = _Rows(path)

    def steps() -> list[int]:
        return [row["step"] for row in rows.new()]

    assert steps() == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert steps() == [0, 1]
    with open(path, "a") as file:
        file.write('ep": 2}\nno row\n')
    assert steps() == [2]
    (tmp_path / "other").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    (tmp_path / "other").replace(path)  # longer than what was read
    assert steps() == [0, 1, 2, 3]


class Recorded:
    """A sink that has the steps up to ``last``."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.steps: list[int] = []
        self.closed: list[int | None] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        pass

    def close(self, exit_code: int | None) -> None:
        self.closed.append(exit_code)


@pytest.mark.parametrize("exit_code", [0, 75, None])
def test_rows_that_a_sink_has_are_not_sent_again_and_the_rest_is(stage: Stage, exit_code: int | None) -> None:
    write(stage, 0, 10)
    sink, end = Recorded(last=4), _End(threading.Event(), exit_code)
    end.over.set()
    _send(series_of(stage), sink, end)
    assert (sink.steps, sink.closed) == ([5, 6, 7, 8, 9], [exit_code])


DONE, SAVED = {"event": "done", "step": 9}, {"event": "interrupted", "step": 4, "signal": "USR2"}
STARTED = {"event": "started", "job": "1", "kind": "fresh", "step": 0}


def failed(user_error: bool) -> dict[str, Any]:
    texts = {"kind": "E", "message": "m", "log": None, "report": None}
    return {"event": "failed", "rank": 0, "step": 1, "user_error": user_error, **texts}


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([], None),
        ([STARTED], None),
        ([STARTED, DONE], 0),
        ([STARTED, SAVED, {"event": "requeued", "reason": "r"}], 75),
        ([STARTED, failed(True)], 2),
        ([STARTED, failed(False), {"event": "gave_up", "reason": "r"}], 1),
        ([STARTED, failed(False), STARTED], None),
        ([STARTED, SAVED, STARTED, DONE], 0),
    ],
)
def test_how_the_last_attempt_ended(events: list[dict[str, Any]], code: int | None, tmp_path: Path) -> None:
    lines = [json.dumps({"time": 1.0, **event}) + "\n" for event in events]
    (tmp_path / "history.jsonl").write_text("".join(lines))
    assert last_exit_code(tmp_path) == code


def test_auto_is_offline_without_a_key_or_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa_scale.monitor.sinks.ANSWER_S", 0.1)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with silent_server() as server:
        assert "no API key" in str(_why_offline(server, {}))
        assert "does not answer" in str(_why_offline(server, {"WANDB_API_KEY": KEY}))
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
        assert "does not answer" in str(_why_offline(server, {}))


@pytest.mark.parametrize("sink", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_refused_before_the_launch(
    sink: str, two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: Any = {"wandb": {}} if sink == "wandb" else {"tensorboard": True}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, log=values)
    assert tool("launch", recipe, "--dry-run").returncode == 0
    monkeypatch.setitem(sys.modules, sink, None)  # as if no such package were there
    for words in (["--dry-run"], ["--wait"]):
        done = tool("launch", recipe, *words, check=False)
        assert done.returncode == 2
        assert f"log.{sink}: {sink} is not installed (pip install 'vjepa_scale[{sink}]')" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_named_like_the_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B makes one in the current folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="not installed"):
        check_sinks_installed(["wandb"])


# -- TensorBoard -----------------------------------------------------------------------------------


@pytest.mark.fault(
    "launches",
    "the clock of a later attempt is behind",
    "TensorBoard shows every step",
)
def test_tensorboard_over_attempts_that_were_killed_and_a_clock_that_is_behind(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stage.folder / "tensorboard"
    now = time.time()
    for attempt, (first, end) in enumerate([(0, 5), (5, 9), (9, 12)]):
        monkeypatch.setattr(time, "time", lambda attempt=attempt: now - 3600 * attempt)  # each node an hour behind
        sink = TensorBoard(series_of(stage))
        assert sink.last == first - 1
        for step in range(first, end):
            sink.write(step, numbers(row(step)))
        sink.flush()
        newest = max(folder.iterdir())
        with open(newest, "ab") as file:  # killed in a record
            file.write(struct.pack("<Q", 40) + b"torn")
    assert_gapless(tensorboard_series(stage.folder, "loss"), 12)
    assert tensorboard_series(stage.folder, "effective_rank")[0] == [0, 3, 6, 9]


# -- processes -------------------------------------------------------------------------------------


def test_a_sink_that_fails_says_so_once_and_the_other_goes_on(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    (stage.folder / "wandb.json").write_text("[]")
    write(stage, 0, 4)
    publishers = Publishers(stage, ["wandb", "tensorboard"], timeout_s=LIMIT_S, live=True)
    write(stage, 4, 8)
    assert not publishers.end(0)
    warned = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "pretrain: wandb gets no more rows" in warned[0]
    assert "publish" in warned[0]
    assert_gapless(tensorboard_series(stage.folder, "loss"), 8)


def test_a_sink_that_hangs_is_ended_at_the_limit(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    write(stage, 0, 4)
    publishers = Publishers(stage, ["tensorboard"], timeout_s=0.1, live=True)
    hanging = psutil.Process(publishers._processes["tensorboard"].pid)
    hanging.suspend()
    assert not publishers.end(0)
    assert not hanging.is_running()
    (warned,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert "tensorboard does not have all rows after 0.1 s (log.sink_timeout_s)" in warned


@pytest.mark.slow
def test_killed_publishers_leave_no_gap_and_no_double(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    (stage.folder.parent / "launches" / "0001").mkdir(parents=True)
    (stage.folder.parent / "launches" / "0001" / "source.json").write_text('{"commit": "c0ffee"}')
    write(stage, 0, 400)
    sinks = ["wandb", "tensorboard"]
    killed = Publishers(stage, sinks, timeout_s=LIMIT_S, live=True)
    files = stage.folder / "wandb"
    # W&B writes blocks of 32 KiB.
    until(lambda: any(file.stat().st_size > 2**15 for file in files.glob("offline-run-*/*.wandb")))
    until(lambda: any((stage.folder / "tensorboard").glob("events.*")))
    for process in killed._processes.values():
        psutil.Process(process.pid).kill()
    assert not killed.end(0)
    resume_at(stage, 350)  # the trainer was killed, too: steps 350 to 399 come again
    publishers = Publishers(stage, sinks, timeout_s=LIMIT_S, live=True)
    write(stage, 350, 430)
    assert publishers.end(75)
    assert tool("launch", "publish", stage.folder.parent, "--to", "wandb,tensorboard").returncode == 0

    assert_gapless(tensorboard_series(stage.folder, "loss"), 430)
    records = wandb_records(stage.folder)
    assert_gapless(wandb_series(records, "loss"), 430)
    runs = [record["run"] for record in records if record["type"] == "run"]
    assert len(runs) == 3
    assert {run["run_id"] for run in runs} == {json.loads((stage.folder / "wandb.json").read_text())["id"]}
    assert {(run["project"], run["run_group"], run["display_name"]) for run in runs} == {
        ("of-the-environment", "run", "run-pretrain")
    }
    assert {run["git"]["commit"] for run in runs} == {"c0ffee"}
    assert runs[0]["config"]["update"]["pretrain"]["steps"] == 12
    assert any(record["type"] == "preempting" for record in records)
    secret = KEY.encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.slow
def test_online_the_server_gets_each_step_once_over_a_kill(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    write(stage, 0, 30)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        killed = Publishers(stage, ["wandb"], timeout_s=LIMIT_S, live=True)  # mode auto: there is a key, and an answer
        until(lambda: any(server.history.values()))
        kill_processes(process_tree(killed._processes["wandb"].pid))
        killed.end(None)
        resume_at(stage, 20)
        write(stage, 20, 50)
        assert Publishers(stage, ["wandb"], timeout_s=LIMIT_S, live=True).end(75)
        write(stage, 50, 60)
        assert Publishers(stage, ["wandb"], timeout_s=LIMIT_S, live=True).end(0)
    (rows,) = server.history.values()
    assert_gapless(([row["_step"] for row in rows], [row["loss"] for row in rows]), 60)
    assert any(end.get("preempting") for end in server.ends)
    assert [end["exitcode"] for end in server.ends if end.get("complete")] == [75, 0]


@pytest.mark.slow
def test_wandb_sync_joins_the_folders_of_all_attempts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, end in ((0, 20), (20, 45)):
        write(stage, first, end)
        assert Publishers(stage, ["wandb"], timeout_s=LIMIT_S, live=True).end(0)
    folders = sorted((stage.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    with wandb_server() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], env=environment, cwd=stage.folder, check=True)
    (rows,) = server.history.values()
    assert_gapless(([row["_step"] for row in rows], [row["loss"] for row in rows]), 45)
