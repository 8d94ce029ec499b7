"""The chain of stages on Slurm: one submitit job per stage, each waiting for the one before (afterok).

srun starts one process per rank; the epilogue queues the job again if another attempt follows.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import keep_reserve, write_atomic
from vjepa_scale.launch.evaluation_job import evaluation_script, script_name
from vjepa_scale.launch.profile import Profile, load_profile, placeholders, profile_file
from vjepa_scale.launch.record import Launch
from vjepa_scale.launch.sbatch import (
    ScriptExecutor,
    epilogue,
    fix_of,
    job_executor,
    jobs_of,
    need_sbatch,
    objection,
    python_command,
    refuse_pattern,
    refuse_short,
    requested_gpus,
    said_by_sbatch,
    srun_arguments,
    undisturbed,
)
from vjepa_scale.launch.worker import run_launched
from vjepa_scale.monitor.jobs import SlurmUnavailable
from vjepa_scale.recipe import Recipe, Stage
from vjepa_scale.run.events import History


def submit_chain(stages: Sequence[Stage], launch: Launch) -> None:
    """Submits the stages' jobs and writes them into the stages' histories.

    If Slurm refuses one, cancels those submitted before it and raises UserError.
    """
    need_sbatch(where="launch.cluster", otherwise="--cluster local")
    before: submitit.Job | None = None
    submitted: list[tuple[submitit.Job, History]] = []
    for stage in stages:
        executor = stage_executor(stage, launch, after=before.job_id if before else None)
        write_atomic(launch.folder / f"{stage.name}.sbatch", executor.script())
        if (evaluation := evaluation_script(stage, launch)) is not None:
            write_atomic(launch.folder / f"{script_name(stage)}.sbatch", evaluation)
        name = executor.parameters["job_name"]
        _refuse_unrecorded_job(stage.recipe, name)
        stage.folder.mkdir(parents=True, exist_ok=True)
        keep_reserve(stage.folder)
        try:
            with undisturbed():  # the next launch would submit an unrecorded job a second time
                job = executor.submit(run_launched, launch.recipe, stage.name)
                history = History(stage.folder)
                history.add("submitted", cluster="slurm", job_id=job.job_id, name=name, launch=str(launch.folder))
        except FailedJobError as error:
            for earlier, history in reversed(submitted):
                history.add("cancelled")
                earlier.cancel()
            if not submitted:
                launch.withdraw()
            said = said_by_sbatch(str(error))
            raise UserError(
                f"Slurm refused the job of {stage.name!r}: {said}",
                where=_key_of_slurm(stage.recipe),
                fix=fix_of(said),
            ) from None
        submitted.append((job, history))
        waits = f" after {before.job_id}" if before else ""
        print(f"{stage.name}: Slurm job {job.job_id}{waits}, logs in {executor.folder}/{job.job_id}_*", flush=True)
        before = job


def _refuse_unrecorded_job(recipe: Recipe, name: str) -> None:
    """Raises UserError if Slurm has a job of this run that no history records: sbatch's output may have been lost."""
    run = Path(recipe.run.dir).absolute()
    try:
        found = jobs_of(run, name=name)
    except SlurmUnavailable:  # sbatch fails too then, with the reason
        return
    for job_id in found:
        raise UserError(f"Slurm job {job_id} is this stage's already", where=run, fix=f"scancel {job_id}, or wait")


def scripts(stages: Sequence[Stage], launch: Launch) -> dict[str, str]:
    """Returns name → batch script, of each stage and of its evaluations, as it would be submitted.

    Unknown job ids are named after their stage.
    """
    texts = {}
    for before, stage in zip([None, *stages], stages, strict=False):
        after = f"JOB_ID_OF_{before.name.upper()}" if before else None
        texts[stage.name] = stage_executor(stage, launch, after=after).script()
        if (evaluation := evaluation_script(stage, launch)) is not None:
            texts[script_name(stage)] = evaluation
    return texts


