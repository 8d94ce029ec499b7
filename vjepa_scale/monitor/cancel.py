"""Cancel a run. Its checkpoints stay, and the same launch resumes from them."""

import getpass
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.worker_pool import end_processes, process_tree
from vjepa_scale.monitor import jobs
from vjepa_scale.monitor.jobs import JobState, SlurmUnavailable
from vjepa_scale.monitor.states import StageStatus
from vjepa_scale.monitor.status import read_status, run_recipe
from vjepa_scale.recipe import Stage, stages_of
from vjepa_scale.run.events import History, Row

# For the ranks to finish their step and save, and for Slurm to clear up after them.
PATIENCE_S = 60.0
LOOK_EVERY_S = 1.0

Say = Callable[[str], Any]


def cancel(run_folder: Path, *, say: Say = print) -> int:
    """End every job of a run, and report it. Returns 0, also if there was nothing to end.

    Writes ``cancelled`` into the histories before it ends anything, so that no job requeues itself.
    Raises UserError, with nothing marked or ended, if Slurm does not answer, or a job is another user's or on
    another machine.
    """
    stages, status = stages_of(run_recipe(run_folder)), read_status(run_folder)
    if status.problem is not None:
        raise UserError(
            f"Slurm does not say what is running: {status.problem}", where=run_folder, fix="try again when it answers"
        )
    in_slurm = [(stage, stage.slurm) for stage in status.stages if stage.slurm and jobs.is_alive(stage.slurm)]
    here = _local_processes(stages, status.stages)
    for _, job in in_slurm:
        _refuse_others(job)
    if not in_slurm and not here:
        say(f"nothing of {run_folder} is waiting or running")
        return 0
    for stage, _ in in_slurm:
        History(stages[stage.name].folder).add("cancelled")
    done = [stage.name for stage in status.stages if stage.state == "done"]
    for name in here.keys() - done:
        History(stages[name].folder).add("cancelled")
    for stage, job in reversed(in_slurm):  # dependants first: they would start, or be refused, otherwise
        _cancel_job(stage, job)
        was = f"{job.state.lower()} on {job.nodes}" if job.nodes else job.state.lower()
        say(f"{stage.name}: Slurm job {job.job_id} cancelled (it was {was})")
    for stage, job in in_slurm:
        _wait_for_the_end(stage, job, say)
    for name, process in here.items():
        _end_tree(name, process, say)
    for stage in read_status(run_folder).stages:
        trained = stage.name in here or any(other.name == stage.name and job.nodes for other, job in in_slurm)
        if trained and stage.checkpoint is not None:
            say(f"{stage.name}: its last checkpoint is {stage.checkpoint}")
    return 0


# -- Slurm -------------------------------------------------------------------------------------------


def _refuse_others(job: JobState) -> None:
    if os.geteuid() != 0 and job.user and job.user != getpass.getuser():
        raise UserError(f"Slurm job {job.job_id} is {job.user}'s", where=job.name, fix=f"ask {job.user} to cancel it")


def _cancel_job(stage: StageStatus, job: JobState) -> None:
    try:
        done = jobs.run_slurm(["scancel", job.job_id])
        problem = " ".join(done.stderr.split()) if done.returncode else None
    except SlurmUnavailable as error:
        problem = str(error)
    if problem is not None:
        raise UserError(
            f"{stage.name} is marked as cancelled, but Slurm did not end job {job.job_id}: {problem}",
            where="scancel",
            fix="run cancel again",
        )


def _wait_for_the_end(stage: StageStatus, job: JobState, say: Say) -> None:
    """Wait until Slurm has ended a job. A job that requeued itself in the meantime is cancelled again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            now = jobs.slurm_job(job.job_id, name=job.name)
        except SlurmUnavailable:  # it has the order
            return
        if now is None or not jobs.is_alive(now):
            return
        if now.state in jobs.WAITING or (now.restarts or 0) > (job.restarts or 0):
            _cancel_job(stage, now)
        if time.monotonic() > deadline:
            say(f"{stage.name}: Slurm job {job.job_id} is still {now.state.lower()}: check again with status")
            return
        time.sleep(LOOK_EVERY_S)


# -- this machine ------------------------------------------------------------------------------------


def _local_processes(stages: Mapping[str, Stage], statuses: list[StageStatus]) -> dict[str, psutil.Process]:
    """Stage → the process to end: its launcher, or, if that is gone, the parent of its ranks."""
    found: dict[str, psutil.Process] = {}
    for stage in statuses:
        rows = History(stages[stage.name].folder).since_submission()
        if not rows or rows[0]["event"] != "submitted" or rows[0]["cluster"] != "local":
            continue
        process = jobs.launcher_process(rows[0]) or _above_the_ranks(rows)
        if process is not None:
            found = {stage.name: process}  # one launcher at a time, which is at the later stage
        elif jobs.local_launcher(rows[0]) is None and stage.state == "running" and not stage.still:
            raise UserError(
                f"{stage.name!r} was launched on {rows[0].get('host')}, and its files still grow",
                where=stages[stage.name].recipe.run.dir,
                fix="run cancel there",
            )
    return found


def _above_the_ranks(rows: list[Row]) -> psutil.Process | None:
    started = [row for row in rows if row["event"] == "started"]
    return jobs.rank_starter(started[-1]) if started else None


def _end_tree(name: str, process: psutil.Process, say: Say) -> None:
    family = process_tree(process)
    if not family:
        say(f"{name}: process {process.pid} had just ended")
        return
    say(f"{name}: process {process.pid} gets a signal to save and end within {PATIENCE_S:.0f} s")
    quiet = end_processes(family, patience_s=PATIENCE_S)
    say(f"{name}: ended" if quiet else f"{name}: did not end in time, and was killed")
