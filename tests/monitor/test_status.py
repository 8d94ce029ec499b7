"""What is told about a run, from histories and metrics written by hand: every state, without Slurm.

What Slurm says is given as JobState values, which tests/slurm compares with a real cluster's; local launchers
are real processes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import ROOT, write_recipe
from tests.processes import LIMIT_S
from vjepa_scale.checkpoint.manifest import describe_file, write_manifest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.growing_file import GrowingFile
from vjepa_scale.monitor import cancel as cancel_module
from vjepa_scale.monitor import follow as follow_module
from vjepa_scale.monitor.cancel import cancel
from vjepa_scale.monitor.follow import follow, show_lines
from vjepa_scale.monitor.jobs import (
    JobState,
    SlurmUnavailable,
    _parse_scontrol,
    is_alive,
    local_launcher,
    slurm_job,
    this_process,
)
from vjepa_scale.monitor.states import RunStatus, StageStatus
from vjepa_scale.monitor.status import read_status
from vjepa_scale.monitor.status_text import as_json, render
from vjepa_scale.run.events import Row

# The chain's stages: pretrain has steps 0 to 11, cooldown 12 to 17. 8 clips per step.
NOW = time.time()


class Run:
    """A run folder whose files are written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_recipe(folder / "recipe.yaml", folder, {"left": folder / "no", "right": folder / "data"})

    def add(self, stage: str, event: str, *, ago: float = 100.0, **values: Any) -> None:
        path = self.folder / stage / "history.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({"time": NOW - ago, "event": event, **values}) + "\n")

    def submit(
        self, stage: str, *, job: str = "100", cluster: str = "slurm", ago: float = 1000.0, **values: Any
    ) -> None:
        name, launch = f"run-{stage}", str(self.folder / "launches" / "0001")
        self.add(stage, "submitted", ago=ago, cluster=cluster, job_id=job, name=name, launch=launch, **values)

    def start(self, stage: str, *, job: str = "100", restart: int = 0, step: int = 0, ago: float = 900.0) -> None:
        kind = "resume" if step not in (0, 12) else "fresh" if step == 0 else "continue"
        self.add(
            stage, "started", ago=ago, job=f"{job}.0-{restart}", job_id=job, host="n1", kind=kind, step=step, repeated=0
        )

    def fail(self, stage: str, *, restart: int = 0, step: int | None = 7, ago: float = 80.0, **values: Any) -> None:
        job = {"job": f"100.*-{restart}", "job_id": "100"}
        log = self.folder / stage / "logs" / "100_1_log.err"
        row = {"kind": "ValueError", "message": "a bad\nclip", "rank": 1, "step": step, "user_error": False}
        self.add(stage, "failed", ago=ago, log=str(log), report=None, **(job | row | values))

    def train(self, stage: str, first: int, last: int, *, seconds: float = 2.0, ago: float = 0.0) -> None:
        path = self.folder / stage / "metrics.jsonl"
        phases = {"pretrain": lambda step: "warmup" if step < 5 else "constant", "cooldown": lambda step: "decay"}
        with open(path, "a") as file:
            for step in range(first, last):
                row = {"step": step, "stage": stage, "phase": phases[stage](step), "loss": 1 / (step + 1)}
                file.write(json.dumps(row | {"clips_per_s": 8 / seconds}) + "\n")
        os.utime(path, (time.time() - ago,) * 2)

    def save(self, stage: str, step: int) -> None:
        folder = self.folder / stage / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        tensors = folder / "__0_0.distcp"
        tensors.write_bytes(b"tensors")
        first = 0 if stage == "pretrain" else 12
        write_manifest(
            folder, step=step, world_size=1, files={tensors.name: describe_file(tensors)}, extra={"first": first}
        )
        self.add(stage, "saved", step=step)

    def finish(self, stage: str) -> None:
        end = 12 if stage == "pretrain" else 18
        self.start(stage, step=end - 6 if stage == "pretrain" else 12)
        self.save(stage, end)
        self.add(stage, "done", step=end)

    def look(self, ask: Callable[..., JobState | None] | JobState | None = None) -> RunStatus:
        """ask: what Slurm answers about every job, or the function that answers."""
        status = read_status(self.folder, ask=ask if callable(ask) else lambda job_id, name: ask)
        assert render(status).count("\n") >= len(status.stages)
        assert json.loads(as_json(status))["exit_code"] == status.exit_code
        return status

    def pretrain(self, ask: Callable[..., JobState | None] | JobState | None = None) -> StageStatus:
        return self.look(ask).stages[0]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "a run")


