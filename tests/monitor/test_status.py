"""What is told about a run, from histories and metrics written by hand: every state, without Slurm.

What Slurm says is given as JobState values, which tests/slurm compares with a real cluster's.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain import ROOT
from tests.monitor.run_by_hand import Run, job, no_answer
from tests.processes import LIMIT_S
from vjepa_scale.core.errors import UserError
from vjepa_scale.monitor import cancel as cancel_module
from vjepa_scale.monitor.cancel import cancel
from vjepa_scale.monitor.follow import follow
from vjepa_scale.monitor.jobs import (
    JobState,
)
from vjepa_scale.monitor.status import read_status, render


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
    assert run.pretrain(job("RUNNING", start_time=run.now - 950)).state == "starting"
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
    assert status.stages[0].late
    assert "last step 50 min ago (its steps took 2 s)" in render(status)
    assert status.stages[0].clips_per_s is None  # a rate of long ago is none
    assert status.stages[0].eta_s is None


@pytest.mark.parametrize(("ago", "late"), [(20, False), (62, True)])
def test_a_rate_is_shown_until_a_step_is_late(run: Run, ago: float, late: bool) -> None:
    run.submit("pretrain", ago=9000)
    run.start("pretrain", ago=9000)
    run.train("pretrain", 0, 3, ago=ago)
    status = run.look(job("RUNNING"))
    assert status.stages[0].late == late
    assert (status.stages[0].clips_per_s is None) == late
    assert ("(its steps took" in render(status)) == late


def test_a_start_without_a_step_is_told(run: Run) -> None:
    run.submit("pretrain", ago=900)
    run.start("pretrain", ago=720)
    assert "no step yet, 12 min after its start" in render(run.look(job("RUNNING")))


def test_requeued_and_started_again(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.save("pretrain", 7)
    run.add("pretrain", "interrupted", signal="SIGUSR2", step=7)
    assert run.pretrain(job("RUNNING")).state == "ending"
    assert run.pretrain(job("COMPLETING")).state == "ending"
    stage = run.pretrain(job("PENDING", reason="BeginTime", restarts=1))
    assert (stage.state, stage.detail) == ("requeued", "SIGUSR2, saved at step 7; BeginTime")
    assert run.pretrain(job("RUNNING", restarts=1, start_time=run.now)).state == "starting"
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
    assert (stage.state, stage.detail) == ("requeued", "ended without an error message; Resources")
    stage = run.pretrain(job("RUNNING", restarts=1))
    assert (stage.state, stage.attempt) == ("starting", 2)
    assert run.look(job("RUNNING", restarts=1)).exit_code == 0
    run.start("pretrain", restart=1, ago=50)
    assert run.pretrain(job("RUNNING", restarts=1)).state == "running"
    # Over for good: nobody requeued it.
    status = run.look(job("NODE_FAIL", restarts=1))
    assert status.stages[0].state == "stopped"
    assert "NODE_FAIL" in status.stages[0].detail
    assert "the same command goes on" in render(status)
    assert status.exit_code == 1
    status = run.look(None)
    assert status.stages[0].detail == "ended without an error message after step 6 (Slurm no longer knows its job)"
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


def test_a_failure_under_torchrun(run: Run) -> None:
    """Nobody writes the end of the attempt into the history; the report of a rank is what there is."""
    job_id = "h:29500-0"
    run.add("pretrain", "started", ago=900, job=job_id, job_id=job_id, host="h", kind="fresh", step=0)
    run.train("pretrain", 0, 3)
    reports = run.folder / "pretrain" / "failures"
    reports.mkdir()
    told = {"rank": 1, "step": 3, "kind": "Killed", "message": "rank 1 (node h, pid 5) ended by SIGKILL"}
    rest = {"user_error": False, "bystander": False, "log": None}
    (reports / f"{job_id}.1.supervisor.json").write_text(json.dumps({**told, **rest}))
    status = run.look(None)
    assert status.stages[0].state == "failed"
    assert "error: Killed at step 3: rank 1 (node h, pid 5) ended by SIGKILL" in render(status)


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
