"""``make_shards --cluster slurm``: submits the steps of vjepa_scale/shards as Slurm jobs and follows them.

    probe  an array of N  ->  plan  one job  ->  write  an array of N  ->  finish  one job      (afterok)

    OUT/.slurm/     until the data set is finished
        jobs.json   step -> the job, or the array, that was submitted for it last
        logs/       JOB_0_log.err, of an array's task JOB_TASK_0_log.err; the batch scripts
        code/       what the jobs import (snapshot.py)

Following changes nothing. The jobs' progress is in OUT/.work. After any failure all four jobs are submitted again, and
skip finished work.
"""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import file_lock, read_json, write_json
from vjepa_scale.core.installed import program
from vjepa_scale.launch.follow_shard_jobs import Job, follow
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.launch.sbatch import (
    SEE_SLURM,
    ScriptExecutor,
    epilogue,
    job_executor,
    jobs_of,
    need_sbatch,
    objection,
    refuse_short,
    said_by_sbatch,
    undisturbed,
    without_gpus,
)
from vjepa_scale.launch.shard_worker import STEPS, run_share
from vjepa_scale.launch.snapshot import code_folder, snapshot_code
from vjepa_scale.monitor.jobs import SlurmUnavailable, run_slurm
from vjepa_scale.shards.make import Summary, summarize
from vjepa_scale.shards.work import JOBS, Part, Progress, Settings, Work, begin

_ARRAYS = ("probe", "write")


@dataclass(frozen=True)
class Asked:
    """The resources to request. profile: as for load_profile; cpus: CPUs and worker processes of each job"""

    jobs: int
    profile: str | None
    cpus: int
    timeout_min: int


def scripts(out: Path, asked: Asked) -> dict[str, str]:
    """Returns step -> its batch script, as it would be submitted. Unknown job ids are named after their step."""
    folder = _folder(out)
    texts = {}
    after = None
    for step in STEPS:
        texts[step] = _executor(out, asked, step, code=code_folder(folder), after=after).script(_tasks(step, asked))
        after = f"JOB_ID_OF_{step.upper()}"
    return texts


def make_shards_on_slurm(videos: Path, out: Path, settings: Settings, asked: Asked, *, progress: Progress) -> Summary:
    """Makes or completes the data set on the cluster. Returns when it is finished.

    If jobs of OUT are in the queue already, follows these. Raises UserError if Slurm or ``begin`` refuses,
    follow_shard_jobs.JobFailedError if a job failed. After KeyboardInterrupt the jobs continue.
    """
    need_sbatch(where=f"{program('make_shards')} --cluster slurm", otherwise="leave --cluster out")
    script = scripts(out, asked)["probe"]
    if not _queued_jobs(out) and (said := objection(script)):  # before listing the sources, which may take long
        raise _refused("probe", said, asked)
    work = begin(videos, out, settings, relist=not _queued_jobs(out))
    if work is None:
        _tidy(out)
        return summarize(out, existed=True)
    jobs = _attach_or_submit(work, asked)
    follow(work, jobs, _folder(out) / "logs", progress=progress)
    _tidy(out)
    return summarize(out)


def _attach_or_submit(work: Work, asked: Asked) -> dict[str, Job]:
    """Returns the jobs that make the data set: those in the queue, or newly submitted ones."""
    out, folder = work.out, _folder(work.out)
    with _submission_lock(folder):
        if alive := _queued_jobs(out):
            jobs = _submitted(folder)
            unknown = set(alive) - {job.job_id for job in jobs.values()}
            if unknown or jobs.keys() != set(STEPS):
                raise UserError(
                    f"Slurm jobs {' '.join(alive)} of this folder are in the queue, but not all were submitted",
                    where=out,
                    fix=f"scancel {' '.join(alive)}, and the same command goes on",
                )
            print(f"jobs of {out} are in the queue already: {_named(jobs)}", flush=True)
        else:
            jobs = _submit(work, asked)
    print(f"logs in {folder / 'logs'}", flush=True)
    return jobs


def _submit(work: Work, asked: Asked) -> dict[str, Job]:
    folder = _folder(work.out)
    code = snapshot_code(folder)
    jobs: dict[str, Job] = {}
    handles: list[submitit.Job] = []
    with undisturbed():  # otherwise unrecorded jobs could be in the queue
        for step in STEPS:
            after = handles[-1].job_id.partition("_")[0] if handles else None
            tasks = _tasks(step, asked)
            executor = _executor(work.out, asked, step, code=code, after=after)
            try:
                handles.append(_submit_step(executor, work, step, asked))
            except FailedJobError as error:
                for earlier in reversed(handles):
                    run_slurm(["scancel", earlier.job_id.partition("_")[0]])
                (folder / "jobs.json").unlink(missing_ok=True)
                raise _refused(step, said_by_sbatch(str(error)), asked) from None
            jobs[step] = Job(step, handles[-1].job_id.partition("_")[0], tasks)
            write_json(folder / "jobs.json", {name: asdict(job) for name, job in jobs.items()})
            print(f"{step}: Slurm {jobs[step]}" + (f" after {after}" if after else ""), flush=True)
    return jobs