def job(state: str, **values: Any) -> JobState:
    return JobState(job_id="100", name="run-pretrain", state=state, **({"restarts": 0} | values))


def no_answer(job_id: str, *, name: str | None = None) -> JobState | None:
    raise SlurmUnavailable("Unable to contact slurm controller")


def test_no_torch(run: Run) -> None:
    """The answer is there at once, whatever there is to read."""
    run.submit("pretrain")
    run.start("pretrain")
    run.train("pretrain", 0, 5)
    run.save("pretrain", 4)
    for command in ("status", "cancel", "follow"):
        words = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "launch.py"), command]
        folder = run.folder if command == "status" else run.folder.parent
        done = subprocess.run([*words, str(folder)], capture_output=True, text=True, timeout=LIMIT_S)
        assert "Traceback" not in done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
        assert f"vjepa_scale.monitor.{command}" in imported
        assert command != "status" or "pretrain" in done.stdout
        assert not {name for name in imported if name.partition(".")[0] in ("torch", "submitit")}


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        read_status(tmp_path / "none")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        read_status(tmp_path)


def test_not_launched(run: Run) -> None:
    status = run.look()
    assert [stage.state for stage in status.stages] == ["not launched"] * 2
    assert "never launched" in render(status)
    with pytest.raises(UserError, match="launched"):
        follow(run.folder)


# -- in Slurm --------------------------------------------------------------------------------------------


def test_pending(run: Run) -> None:
    run.submit("pretrain")
    run.submit("cooldown", job="101")
    answers = {
        "100": job("PENDING", reason="Resources", start_time=time.time() + 3600),
        "101": job("PENDING", reason="Dependency"),
    }
    asked: list[tuple[str, str | None]] = []

    def ask(job_id: str, *, name: str | None) -> JobState:
        asked.append((job_id, name))
        return answers[job_id]

    status = run.look(ask)
    assert asked == [("100", "run-pretrain"), ("101", "run-cooldown")]
    assert [stage.state for stage in status.stages] == ["pending", "pending"]
    assert status.stages[0].detail.startswith("Resources, expected to start ")
    assert status.stages[1].detail == "waits for pretrain"
    assert status.exit_code == 0
    assert status.alive == ["pretrain", "cooldown"]
    assert status.launch == "0001"


def test_starting_and_running(run: Run) -> None:
    run.submit("pretrain")
    assert run.pretrain(job("CONFIGURING")).state == "starting"
    assert run.pretrain(job("RUNNING", start_time=NOW - 950)).state == "starting"
    run.start("pretrain")
    run.train("pretrain", 0, 8)
    run.save("pretrain", 4)
    stage = run.pretrain(job("RUNNING", nodes="n[1-2]"))
    assert (stage.state, stage.detail) == ("running", "on n[1-2]")
    assert (stage.step, stage.last_step, stage.loss) == (8, 12, 1 / 8)
    assert stage.clips_per_s == pytest.approx(4.0)
    assert stage.eta_s == pytest.approx(8.0)
    assert (stage.checkpoint, stage.checkpoint_step) == ("step_00000004", 4)
    assert not stage.still


