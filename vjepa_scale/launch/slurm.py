"""The chain of stages on Slurm: one submitit job per stage, each waiting for the one before (afterok).

A job's batch script is submitit's: the site's setup, ``srun`` of one process per rank, and after it our
epilogue, which queues the job again where the attempt was not the last.
"""

import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import write_atomic
from vjepa_scale.launch.profile import Profile, load_profile, python_command, submitit_parameters
from vjepa_scale.launch.record import Launch
from vjepa_scale.launch.snapshot import import_lines
from vjepa_scale.launch.task import run_launched
from vjepa_scale.recipe import Recipe
from vjepa_scale.recipe.folders import LOGS, stage_folder
from vjepa_scale.training.history import History
from vjepa_scale.watch.jobs import run_slurm

SIGNAL = "USR2"
SIGNAL_EARLY_S = 60  # Slurm's own words: its signal may come up to a minute before what --signal says


def submit_chain(recipe: Recipe, stages: Sequence[str], launch: Launch) -> None:
    """Submit the stages' jobs and write them into the stages' histories.

    Raises UserError where Slurm refuses one; those submitted before it are cancelled then.
    """
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch command here", where="launch.cluster", fix="run on a login node, or --cluster local")
    before: submitit.Job | None = None
    submitted: list[tuple[submitit.Job, History]] = []
    for stage in stages:
        executor = stage_executor(recipe, stage, launch, after=before.job_id if before else None)
        write_atomic(launch.folder / f"{stage}.sbatch", executor.script())
        name = executor.parameters["job_name"]
        _refuse_twin(recipe, name)
        try:
            with _undisturbed():  # a job that nobody has written down would get a twin by the next launch
                job = executor.submit(run_launched, launch.recipe, stage)
                history = History(stage_folder(recipe, stage))
                history.add("submitted", cluster="slurm", job_id=job.job_id, name=name, launch=str(launch.folder))
        except FailedJobError as error:
            for earlier, history in reversed(submitted):
                history.add("cancelled")
                earlier.cancel()
            if not submitted:
                launch.withdraw()
            raise UserError(
                f"Slurm refused the job of {stage!r}: {_said_by_sbatch(str(error))}",
                where=_blame(recipe),
                fix="sinfo, sacctmgr show associations and scontrol show partition say what there is",
            ) from None
        submitted.append((job, history))
        waits = f" after {before.job_id}" if before else ""
        print(f"{stage}: Slurm job {job.job_id}{waits}, logs in {executor.folder}/{job.job_id}_*", flush=True)
        before = job


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C, a closed terminal or a kill wait until the block is done."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_twin(recipe: Recipe, name: str) -> None:
    """Raise UserError if Slurm has a job of this run that no history tells of: sbatch's answer may have been lost."""
    run = Path(recipe.run.dir).absolute()
    asked = run_slurm(["squeue", "--me", "--noheader", "--name", name, "--format", "%i %o"])
    for line in asked.stdout.splitlines():
        job_id, _, command = line.strip().partition(" ")
        if command.startswith(f"{run}/"):
            raise UserError(f"Slurm job {job_id} is this stage's already", where=run, fix=f"scancel {job_id}, or wait")


def scripts(recipe: Recipe, stages: Sequence[str], launch: Launch) -> dict[str, str]:
    """Stage → its batch script, as it would be submitted. A job id that is not known yet is named after its stage."""
    texts = {}
    for before, stage in zip([None, *stages], stages, strict=False):
        after = f"JOB_ID_OF_{before.upper()}" if before else None
        texts[stage] = stage_executor(recipe, stage, launch, after=after).script()
    return texts


