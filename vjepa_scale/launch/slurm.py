"""The chain of stages on Slurm: one submitit job per stage, each waiting for the one before (afterok)."""

import submitit

from vjepa_scale.launch.task import run_stage
from vjepa_scale.recipe import Recipe
from vjepa_scale.training.start import stage_folder


def submit_chain(recipe: Recipe, stages: list[str], *, wait: bool) -> None:
    """Submit the stages; with ``wait``, stay until the last job is over and raise its error, if any."""
    previous: submitit.Job | None = None
    for stage in stages:
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
        if previous is not None:
            parameters["dependency"] = f"afterok:{previous.job_id}"
        executor.update_parameters(**parameters)
        previous = executor.submit(run_stage, recipe, stage)
        print(f"{stage}: Slurm job {previous.job_id}, logs in {executor.folder}", flush=True)
    if wait and previous is not None:
        previous.results()