def _submit_step(executor: ScriptExecutor, work: Work, step: str, asked: Asked) -> submitit.Job:
    """Submits a step. Returns its job, or the first of its array."""
    parts = [Part(index, _tasks(step, asked)) for index in range(_tasks(step, asked))]
    # Jobs start in another folder, and the sources may have been moved since the work began.
    seen = replace(work, out=work.out.absolute(), videos=work.videos.absolute(), root=work.root.absolute())
    share = partial(run_share, seen, step, workers=asked.cpus, timeout_min=asked.timeout_min)
    jobs: list[submitit.Job] = executor.map_array(share, parts)
    return jobs[0]


def _executor(out: Path, asked: Asked, step: str, *, code: Path, after: str | None) -> ScriptExecutor:
    profile = without_gpus(load_profile(asked.profile))
    refuse_short(
        asked.timeout_min,
        profile,
        named=asked.profile or "(its default)",
        doing="do any work",
        where=f"{program('make_shards')} --timeout-min",
    )
    early = '[ "$1" -ne 140 ] && [ "$1" -ne 143 ] || set -- 75  # USR2 or TERM before Python could listen'
    executor = job_executor(
        profile,
        logs=_folder(out) / "logs",
        code=code,
        finish=[early, epilogue(code, "false")],
        name=f"{out.absolute().name}-{step}",
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=asked.cpus,
        timeout_min=asked.timeout_min,
        needs_gpus=False,
        after=after,
    )
    executor.update_parameters(array_parallelism=_tasks(step, asked))
    return executor


def _tasks(step: str, asked: Asked) -> int:
    return asked.jobs if step in _ARRAYS else 1


def _refused(step: str, said: str, asked: Asked) -> UserError:
    where = f"{program('make_shards')} " + (
        "--cluster slurm" if asked.profile is None else f"--profile {asked.profile}"
    )
    fix = SEE_SLURM
    if "array" in said:
        where, limit = f"{program('make_shards')} --jobs", _max_array_size()
        fix = f"MaxArraySize here is {limit}: at most --jobs {limit}" if limit else "fewer"
    return UserError(f"Slurm refused the job of {step!r}: {said}", where=where, fix=fix)


def _max_array_size() -> int | None:
    with suppress(SlurmUnavailable):
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_slurm(["scontrol", "show", "config"]).stdout, re.MULTILINE)
        return int(found[1]) if found else None
    return None


# -- OUT/.slurm ------------------------------------------------------------------------------------


def _folder(out: Path) -> Path:
    return out.absolute() / JOBS


def _submitted(folder: Path) -> dict[str, Job]:
    if not (folder / "jobs.json").exists():
        return {}
    try:
        return {step: Job(**row) for step, row in read_json(folder / "jobs.json").items()}
    except (AttributeError, TypeError):
        raise UserError("not the jobs of make_shards", where=folder / "jobs.json", fix="remove it") from None


def _queued_jobs(out: Path) -> list[str]:
    """Returns ids of the jobs of OUT that are in the queue. Raises UserError if Slurm does not answer."""
    folder = _folder(out)
    if not folder.is_dir():
        return []
    try:
        return jobs_of(folder, also={job.job_id for job in _submitted(folder).values()})
    except SlurmUnavailable as error:
        raise UserError(f"Slurm does not say whether jobs are queued: {error}", where=out, fix="try later") from None


def _named(jobs: dict[str, Job]) -> str:
    return ", ".join(f"{job.step} {job.job_id}" for job in jobs.values())


def _tidy(out: Path) -> None:
    """Removes OUT/.slurm, unless the last job is still ending."""
    with suppress(UserError):  # Slurm does not answer: a later call removes it
        if _folder(out).is_dir() and not _queued_jobs(out):
            shutil.rmtree(_folder(out), ignore_errors=True)


@contextmanager
def _submission_lock(folder: Path) -> Iterator[None]:
    """Waits until no other process submits jobs for the same OUT."""
    folder.mkdir(exist_ok=True)
    with file_lock(folder / "lock", patience_s=math.inf):
        yield
