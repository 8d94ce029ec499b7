"""Queries what runs a stage: Slurm about a job, this machine about a launcher.

"Slurm does not know this job" and "Slurm does not answer" are never mixed: the first is None, the second is
SlurmUnavailable. What a job did is in the run folder in any case (history.jsonl).
"""

import os
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 20.0
# Boot time, and with it every process's creation time, moves a little when the clock is set.
SAME_PROCESS_S = 2.0

# Slurm's states of a job that waits (again), and of one that has nodes.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
PREPARING = ("CONFIGURING", "POWER_UP_NODE")
HALTED = ("SUSPENDED", "STOPPED")
ENDING = ("COMPLETING", "STAGE_OUT")
# Reasons of a job that is next or nearly so. A dependent job may have one too until the scheduler has considered it.
_NEXT = ("", "Resources", "Priority")
_ALIVE = frozenset((*WAITING, *PREPARING, *HALTED, *ENDING, "RUNNING", "RESIZING", "SIGNALING"))


class SlurmUnavailable(Exception):
    """Slurm gave no answer: its commands are missing, its controller is down or too slow."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says about one job.

    state:       PENDING, RUNNING, COMPLETED, FAILED, CANCELLED …
    reason:      why it waits, or why it ended, in Slurm's words; empty if there is none
    restarts:    how often it was queued again; None where the answer is accounting's, which does not say
    submit_time: seconds since 1970; a requeue renews it
    start_time:  of the present start, or, while it waits, when Slurm expects it (None: not known)
    source:      scontrol, or sacct for a job that only accounting still knows
    """

    job_id: str
    name: str
    state: str
    reason: str = ""
    restarts: int | None = None
    nodes: str = ""
    exit_code: str = ""
    user: str = ""
    submit_time: float | None = None
    start_time: float | None = None
    source: str = "scontrol"


def is_alive(job: JobState) -> bool:
    """Will Slurm still start it, run it or clean up after it?"""
    return job.state in _ALIVE


def slurm_job(job_id: str, *, name: str | None = None) -> JobState | None:
    """What Slurm says about a job; None where neither Slurm nor its accounting knows it.

    name: the job's name. A job of another name is another job: ids begin anew with a fresh cluster.
    Raises SlurmUnavailable where there is no answer.
    """
    asked = run_slurm(["scontrol", "-o", "show", "job", job_id])
    if asked.returncode == 0:
        job = _parse_scontrol(asked.stdout, job_id, name)
        return job if job is not None else _accounted(job_id, name)
    if "invalid job id" not in asked.stderr.lower():
        raise SlurmUnavailable(_said(asked))
    return _accounted(job_id, name)


