"""The Slurm job that evaluates a stage's checkpoints (``evaluate.where: own``).

A launch writes its batch script, launches/NNNN/evaluate-STAGE.sbatch. During training, a process beside rank 0 submits
it for a checkpoint that is due; a user may submit it too. Training never waits for the job. The job evaluates whatever
is due and has no result, so the next job does what one that was cancelled has left.
"""

import logging
import os
import shlex
import subprocess
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command
from vjepa_scale.launch.profile import Profile, load_profile
from vjepa_scale.launch.record import Launch
from vjepa_scale.launch.sbatch import ScriptExecutor, job_executor, jobs_of, said_by_sbatch, without_gpus
from vjepa_scale.monitor.jobs import SlurmUnavailable
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.evaluate_section import EvaluateConfig, evaluation_of

_log = logging.getLogger(__name__)


def script_name(stage: Stage) -> str:
    return f"evaluate-{stage.name}"


def evaluation_script(stage: Stage, launch: Launch) -> str | None:
    """Returns the batch script; None where the stage has no evaluation of its own. Raises UserError for its profile."""
    config = evaluation_of(stage)
    if config is None or config.where != "own":
        return None
    return _executor(stage, config, launch).script()


def _executor(stage: Stage, config: EvaluateConfig, launch: Launch) -> ScriptExecutor:
    cfg, run = config.launch, Path(stage.recipe.run.dir).absolute()
    gpus = cfg.gpus if cfg.gpus is not None else int(stage.recipe.engine.device != "cpu")
    if config.device == "cpu":
        gpus = 0
    executor = job_executor(
        _profile(stage, config, gpus),
        logs=stage.logs.absolute(),
        code=launch.code,
        finish=['[ "$1" -eq 0 ] || exit "$1"'],
        name=_job_name(stage),
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cfg.cpus_per_task,
        timeout_min=cfg.timeout_min,
        needs_gpus=gpus > 0,
        after=None,
    )
    executor.command = shlex.join(
        ["-u", "-P", "-m", "vjepa_scale.commands.evaluate", str(run), "--stage", stage.name, "--due"]
    )
    executor.update_parameters(dependency="singleton")  # one job of this name at a time
    return executor


def _profile(stage: Stage, config: EvaluateConfig, gpus: int) -> Profile:
    """Returns the site's options with this job's number of GPUs; its nodes are shared with other jobs."""
    profile = without_gpus(load_profile(config.launch.profile or stage.launch.profile))
    own: dict[str, object] = {"gpus_per_node": gpus, "exclusive": False}
    if config.launch.partition is not None:
        own["partition"] = config.launch.partition
    return profile.model_copy(update=own)


def _job_name(stage: Stage) -> str:
    return f"{Path(stage.recipe.run.dir).absolute().name}-{stage.name}-evaluate"


def submit_evaluation(stage: Stage) -> None:
    """Submits the script of the last launch, unless one waits that will see all. Raises UserError where it cannot."""
    run = Path(stage.recipe.run.dir).absolute()
    scripts = sorted(run.glob(f"launches/*/{script_name(stage)}.sbatch"))
    by_hand = f"{command('evaluate')} {run} --stage {stage.name}"
    if not scripts:
        raise UserError("no batch script of an evaluation", where=run / "launches", fix=by_hand)
    try:
        if jobs_of(run, name=_job_name(stage), states="PENDING"):
            return
    except SlurmUnavailable:  # sbatch says why
        pass
    # Without the variables of this job, which would be options of the other one.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "PMI"))}
    if (configuration := os.environ.get("SLURM_CONF")) is not None:
        own["SLURM_CONF"] = configuration
    try:
        done = subprocess.run(["sbatch", "--parsable", scripts[-1]], capture_output=True, text=True, env=own)
    except OSError as error:
        raise UserError(f"sbatch cannot be called here: {error}", where="evaluate.where", fix=by_hand) from None
    if done.returncode:
        raise UserError(
            f"Slurm refused the evaluation: {said_by_sbatch(done.stderr)}",
            where=scripts[-1],
            fix=f"sbatch it, or {by_hand}",
        )
    _log.info(f"{stage.name}: its checkpoints are evaluated by Slurm job {done.stdout.strip().partition(';')[0]}")