def stage_executor(stage: Stage, launch: Launch, *, after: str | None) -> ScriptExecutor:
    """Returns the executor of one stage's job. after: the job that must succeed before it"""
    run = Path(stage.recipe.run.dir).absolute()
    profile, cfg = load_profile(stage.launch.profile), stage.launch
    refuse_pattern(run)
    refuse_short(
        cfg.timeout_min, profile, named=cfg.profile or "(its default)", doing="train", where="launch.timeout_min"
    )
    return job_executor(
        profile,
        logs=stage.logs.absolute(),
        code=launch.code,
        finish=[_finish(stage.name, launch, profile)],
        name=f"{run.name}-{stage.name}",
        nodes=cfg.nodes,
        tasks_per_node=cfg.tasks_per_node,
        cpus_per_task=cfg.cpus_per_task,
        timeout_min=cfg.timeout_min,
        needs_gpus=stage.recipe.engine.device != "cpu",
        after=after,
        srun_args=[_END_PEERS],
    )


_END_PEERS = "--kill-on-bad-exit=1"  # otherwise ranks wait for a dead peer


def _finish(stage_name: str, launch: Launch, profile: Profile) -> str:
    """Returns the line of the batch script that runs after an attempt. $1: its status; $2: a failed setup's message"""
    step = shlex.join(["srun", "--nodes=1", "--ntasks=1", "--overlap", _END_PEERS, *srun_arguments(profile)])
    decide = shlex.join(["-m", "vjepa_scale.launch.requeue", str(launch.recipe), stage_name])
    return epilogue(launch.code, step, python_command(profile), decide, '${2:+"--setup-failed=$2"}')


def test_submission(stage: Stage, launch: Launch) -> str:
    """Returns why Slurm would refuse the stage's job now (``sbatch --test-only``); empty if it would not."""
    if shutil.which("sbatch") is None:
        return ""
    said = objection(stage_executor(stage, launch, after=None).script())
    return f"{said} ({fix_of(said)})" if said else ""


def check_profile(stages: Sequence[Stage]) -> None:
    """Raises UserError if a stage's job cannot run with its profile: a value to fill in, or fewer GPUs than processes.

    ``load_profile`` has checked the profile by itself.
    """
    for stage in stages:
        if (name := stage.launch.profile) is None:
            continue
        profile = load_profile(name)
        for key, value in placeholders(profile):
            raise UserError(
                f"{value} stands for a value of your site",
                where=f"{profile_file(name)}:{key}",
                fix="write your site's value, or remove the line",
            )
        requested = requested_gpus(profile)
        if requested is None or stage.recipe.engine.device == "cpu":
            continue
        key, gpus = requested
        if stage.launch.tasks_per_node > gpus:
            raise UserError(
                f"{stage.launch.tasks_per_node} processes per node for {stage.name!r}, but {key} of "
                f"{profile_file(name)} requests {gpus} GPUs per node, and each process needs one",
                where="launch.tasks_per_node",
                fix=f"launch.tasks_per_node={gpus}, or a larger count in {profile_file(name)}:{key}",
            )


def idle_gpus(stage: Stage) -> str | None:
    """Returns a sentence about GPUs that the profile requests and no process of the stage uses; None: there are none"""
    requested = requested_gpus(load_profile(stage.launch.profile))
    if requested is None or stage.recipe.engine.device == "cpu" or requested[1] <= stage.launch.tasks_per_node:
        return None
    key, gpus = requested
    return (
        f"{gpus - stage.launch.tasks_per_node} of {gpus} GPUs stay idle on each node: {key} of the profile requests "
        f"{gpus}, launch.tasks_per_node starts {stage.launch.tasks_per_node} processes"
    )


def _key_of_slurm(recipe: Recipe) -> str:
    return "launch" if recipe.launch.profile is None else f"launch.profile={recipe.launch.profile}"