def run_slurm(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises SlurmUnavailable where there is no such command, or no answer in time."""
    # Slurm would otherwise use the user's time format.
    env = {**os.environ, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C.UTF-8"}
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S, env=env, check=False
        )
    except FileNotFoundError:
        raise SlurmUnavailable(f"no command {command[0]} here") from None
    except OSError as error:
        raise SlurmUnavailable(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"{command[0]} gave no answer within {TIMEOUT_S:g} s") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"{done.args[0]} ended with {done.returncode}"


def _parse_scontrol(text: str, job_id: str, name: str | None) -> JobState | None:
    """One line of ``scontrol -o show job``; None for a job of another name.

    Values may hold spaces and ``=``. What we want stands before the job's free texts (command, folder,
    comment), all but the name, which is compared as a whole.
    """
    line = text.strip("\n").split("\n")[0]
    named = re.match(r"JobId=(\S+) (?:Array\w+=\S+ |HetJob\w+=\S+ )*JobName=", line)
    if named is None:
        raise SlurmUnavailable(f"an answer of scontrol that is not understood: {line[:80]!r}")
    rest = line[named.end() :]
    found = name if name is not None else rest.partition(" UserId=")[0]
    if not rest.startswith(f"{found} UserId="):
        return None
    rest = rest[len(found) :]

    def value(key: str) -> str:
        match = re.search(rf" {key}=(.*?)(?= [A-Z][\w/:&]*=|$)", rest)
        return "" if match is None or match[1] in ("(null)", "None", "N/A", "Unknown") else match[1].strip()

    restarts, reason = value("Restarts"), value("Reason")
    if reason in _NEXT and "(unfulfilled)" in value("Dependency"):
        reason = "Dependency"
    return JobState(
        job_id=job_id,
        name=found,
        state=value("JobState"),
        reason=reason,
        restarts=int(restarts) if restarts.isdigit() else None,
        nodes=value("NodeList"),
        exit_code=value("ExitCode"),
        user=value("UserId").partition("(")[0],
        submit_time=_seconds(value("SubmitTime")),
        start_time=_seconds(value("StartTime")),
    )


def _accounted(job_id: str, name: str | None) -> JobState | None:
    """What accounting has of a job that Slurm has forgotten; None if accounting is off, down or has nothing."""
    columns = "JobIDRaw,State,NodeList,ExitCode,User,Submit,Start,JobName"  # the name last: it may hold the separator
    try:
        asked = run_slurm(["sacct", "-X", "--noheader", "--parsable2", "-o", columns, "-j", job_id])
    except SlurmUnavailable:
        return None
    for line in asked.stdout.splitlines() if asked.returncode == 0 else ():
        parts = line.split("|", 7)
        if len(parts) == 8 and parts[0] == job_id and (name is None or parts[7] == name):
            state, _, by = parts[1].partition(" ")  # CANCELLED by 1000
            job = JobState(
                job_id=job_id,
                name=parts[7],
                state=state,
                reason=by,
                nodes="" if parts[2] == "None assigned" else parts[2],
                exit_code=parts[3],
                user=parts[4],
                submit_time=_seconds(parts[5]),
                start_time=_seconds(parts[6]),
                source="sacct",
            )
            # Only the controller can know a job to be alive; accounting keeps those that a lost controller had.
            return None if is_alive(job) else job
    return None


def _seconds(text: str) -> float | None:
    """Slurm's local time as seconds since 1970."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


# -- this machine ----------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """What a ``submitted`` row keeps of the launcher, so that local_launcher finds exactly this process again."""
    return process_facts(os.getpid())


def process_facts(pid: int) -> dict[str, Any]:
    """Returns what tells a process of this machine from all others, before and after it."""
    created = psutil.Process(pid).create_time()
    return {"host": socket.gethostname(), "pid": pid, "created": created, **_since_boot(pid)}


def _since_boot(pid: int) -> dict[str, Any]:
    """The boot, and the clock ticks from it to the process's start; empty where the system has no /proc.

    Unlike the time of creation, they do not change when the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return {}
    return {"boot": boot, "started_ticks": int(stat.rpartition(")")[2].split()[19])}


def local_launcher(row: dict[str, Any]) -> bool | None:
    """Is the launcher of a ``submitted`` row alive? None where it is, or was, on another machine."""
    if row.get("host") != socket.gethostname():
        return None
    return launcher_process(row) is not None


def launcher_process(row: dict[str, Any]) -> psutil.Process | None:
    """The launcher of a ``submitted`` row of this machine, if it lives. Another process of its number is not it."""
    if row.get("host") != socket.gethostname() or not isinstance(row.get("pid"), int):
        return None
    process = _process(row["pid"])
    if process is None:
        return None
    now = _since_boot(row["pid"])
    if now and "started_ticks" in row:
        same = all(row.get(key) == value for key, value in now.items())
    else:  # of an earlier version
        same = abs(process.create_time() - float(row.get("created") or 0)) <= SAME_PROCESS_S
    return process if same else None


def rank_starter(started: dict[str, Any]) -> psutil.Process | None:
    """submitit's process above the local ranks of a ``started`` row, if it lives: it may outlive the launcher."""
    job_id = str(started.get("job_id", ""))
    if started.get("host") != socket.gethostname() or not job_id.isdigit() or started.get("job") != job_id:
        return None
    process = _process(int(job_id))
    if process is None or process.create_time() > started["time"] + SAME_PROCESS_S:
        return None
    try:
        return process if any("submitit" in word for word in process.cmdline()) else None
    except psutil.Error:
        return None


def _process(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        process.create_time()
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.Error:
        return None