def test_a_pace_is_of_one_geometry_and_without_an_attempts_first_step(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain", step=6)
    run.train("pretrain", 0, 6, seconds=1)
    run.train("pretrain", 6, 7, seconds=50)
    run.train("pretrain", 7, 9, seconds=4)
    assert run.pretrain(job("RUNNING")).step_s == pytest.approx((1 + 4 + 4) / 3)


def test_running_without_a_step(run: Run) -> None:
    run.submit("pretrain", ago=9000)
    run.start("pretrain", ago=9000)
    run.train("pretrain", 0, 3, ago=3000)
    status = run.look(job("RUNNING"))
    assert status.stages[0].state == "running"
    assert status.stages[0].still
    assert "running, but no step for 50 min" in render(status)


def test_requeued_and_started_again(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.save("pretrain", 7)
    run.add("pretrain", "interrupted", signal="SIGUSR2", step=7)
    assert run.pretrain(job("RUNNING")).state == "ending"
    assert run.pretrain(job("COMPLETING")).state == "ending"
    stage = run.pretrain(job("PENDING", reason="BeginTime", restarts=1))
    assert (stage.state, stage.detail) == ("requeued", "SIGUSR2, saved at step 7; BeginTime")
    assert run.pretrain(job("RUNNING", restarts=1, start_time=NOW)).state == "starting"
    run.start("pretrain", restart=1, step=7, ago=50)
    status = run.look(job("RUNNING", restarts=1))
    assert status.stages[0].state == "running"
    assert status.stages[0].attempt == 2
    assert "attempt 2, after SIGUSR2" in render(status)


def test_a_node_failure(run: Run) -> None:
    """The last attempt wrote nothing about its end; Slurm alone knows that it ended."""
    run.submit("pretrain")
    run.start("pretrain")
    run.train("pretrain", 0, 6)
    stage = run.pretrain(job("PENDING", reason="Resources", restarts=1))
    assert (stage.state, stage.detail) == ("requeued", "ended without a word; Resources")
    stage = run.pretrain(job("RUNNING", restarts=1))
    assert (stage.state, stage.attempt) == ("starting", 2)
    assert run.look(job("RUNNING", restarts=1)).exit_code == 0
    run.start("pretrain", restart=1, ago=50)
    assert run.pretrain(job("RUNNING", restarts=1)).state == "running"
    # Over for good: nobody requeued it.
    status = run.look(job("NODE_FAIL", restarts=1))
    assert status.stages[0].state == "stopped"
    assert "NODE_FAIL" in status.stages[0].detail
    assert status.exit_code == 1
    status = run.look(None)
    assert status.stages[0].detail == "ended without a word after step 6 (Slurm no longer knows its job)"
    assert status.exit_code == 1


@pytest.mark.parametrize("answer", [job("FAILED", exit_code="1:0"), None, no_answer])
def test_failed(run: Run, answer: Callable[..., JobState | None] | JobState | None) -> None:
    run.submit("pretrain")
    run.submit("cooldown", job="101")
    run.start("pretrain")
    run.train("pretrain", 0, 7)
    run.fail("pretrain")
    status = run.look(answer)
    stage = status.stages[0]
    assert stage.state == "failed"
    assert stage.error is not None
    assert stage.error.ended
    assert stage.error.who == "rank 1: ValueError at step 7: a bad"
    assert "100_1_log.err" in render(status)
    assert status.exit_code == 1
    if answer is None:
        assert status.stages[1].state == "cancelled"
        assert status.stages[1].detail == "because pretrain did not finish"
    if answer is no_answer:
        assert "Slurm does not answer (Unable to contact" in render(status)


def test_a_dependant_that_slurm_cancelled(run: Run) -> None:
    run.submit("pretrain")
    run.submit("cooldown", job="101")
    run.start("pretrain")
    run.fail("pretrain")
    answers = {"100": job("FAILED"), "101": job("CANCELLED", reason="DependencyNeverSatisfied")}
    status = run.look(lambda job_id, name: answers[job_id])
    assert [stage.state for stage in status.stages] == ["failed", "cancelled"]
    assert status.stages[1].detail == "because pretrain did not finish"


def test_an_error_that_was_survived(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.fail("pretrain", ago=80)
    run.add("pretrain", "requeued", reason="ValueError at step 7", job_id="100")
    run.start("pretrain", restart=1, step=4, ago=50)
    status = run.look(job("RUNNING", restarts=1))
    error = status.stages[0].error
    assert error is not None
    assert not error.ended
    assert "an earlier error: rank 1: ValueError at step 7: a bad" in render(status)
    assert status.exit_code == 0


def test_gave_up(run: Run) -> None:
    run.submit("pretrain")
    for restart in range(2):
        run.start("pretrain", restart=restart)
        run.fail("pretrain", restart=restart)
    run.add("pretrain", "gave_up", reason="the same twice", job_id="100")
    for answer in (job("FAILED"), None, no_answer):
        status = run.look(answer)
        assert (status.stages[0].state, status.stages[0].detail) == ("gave up", "the same twice")
        assert status.stages[0].error is not None
        assert status.stages[0].error.ended
        assert status.exit_code == 1


def test_only_a_rank_could_say_why(run: Run) -> None:
    """The batch script was killed before it could write a row."""
    run.submit("pretrain")
    run.start("pretrain")
    reports = run.folder / "pretrain" / "failures"
    reports.mkdir()
    told = {"step": 3, "message": "no", "user_error": False, "bystander": False, "traceback": "", "log": None}
    (reports / "100.0-0.0.json").write_text(
        json.dumps({**told, "bystander": True, "rank": 0, "kind": "DistBackendError"})
    )
    (reports / "100.0-0.1.json").write_text(json.dumps({**told, "rank": 1, "kind": "MemoryError"}))
    (reports / "99.0-0.1.json").write_text(json.dumps({**told, "rank": 1, "kind": "Older"}))
    (reports / "1001.0-0.1.json").write_text(json.dumps({**told, "rank": 0, "kind": "Another"}))
    stage = run.pretrain(job("RUNNING"))
    assert (stage.state, stage.detail) == ("ending", "rank 1: MemoryError at step 3: no")
    status = run.look(None)
    assert status.stages[0].state == "failed"
    assert status.stages[0].error is not None
    assert status.stages[0].error.kind == "MemoryError"
    assert run.pretrain(job("CANCELLED")).state == "cancelled"  # ranks that are ended from outside may complain


def test_only_a_rank_could_say_why_it_never_began(run: Run) -> None:
    run.submit("pretrain")
    reports = run.folder / "pretrain" / "failures"
    reports.mkdir()
    told = {
        "step": None,
        "message": "no",
        "user_error": True,
        "bystander": False,
        "traceback": "",
        "log": None,
        "rank": 0,
    }
    (reports / "1001.0-0.0.json").write_text(json.dumps({**told, "kind": "Another"}))
    assert run.pretrain(None).state == "stopped"
    (reports / "100.0-0.0.json").write_text(json.dumps({**told, "kind": "UserError"}))
    stage = run.pretrain(None)
    assert stage.state == "failed"
    assert stage.error is not None
    assert stage.error.who == "rank 0: UserError: no"


def test_cancelled(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.add("pretrain", "cancelled", ago=60)
    assert run.pretrain(job("COMPLETING")).state == "ending"
    assert "attempt" not in render(run.look(job("RUNNING")))  # its first goes on for a moment
    run.save("pretrain", 5)
    run.add("pretrain", "interrupted", signal="SIGTERM", step=5, ago=55)  # its ranks saved when they were told
    for answer in (job("CANCELLED"), None, no_answer):
        status = run.look(answer)
        assert status.stages[0].state == "cancelled"
        assert "saved step_00000005" in status.stages[0].detail
        assert status.exit_code == 0


def test_cancelled_by_hand(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.add("pretrain", "interrupted", signal="SIGTERM", step=5)
    stage = run.pretrain(job("CANCELLED", reason="by 1000", source="sacct"))
    assert stage.state == "cancelled"
    assert "in Slurm" in stage.detail
    assert run.pretrain(None).state == "stopped"
    assert run.look(None).exit_code == 0


def test_done(run: Run) -> None:
    run.submit("pretrain")
    run.submit("cooldown", job="101")
    run.finish("pretrain")
    run.finish("cooldown")

    def ask(job_id: str, *, name: str | None) -> JobState | None:
        raise AssertionError("a finished stage needs no Slurm")

    status = run.look(ask)
    assert [stage.state for stage in status.stages] == ["done", "done"]
    assert [stage.step for stage in status.stages] == [12, 18]
    assert status.exit_code == 0
    assert status.alive == []
    (run.folder / "cooldown" / "checkpoints" / "step_00000018" / "__0_0.distcp").write_bytes(b"half")
    assert run.look(None).stages[1].state != "done"


def test_slurm_does_not_answer(run: Run) -> None:
    run.submit("pretrain")
    run.submit("cooldown", job="101")
    asked: list[str] = []

    def ask(job_id: str, *, name: str | None) -> JobState | None:
        asked.append(job_id)
        return no_answer(job_id)

    status = run.look(ask)
    assert asked == ["100"]  # each question may take its whole time-out
    assert status.stages[0].state == "pending"
    run.start("pretrain")
    run.train("pretrain", 0, 2)
    status = run.look(no_answer)
    assert status.problem == "Unable to contact slurm controller"
    assert (status.stages[0].state, status.stages[0].detail) == ("running", "by its files")
    assert status.exit_code == 0
    with pytest.raises(UserError, match="does not say"):
        cancel_with(run, no_answer)
    assert "cancelled" not in (run.folder / "pretrain" / "history.jsonl").read_text()


def cancel_with(run: Run, ask: Callable[..., JobState | None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cancel_module, "read_status", lambda folder: read_status(folder, ask=ask))
        cancel(run.folder)


def test_launched_again(run: Run) -> None:
    """Only the last launch counts."""
    run.submit("pretrain", ago=5000)
    run.start("pretrain", ago=4900)
    run.fail("pretrain", ago=4000)
    run.add("pretrain", "gave_up", reason="the same twice", ago=4000)
    run.submit("pretrain", job="200", ago=100)
    stage = run.pretrain(job("PENDING", reason="Priority"))
    assert (stage.state, stage.attempt, stage.job_id) == ("pending", 0, "200")
    assert stage.error is not None
    assert not stage.error.ended


def test_without_the_launcher(run: Run) -> None:
    """torchrun, or a site's own sbatch script."""
    run.start("pretrain")
    run.train("pretrain", 0, 3)
    assert run.pretrain(job("RUNNING")).state == "running"
    assert run.look(no_answer).stages[0].state == "running"
    run.train("pretrain", 3, 4, ago=4000)
    (run.folder / "pretrain" / "history.jsonl").unlink()
    run.add("pretrain", "started", ago=9000, job="h:29500-0", job_id="h:29500-0", host="h", kind="fresh", step=0)
    assert run.pretrain(job("RUNNING")).state == "stopped"


# -- on this machine ---------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def as_launcher(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    return this_process() | {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}


def test_who_is_alive(sleeper: subprocess.Popen[bytes]) -> None:
    row: Row = as_launcher(sleeper)
    assert local_launcher(row) is True
    assert local_launcher(this_process()) is True
    assert local_launcher(row | {"created": row["created"] - 60}) is False  # its number was another's before
    assert local_launcher(row | {"host": "elsewhere"}) is None
    sleeper.kill()
    assert local_launcher(row) is False or psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE
    sleeper.wait()
    assert local_launcher(row) is False


def plan_both(run: Run) -> None:
    launch = run.folder / "launches" / "0001"
    launch.mkdir(parents=True)
    facts = {"stages": ["pretrain", "cooldown"], "commit": "0123456789abcdef", "dirty": True}
    (launch / "source.json").write_text(json.dumps(facts))


def test_a_local_chain(run: Run, sleeper: subprocess.Popen[bytes]) -> None:
    plan_both(run)
    run.submit("pretrain", cluster="local", **as_launcher(sleeper))

    def states() -> list[str]:
        return [stage.state for stage in run.look().stages]

    assert states() == ["starting", "waiting"]
    assert "commit 0123456789 with local changes" in render(run.look())
    run.add("pretrain", "started", job="100", job_id="100", host="x", kind="fresh", step=0)
    assert states() == ["running", "waiting"]
    run.add("pretrain", "interrupted", signal="SIGUSR2", step=3)
    assert states() == ["ending", "waiting"]
    run.add("pretrain", "requeued", reason="SIGUSR2", job_id="101")
    assert states() == ["requeued", "waiting"]
    run.add("pretrain", "started", job="101", job_id="101", host="x", kind="resume", step=3)
    assert states() == ["running", "waiting"]
    sleeper.kill()
    sleeper.wait()
    assert states() == ["stopped", "cancelled"]
    assert run.look().exit_code == 1
    run.fail("pretrain", user_error=True)
    assert states() == ["failed", "cancelled"]
    run.submit("pretrain", cluster="local", host="elsewhere", pid=1, created=0.0)
    run.add("pretrain", "started", job="9", job_id="9", host="elsewhere", kind="fresh", step=0)
    run.train("pretrain", 0, 2)
    assert states() == ["running", "waiting"]
    assert "elsewhere" in run.look().stages[0].detail


def test_cancel_here(run: Run, sleeper: subprocess.Popen[bytes]) -> None:
    said: list[str] = []
    assert cancel(run.folder, say=said.append) == 0
    assert "nothing" in said[0]
    run.submit("pretrain", cluster="local", **as_launcher(sleeper))
    run.add("pretrain", "started", job="100", job_id="100", host="x", kind="fresh", step=0)
    assert cancel(run.folder, say=said.append) == 0
    assert not psutil.pid_exists(sleeper.pid)
    assert said[-1] == "pretrain: ended"
    assert run.pretrain().state == "cancelled"
    assert cancel(run.folder, say=said.append) == 0
    assert "nothing" in said[-1]


def test_cancel_kills_who_does_not_listen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel_module, "PATIENCE_S", 0.5)
    deaf = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN);"
    child = f"{deaf} print(1, flush=True); time.sleep(600)"
    parent = f"{deaf} subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    run.submit("pretrain", cluster="local", **as_launcher(process))
    said: list[str] = []
    cancel(run.folder, say=said.append)
    process.wait(LIMIT_S)
    assert said[-1] == "pretrain: did not end by itself, and was killed"
    assert not psutil.wait_procs(family, timeout=LIMIT_S)[1]


# -- files ---------------------------------------------------------------------------------------------------


def test_a_moved_run(run: Run, tmp_path: Path) -> None:
    run.submit("pretrain")
    run.finish("pretrain")
    run.submit("cooldown", job="101")
    run.start("cooldown", job="101", step=12)
    run.fail("cooldown")
    log = run.folder / "cooldown" / "logs" / "100_1_log.err"
    log.parent.mkdir()
    log.write_text("")
    moved = tmp_path / "else: where"
    run.folder.rename(moved)
    status = read_status(moved, ask=lambda job_id, name: None)
    assert [stage.state for stage in status.stages] == ["done", "failed"]
    assert str(moved / "cooldown" / "logs" / "100_1_log.err") in render(status)
    assert status.run == str(moved)


def test_the_end_of_a_long_file_is_enough(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    (run.folder / "pretrain" / "metrics.jsonl").write_bytes(b"\xff not JSON\n" * 20000)
    run.train("pretrain", 3, 9)
    with open(run.folder / "pretrain" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "sta')
    with open(run.folder / "pretrain" / "history.jsonl", "a") as file:
        file.write('{"time": 1.0, "eve')
    stage = run.pretrain(job("RUNNING"))
    assert (stage.step, stage.loss) == (9, 1 / 9)


def test_lines_are_shown_whole_and_once(tmp_path: Path) -> None:
    said: list[str] = []
    log = GrowingFile(tmp_path / "log")
    show_lines(log, whole_lines=True, stream=said.append)  # there is none yet
    log.path.write_bytes("submitit INFO\nstep é 1\nwarning: x\nstep".encode())
    show_lines(log, whole_lines=True, stream=said.append)
    assert said == ["step é 1", "warning: x"]
    show_lines(log, whole_lines=False, stream=said.append)
    assert said[2:] == ["step"]
    assert log.position == log.path.stat().st_size
    said.clear()
    show_lines(GrowingFile(log.path), whole_lines=False, only="warning: ", stream=said.append)
    assert said == ["warning: x"]


def test_a_line_that_could_not_be_shown_is_shown_later_and_those_before_it_not_again(tmp_path: Path) -> None:
    said: list[str] = []

    def full_at_two(line: str) -> None:
        if line == "two" and len(said) == 1:
            said.append("no space")
            raise OSError(28, "No space left on device")
        said.append(line)

    log = GrowingFile(tmp_path / "log")
    log.path.write_text("one\ntwo\nthree\n")
    with pytest.raises(OSError, match="No space"):
        show_lines(log, whole_lines=True, stream=full_at_two)
    show_lines(log, whole_lines=True, stream=full_at_two)
    assert said == ["one", "no space", "two", "three"]


# -- following -------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGS_EVERY_S", "STATUS_EVERY_S", "SURE_AFTER_S"):
        monkeypatch.setattr(follow_module, name, 0.02)


@pytest.mark.usefixtures("hasty")
def test_follow_to_the_end(run: Run) -> None:
    plan_both(run)
    run.submit("pretrain", cluster="local", **this_process())
    log = run.folder / "pretrain" / "logs" / "100_0_log.out"
    log.parent.mkdir()
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    run.start("pretrain")
    said: list[str] = []

    def go_on(text: str) -> None:
        """The run moves on whenever its follower has said something."""
        said.append(text)
        if text.startswith("pretrain: running"):
            log.write_text(log.read_text() + "step 12\n")
            log.with_suffix(".err").write_text("noise\nwarning: slow\n")
        elif text == "step 12":
            run.finish("pretrain")
        elif text.startswith("cooldown: waiting"):
            run.submit("cooldown", job="101", cluster="local", **this_process())
        elif text.startswith("cooldown: starting"):
            new = run.folder / "cooldown" / "logs" / "101_0_log.out"
            new.parent.mkdir(exist_ok=True)
            new.write_text("submitit INFO\nstep 18\n")
        elif text == "step 18":
            run.finish("cooldown")

    assert follow(run.folder, stream=go_on) == 0
    assert said[:10] == [f"line {number}" for number in range(90, 100)]
    order = ["pretrain: running", "warning: slow", "step 12", "pretrain: done"]
    order += ["cooldown: waiting for pretrain", "cooldown: starting", "step 18", "cooldown: done"]
    assert [text for text in said[10:] if text in order] == order
    assert not any("submitit" in text or "noise" in text for text in said)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("user_error", "code"), [(True, 2), (False, 1)])
def test_follow_a_failure(
    run: Run, user_error: bool, code: int, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    plan_both(run)
    run.submit("pretrain", cluster="local", **as_launcher(sleeper))
    run.start("pretrain")
    run.fail("pretrain", user_error=user_error)
    sleeper.kill()
    sleeper.wait()
    said: list[str] = []
    assert follow(run.folder, stream=said.append) == code
    error = capsys.readouterr().err
    assert error.startswith("error: pretrain: rank 1: ValueError at step 7: a bad; log ")
    assert error.count("\n") == 1
    assert "cooldown: cancelled (because pretrain did not finish)" in said


@pytest.mark.usefixtures("hasty")
def test_leaving_is_not_ending(run: Run) -> None:
    run.submit("pretrain", cluster="local", **this_process())
    said: list[str] = []

    def leave(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    assert follow(run.folder, stream=leave) == 130
    assert "no longer following" in said[-1]
    assert "cancelled" not in (run.folder / "pretrain" / "history.jsonl").read_text()


# -- Slurm's words -----------------------------------------------------------------------------------------------

# Slurm 22.05.8, `scontrol -o show job`, shortened at the end.
LINE = (
    "JobId=28814709 JobName={name} UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A Priority=4 Nice=0 Account=(null) "
    "QOS=(null) JobState=PENDING Reason=Dependency Dependency=afterok:28814708(unfulfilled) Requeue=1 Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=UNLIMITED SubmitTime=2026-11-21T11:01:04 "
    "EligibleTime=Unknown StartTime=Unknown EndTime=Unknown Partition=main ReqNodeList=(null) ExcNodeList=n3 NodeList= "
    "NumNodes=1 CPUs/Task=1 Command=/a b/j.sh JobState=RUNNING WorkDir=/a Comment=Reason=none NodeList=n7 \n"
)


def test_scontrols_line() -> None:
    for name in ("run-pretrain", "a run=x UserId of-pretrain"):
        parsed = _parse_scontrol(LINE.format(name=name), "28814709", name)
        assert parsed is not None
        assert (parsed.state, parsed.reason, parsed.restarts, parsed.nodes) == ("PENDING", "Dependency", 2, "")
        assert (parsed.user, parsed.exit_code, parsed.start_time) == ("ann", "0:0", None)
        assert parsed.submit_time is not None
    assert _parse_scontrol(LINE.format(name="run-pretrain-2"), "28814709", "run-pretrain") is None
    with pytest.raises(SlurmUnavailable):
        _parse_scontrol("what?", "28814709", "run-pretrain")


@pytest.mark.parametrize(
    ("said", "dependency", "reason"),
    [
        ("Dependency", "afterok:28814708(unfulfilled)", "Dependency"),
        # As long as the scheduler has not looked at it.
        ("Resources", "afterok:28814708(unfulfilled)", "Dependency"),
        ("Priority", "afterok:1(unfulfilled),afterok:2(unfulfilled)", "Dependency"),
        ("None", "afterok:28814708(unfulfilled)", "Dependency"),
        ("Resources", "(null)", "Resources"),
        ("JobHeldUser", "afterok:28814708(unfulfilled)", "JobHeldUser"),
        ("DependencyNeverSatisfied", "afterok:28814708(failed)", "DependencyNeverSatisfied"),
    ],
)
def test_why_a_job_waits(said: str, dependency: str, reason: str) -> None:
    line = LINE.format(name="a").replace("Reason=Dependency", f"Reason={said}", 1)
    line = line.replace("Dependency=afterok:28814708(unfulfilled)", f"Dependency={dependency}", 1)
    parsed = _parse_scontrol(line, "28814709", "a")
    assert parsed is not None
    assert parsed.reason == reason


def test_which_jobs_are_alive() -> None:
    assert is_alive(job("COMPLETING"))
    assert not is_alive(job("TIMEOUT"))


def test_no_command_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailable, match="no command scontrol"):
        slurm_job("1", name="x")
