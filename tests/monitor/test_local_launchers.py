"""What is told about runs on this machine, whose launchers are real processes; and cancelling them."""

import subprocess
import sys

import psutil
import pytest

from tests.monitor.run_by_hand import Run, as_launcher, plan_both
from tests.processes import LIMIT_S
from vjepa_scale.monitor import cancel as cancel_module
from vjepa_scale.monitor.cancel import cancel
from vjepa_scale.monitor.jobs import (
    local_launcher,
    this_process,
)
from vjepa_scale.monitor.status import render
from vjepa_scale.run.events import Row


def test_who_is_alive(sleeper: subprocess.Popen[bytes]) -> None:
    row: Row = as_launcher(sleeper)
    assert local_launcher(row) is True
    assert local_launcher(this_process()) is True
    assert (
        local_launcher(row | {"started_ticks": row["started_ticks"] - 60}) is False
    )  # its number was another's before
    assert local_launcher(row | {"host": "elsewhere"}) is None
    sleeper.kill()
    assert local_launcher(row) is False or psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE
    sleeper.wait()
    assert local_launcher(row) is False


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
    assert said[-1] == "pretrain: did not end in time, and was killed"
    assert not psutil.wait_procs(family, timeout=LIMIT_S)[1]