class StageExecutor(submitit.SlurmExecutor):
    """submitit's executor, which here can also say what it would submit."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # submitit's own wants srun, which a dry run does without

    def script(self) -> str:
        """The batch script that ``submit`` hands to sbatch."""
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def stage_executor(recipe: Recipe, stage: str, launch: Launch, *, after: str | None) -> StageExecutor:
    """The executor of one stage's job. after: the job that must have succeeded before."""
    run = Path(recipe.run.dir).absolute()
    _refuse_pattern(run)
    profile = load_profile(recipe.launch.profile)
    cfg = recipe.launch
    if 60 * cfg.timeout_min <= profile.signal_delay_s + SIGNAL_EARLY_S:
        raise UserError(
            f"jobs of {cfg.timeout_min} minutes ({60 * cfg.timeout_min} s) that Slurm tells to save up to "
            f"{profile.signal_delay_s} + {SIGNAL_EARLY_S} s before their end would not train",
            where="launch.timeout_min",
            fix=f"a longer one, or a shorter signal_delay_s in profile {recipe.launch.profile or '(its default)'}",
        )
    site = submitit_parameters(profile, needs_gpus=recipe.engine.device != "cpu", tasks_per_node=cfg.tasks_per_node)
    additional = dict(site.pop("additional_parameters"))
    if after is not None:
        additional["kill-on-invalid-dep"] = "yes"
    srun_args = ["--kill-on-bad-exit=1", *site.pop("srun_args")]  # else ranks wait for their dead peer
    executor = StageExecutor(folder=run / stage / LOGS, python=python_command(profile))
    additional["signal"] = f"{SIGNAL}@{profile.signal_delay_s}"  # submitit's follows a variable of the user's shell
    imports = import_lines(launch.code)
    before_site = [*_finish(stage, launch, profile, imports, srun_args), f"trap : TERM {SIGNAL}"]
    after_site = [*imports, f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}"]
    executor.update_parameters(
        **site | {"setup": [*before_site, *site["setup"], *after_site]},
        job_name=f"{run.name}-{stage}",
        nodes=cfg.nodes,
        ntasks_per_node=cfg.tasks_per_node,
        cpus_per_task=cfg.cpus_per_task,
        time=cfg.timeout_min,
        dependency=f"afterok:{after}" if after else None,
        srun_args=srun_args,
        teardown=["finish $?"],
        additional_parameters=additional,
    )
    return executor


def _finish(
    stage: str, launch: Launch, profile: Profile, imports: Sequence[str], srun_args: Sequence[str]
) -> list[str]:
    """A function of the batch script: what follows an attempt, given its status; of a failing setup, what it said."""
    script = launch.code / "vjepa_scale" / "launch" / "epilogue.sh"
    step = shlex.join(["srun", "--nodes=1", "--ntasks=1", "--overlap", *srun_args])
    decide = shlex.join(["-m", "vjepa_scale.launch.afterwards", str(launch.recipe), stage])
    return [
        "finish() {",
        *(f"  {line}" for line in imports),
        f'  bash {shlex.quote(str(script))} "$1" {step} {python_command(profile)} {decide} ${{2:+"--setup-failed=$2"}}',
        "  exit",
        "}",
    ]


def _refuse_pattern(run: Path) -> None:
    if "%" in str(run):
        raise UserError("Slurm reads % in the path of a log as a pattern", where=run, fix="a run.dir without %")


def test_submission(recipe: Recipe, stage: str, launch: Launch) -> str:
    """What Slurm says against the stage's job, were it submitted now (``sbatch --test-only``); empty if nothing."""
    if shutil.which("sbatch") is None:
        return ""
    script = stage_executor(recipe, stage, launch, after=None).script()
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    return _said_by_sbatch(done.stderr) if done.returncode else ""


def _said_by_sbatch(text: str) -> str:
    """sbatch's error lines, each once and without its name."""
    lines = [line.partition("error: ")[2].strip() for line in text.splitlines() if "sbatch: error: " in line]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or " ".join(text.split())


def _blame(recipe: Recipe) -> str:
    return "launch" if recipe.launch.profile is None else f"launch.profile={recipe.launch.profile}"
