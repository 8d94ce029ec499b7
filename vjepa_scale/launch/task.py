"""The entry of each process of a stage: under submitit (local or Slurm), torchrun, srun or plain Python.

torchrun --nproc-per-node 8 -m vjepa_scale.launch.task recipes/vitg_384.yaml pretrain [key=value …]
"""

import argparse
import atexit
import traceback
from pathlib import Path

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.files import write_json
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.parallel import process_group
from vjepa_scale.recipe import Recipe, load_recipe
from vjepa_scale.training.start import stage_folder
from vjepa_scale.training.trainer import train_stage


def run_stage(recipe: Recipe, stage: str) -> str:
    """Train one stage as one rank of this job. Returns "done"; leaves ``failures/JOB.RANK.json`` on any error."""
    ranks = detect_ranks()
    try:
        train_stage(recipe, stage, ranks)
    except BaseException as error:
        _report_failure(recipe, stage, ranks.job, ranks.rank, error)
        raise
    # Only now that the work is done, and only at exit: submitit has a result to write first.
    atexit.register(process_group.exit_cleanly)
    return "done"


def failure_folder(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / "failures"


def _report_failure(recipe: Recipe, stage: str, job: str, rank: int, error: BaseException) -> None:
    write_json(
        failure_folder(recipe, stage) / f"{job.replace('/', '_')}.{rank}.json",
        {
            "rank": rank,
            "kind": type(error).__name__,
            "message": str(error),
            "user_error": isinstance(error, UserError),
            "traceback": traceback.format_exc(),
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one stage of a recipe as one rank of whatever job this is.")
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.stage not in recipe.stages():
        raise UserError(
            f"no stage {arguments.stage!r}", where=arguments.recipe, fix=f"one of {', '.join(recipe.stages())}"
        )
    run_stage(recipe, arguments.stage)
    return 0


if __name__ == "__main__":
    run_command(main)
