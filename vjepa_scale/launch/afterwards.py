"""At the end of a Slurm job's attempt that did not end well: is there to be another?

srun --ntasks 1 python -m vjepa_scale.launch.afterwards RECIPE STAGE [key=value …]

Runs inside the job (vjepa_scale/launch/epilogue.sh calls it). Writes the failure into the stage's history and
says in one line what follows. Exit codes: 75 queue the job again; 0 the stage is done after all; 2 or 1 let it
end. Light: it does not import torch, since a job that is being preempted has no time.
"""

import argparse
import os

from vjepa_scale.core.errors import EXIT_SAVED, EXIT_USER_ERROR, run_command
from vjepa_scale.launch.restarts import attempts, close_attempt, judge
from vjepa_scale.recipe import load_recipe
from vjepa_scale.recipe.folders import failures_folder, stage_folder
from vjepa_scale.training.history import History


def main() -> int:
    parser = argparse.ArgumentParser(description="Decide whether a stage's Slurm job is to be queued again.")
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    history = History(stage_folder(recipe, arguments.stage))
    job_id, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    close_attempt(history, failures_folder(recipe, arguments.stage), f"{job_id}.*-{restart}", job_id=job_id)
    verdict = judge(attempts(history, job_id=job_id), max_restarts=recipe.launch.max_restarts)
    if verdict.kind == "done":
        return 0
    if verdict.kind == "again":
        history.add("requeued", job_id=job_id, reason=verdict.ended)
        print(f"{arguments.stage}: {verdict.ended}: job {job_id} is queued again", flush=True)
        return EXIT_SAVED
    history.add("gave_up", job_id=job_id, reason=verdict.why)
    print(f"{arguments.stage}: {verdict.ended}: not again, since {verdict.why}", flush=True)
    return EXIT_USER_ERROR if verdict.user_error else 1


if __name__ == "__main__":
    run_command(main)
