"""What happens to a run when a process of it dies or a clip turns out to be damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import ROOT, launch, metrics, tool, write_recipe
from tests.processes import LIMIT_S
from vjepa_scale.core.errors import OutsideError, PassingError, UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch.local import LocalChain
from vjepa_scale.launch.record import Launch
from vjepa_scale.launch.retry_policy import end_of_attempt
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.run.events import History
from vjepa_scale.run.failures import report_failure

pytestmark = pytest.mark.distributed


def rank_process(run: Path, rank: int) -> psutil.Process:
    """The rank itself: its parent, which submitit has started, is its supervisor."""
    places = json.loads((run / "pretrain" / "ranks.json").read_text())["ranks"]
    return psutil.Process(places[rank]["pid"])


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    """The launcher in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "launch.py"), str(recipe), "--wait", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(launcher: subprocess.Popen[str], run: Path, steps: int) -> None:
    log = run / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not (log.exists() and log.read_bytes().count(b"\n") >= steps):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(run: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "history.jsonl").read_text().splitlines()]


def named(rows: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["event"] == event]


@pytest.mark.fault(
    "processes",
    "a rank is killed (SIGKILL) in a step or a collective",
    "all ranks of the job end; the launcher starts them again and they resume; with `launch.max_restarts=0` it ends "
    "with 1, and one line that names the log",
)
@pytest.mark.slow
@pytest.mark.parametrize("max_restarts", [0, 3])
def test_a_killed_rank(max_restarts: int, two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """Without restarts the launcher says which rank failed, and the same command goes on; else it goes on itself.

    Loader workers end with their ranks (without restarts; with them there are none).
    """
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run,
        two_data_sets,
        launch={"tasks_per_node": 2, "max_restarts": max_restarts},
        data={"workers": 0 if max_restarts else 1},
        pretrain={"steps": 60},
        cooldown=None,
    )
    launcher = start(recipe)
    wait_for_steps(launcher, run, 6)
    victim = rank_process(run, 1)
    family = psutil.Process(launcher.pid).children(recursive=True)
    victim.send_signal(signal.SIGKILL)
    stdout, stderr = launcher.communicate(timeout=LIMIT_S)
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert not alive, f"still running: {alive}"
    if max_restarts == 0:
        assert launcher.returncode == 1
        assert stderr.startswith(f"error: pretrain: Killed at step {events(run)[-2]['step']}: rank 1 (node ")
        assert f", pid {victim.pid}) ended by SIGKILL; not started again" in stderr
        assert str(run / "pretrain" / "failures") in stderr
        assert stderr.count("\n") == 1
        launch(recipe)
    else:
        assert launcher.returncode == 0, stdout + stderr
        assert [row["kind"] for row in named(events(run), "started")] == ["fresh", "resume"]
        assert len(named(events(run), "requeued")) == 1
        assert f", pid {victim.pid}) ended by SIGKILL; another attempt\n" in stdout
    assert [row["step"] for row in metrics(run, "pretrain")] == list(range(60))
    failed = named(events(run), "failed")
    assert len(failed) == 1
    assert failed[0]["rank"] == 1  # by its supervisor
    assert Path(failed[0]["log"]).exists()


@pytest.mark.fault(
    "training",
    "the loss is not finite twice at the same step",
    "the run is not started a third time; the error names the step",
)
@pytest.mark.slow
def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        guards={"spikes": {"action": "stop"}},
        pretrain={
            "phases": [
                {"name": "warmup", "steps": 5, "start_lr": 1e-4, "final_lr": 1e-3},
                {"name": "constant", "start_lr": 1e30},  # the first step of it ruins the weights
            ]
        },
    )
    done = launch(recipe, check=False)
    assert done.returncode == 1
    assert "rank 0 failed with NonFiniteLossError at step 6" in done.stderr
    assert "twice in a row" in done.stderr
    rows = events(tmp_path / "run")
    assert [row["step"] for row in named(rows, "started")] == [0, 5]
    assert [(row["kind"], row["step"]) for row in named(rows, "failed")] == [("NonFiniteLossError", 6)] * 2
    assert not (tmp_path / "run" / "cooldown").exists()

    # The rate of steps that are not trained yet may change: the run goes on.
    launch(recipe, "pretrain.phases.1.start_lr=1e-3")
    assert [row["step"] for row in metrics(tmp_path / "run", "pretrain")] == list(range(12))


