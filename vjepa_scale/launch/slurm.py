"""The chain of stages on Slurm: one submitit job per stage, each waiting for the one before (afterok)."""

import submitit
from submitit.core.utils import FailedJobError

from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.local import failure
from vjepa_scale.launch.task import failure_folder, run_stage
from vjepa_scale.recipe import Recipe
from vjepa_scale.training.start import is_finished, stage_folder


def submit_chain(recipe: Recipe, stages: list[str], *, wait: bool) -> None:
    """Submit the stages; with ``wait``, stay until the last job is over.

    Raises UserError or StageFailedError of the first stage that ends without its last checkpoint; the stages
    behind it are cancelled.
    """
    jobs: list[submitit.Job] = []
    for stage in stages:
        for stale in failure_folder(recipe, stage).glob("*.json"):
            stale.unlink()
        executor = submitit.SlurmExecutor(folder=stage_folder(recipe, stage) / "logs")
        parameters = {
            "job_name": f"{stage}",
            "nodes": recipe.launch.nodes,
            "ntasks_per_node": recipe.launch.tasks_per_node,
            "cpus_per_task": recipe.launch.cpus_per_task,
            "time": recipe.launch.timeout_min,
        }
        if recipe.engine.device != "cpu":
            parameters["gpus_per_node"] = recipe.launch.tasks_per_node
        if jobs:
            parameters["dependency"] = f"afterok:{jobs[-1].job_id}"
            parameters["additional_parameters"] = {"kill_on_invalid_dep": "yes"}
        executor.update_parameters(**parameters)
        try:
            jobs.append(executor.submit(run_stage, recipe, stage))
        except FailedJobError as error:
            for job in jobs:
                job.cancel()
            raise UserError(f"Slurm refused the job of {stage!r}: {error}", where="launch") from None
        print(f"{stage}: Slurm job {jobs[-1].job_id}, logs in {executor.folder}", flush=True)
    for index, (stage, job) in enumerate(zip(stages, jobs, strict=True) if wait else ()):
        job.wait()
        if not is_finished(recipe, stage):
            for behind in jobs[index + 1 :]:
                behind.cancel()
            raise failure(recipe, stage, job, executor.folder)
