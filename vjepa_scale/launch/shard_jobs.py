"""``make_shards --cluster slurm``: the steps of data/ingest as Slurm jobs, and a terminal that follows them.

    probe  an array of N  ->  plan  one job  ->  write  an array of N  ->  finish  one job      (afterok)

    OUT/.slurm/     until the data set is finished
        jobs.json   step -> the job, or the array, that was submitted for it last
        logs/       JOB_0_log.err, of an array's task JOB_TASK_0_log.err; the batch scripts
        code/       what the jobs import (snapshot.py)

Who follows changes nothing. What the jobs have done lies in OUT/.work, so any end of theirs is followed by submitting
all four again: what is done is found done.
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
    """What is asked of the cluster. profile: as load_profile; cpus: of each job, and its worker processes."""

    jobs: int
    profile: str | None
    cpus: int
    timeout_min: int


def scripts(out: Path, asked: Asked) -> dict[str, str]:
    """Step -> its batch script, as it would be submitted. A job id that is not known yet is named after its step."""
    folder = _folder(out)
    texts = {}
    after = None
    for step in STEPS:
        texts[step] = _executor(out, asked, step, code=code_folder(folder), after=after).script(_tasks(step, asked))
        after = f"JOB_ID_OF_{step.upper()}"
    return texts


def make_shards_on_slurm(videos: Path, out: Path, settings: Settings, asked: Asked, *, progress: Progress) -> Summary:
    """Make the data set on the cluster, or finish it, or find it finished; stays until then.

    Where jobs of OUT are in the queue already, they are followed. Raises UserError where Slurm or ``begin`` refuses,
    arrays_follow.JobFailedError where a job failed; after KeyboardInterrupt the jobs run on.
    """
    need_sbatch(where=f"{program('make_shards')} --cluster slurm", otherwise="leave --cluster out")
    script = scripts(out, asked)["probe"]
    if not _at_work(out) and (said := objection(script)):  # before the sources are listed, which may take long
        raise _refused("probe", said, asked)
    work = begin(videos, out, settings, relist=not _at_work(out))
    if work is None:
        _tidy(out)
        return summarize(out, existed=True)
    jobs = _attach_or_submit(work, asked)
    follow(work, jobs, _folder(out) / "logs", progress=progress)
    _tidy(out)
    return summarize(out)


def _attach_or_submit(work: Work, asked: Asked) -> dict[str, Job]:
    """The jobs that now make the data set, whoever has submitted them."""
    out, folder = work.out, _folder(work.out)
    with _alone(folder):
        if alive := _at_work(out):
            jobs = _submitted(folder)
            strangers = set(alive) - {job.job_id for job in jobs.values()}
            if strangers or jobs.keys() != set(STEPS):
                raise UserError(
                    f"Slurm jobs {' '.join(alive)} of this folder are in the queue, but their submission was cut off",
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
    with undisturbed():  # else some could be in the queue that nobody follows
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
    """The job, or an array's first."""
    parts = [Part(index, _tasks(step, asked)) for index in range(_tasks(step, asked))]
    # Jobs start in another folder; and the sources may have been moved since the work was begun.
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
        doing="make much",
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


def _at_work(out: Path) -> list[str]:
    """Ids of the jobs of OUT that are in the queue; raises UserError where Slurm does not say."""
    folder = _folder(out)
    if not folder.is_dir():
        return []
    try:
        return jobs_of(folder, also={job.job_id for job in _submitted(folder).values()})
    except SlurmUnavailable as error:
        raise UserError(f"Slurm does not say whether jobs are at work: {error}", where=out, fix="try later") from None


def _named(jobs: dict[str, Job]) -> str:
    return ", ".join(f"{job.step} {job.job_id}" for job in jobs.values())


def _tidy(out: Path) -> None:
    """What remains is what a run without Slurm leaves, unless the last job is still about to end."""
    with suppress(UserError):  # Slurm does not answer: the same command does it another time
        if _folder(out).is_dir() and not _at_work(out):
            shutil.rmtree(_folder(out), ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process submits for the same OUT."""
    folder.mkdir(exist_ok=True)
    with file_lock(folder / "lock", patience_s=math.inf):
        yield
