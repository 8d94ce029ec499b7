"""Slurm's words about jobs, as values."""

from pathlib import Path

import pytest

from tests.monitor.run_by_hand import job
from vjepa_scale.monitor.jobs import (
    SlurmUnavailable,
    _parse_scontrol,
    is_alive,
    slurm_job,
)

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