@pytest.mark.parametrize(
    ("error", "one_line"),
    [
        (UserError("no such key", where="a.yaml"), True),
        (PassingError("a file server does not answer", where="a.tar"), True),
        (OutsideError("loader worker 0 was ended by SIGKILL", where="data.workers"), True),
        (RuntimeError("a bug"), False),
    ],
)
def test_what_the_local_launcher_ends_with(error: Exception, one_line: bool, tmp_path: Path) -> None:
    """An error that a user can mend, also one that may pass and did not: its own line, and exit code 2."""
    folders = dict.fromkeys(("left", "right"), tmp_path)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", folders, cooldown=None))
    stage = stages_of(recipe)["pretrain"]
    report_failure(stage.failures, Ranks(0, 1, 0, 1, "7", "submitit-local", "7"), 3, error, logs=stage.logs)
    history = History(stage.folder)
    for _ in range(2):
        verdict = end_of_attempt(history, stage.failures, job="7", job_id=None, max_restarts=0, log=tmp_path / "log")
    failure = LocalChain(Launch(tmp_path, tmp_path))._failure(stage, verdict, history)
    assert isinstance(failure, UserError) == one_line
    assert (str(failure) == str(error)) == one_line
    assert str(error) in str(failure)


@pytest.mark.fault(
    "signals",
    "Ctrl-C or TERM to the local launcher",
    "ranks save and stop; exit code 128 + the signal's number; the same command goes on",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_told_to_stop_saves_first(
    number: signal.Signals, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run,
        two_data_sets,
        launch={"tasks_per_node": 2 if number == signal.SIGINT else 1},
        checkpoint={"every": 1000},
        pretrain={"steps": 100_000},
    )
    launcher = start(recipe)
    wait_for_steps(launcher, run, 12)
    os.killpg(launcher.pid, number) if number == signal.SIGINT else launcher.send_signal(number)  # Ctrl-C: everyone's
    _, stderr = launcher.communicate(timeout=LIMIT_S)
    assert launcher.returncode == 128 + number
    assert "Traceback" not in stderr
    interrupted = named(events(run), "interrupted")[-1]
    assert interrupted["step"] == len(metrics(run, "pretrain")) > 11
    assert (run / "pretrain" / "checkpoints" / f"step_{interrupted['step']:08d}").is_dir()
    assert named(events(run), "cancelled")
    assert not (run / "cooldown").exists()


@pytest.mark.fault(
    "data",
    "more clips are damaged than `data.faults.max_rate` allows",
    "exit code 2 and one line with the clips",
)
def test_a_clip_that_does_not_decode_stops_the_run_and_is_named(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(two_data_sets["left"], shards)
    for tar in shards.glob("*.tar"):  # same sizes, other bytes: only decoding can tell
        content = bytearray(tar.read_bytes())
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".mp4"):
                    content[member.offset_data : member.offset_data + member.size] = b"\x55" * member.size
        tar.write_bytes(content)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "run", {**two_data_sets, "left": shards}, launch={"tasks_per_node": 2}
    )
    done = launch(recipe, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "data set 'left', record 0000" in done.stderr
    assert ".tar" in done.stderr
    reports = [json.loads(path.read_text()) for path in (tmp_path / "run" / "pretrain" / "failures").glob("*.json")]
    assert any(report["user_error"] for report in reports)


@pytest.mark.fault(
    "launches",
    "a run that is at work is launched again",
    "the second launch ends with 2, names the process and changes nothing; the first goes on",
)
def test_two_launches_cannot_train_the_same_run(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        data={"workers": 0},
        pretrain={"steps": 100_000},
        cooldown=None,
    )
    started = tool("launch", recipe)  # in the background
    pid = int(started.stdout.split("started as process ")[1].split(",")[0])
    first = psutil.Process(pid)
    assert "pretrain: 100000 steps, starts fresh" in started.stdout.partition("started as process ")[0]  # the plan
    try:
        log = tmp_path / "run" / "pretrain" / "metrics.jsonl"
        deadline = time.monotonic() + LIMIT_S
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = launch(recipe, check=False)
        assert done.returncode == 2
        assert f"process {pid} of 'pretrain' is at work" in done.stderr
        assert not (tmp_path / "run" / "pretrain" / "failures").exists()  # refused before it touched anything
        rows = log.read_bytes().count(b"\n")
        while log.read_bytes().count(b"\n") < rows + 10:  # the first run goes on
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert first.is_running()
        # What it does before the first step is in its log.
        said = tmp_path / "run" / "launch.log"
        steps = ("opening the data", "left 24, right 32; building the networks", "starts fresh", "the first batch")
        while not said.read_text().count(steps[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        places = [said.read_text().rindex(step) for step in steps]
        assert places == sorted(places)
    finally:
        os.killpg(pid, signal.SIGKILL)  # a background launch is a session of its own
