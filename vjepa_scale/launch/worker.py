"""The entry point of each process of a stage: under submitit (local or Slurm), torchrun, srun or plain Python.

torchrun --nproc-per-node 8 -m vjepa_scale.launch.worker recipes/vitg_384.yaml pretrain [key=value …]

Exit codes: 0 done; 75 (EX_TEMPFAIL) saved and stopped after a signal, the same command resumes; 2 a user error,
with one line on stderr; 1 any other error.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core import log
from vjepa_scale.core.errors import EXIT_SAVED, EXIT_USER_ERROR, UserError, run_command
from vjepa_scale.core.ranks import Ranks, detect_ranks
from vjepa_scale.core.worker_pool import remove_socket_folder
from vjepa_scale.launch.evaluator import Evaluator
from vjepa_scale.launch.retry_policy import refuse_endless_restarts
from vjepa_scale.launch.supervisor import RankError, supervised
from vjepa_scale.monitor.publish import Publishers
from vjepa_scale.recipe import Stage, load_recipe, stages_of
from vjepa_scale.recipe.limits import outside_limit_s, step_limit_s
from vjepa_scale.run.events import History
from vjepa_scale.run.failures import NothingSaved, report_failure, reported_error
from vjepa_scale.run.progress import Page, Progress
from vjepa_scale.training.planned_start import load_for_training
from vjepa_scale.training.preflight import check_sinks_installed
from vjepa_scale.training.signals import Interrupt, SavedAndStopped


def run_launched(recipe: Path, stage: str) -> str:
    """Runs one attempt at a stage, as one rank, by the recipe of the launch's record. submitit calls it."""
    return run_supervised(stages_of(load_recipe(recipe))[stage])


def run_supervised(stage: Stage) -> str:
    """``run_stage`` in a child process, with this one as its supervisor."""
    ranks = detect_ranks()
    try:
        done: str = supervised(partial(_run_page, stage, ranks), ranks=ranks, failures=stage.failures, logs=stage.logs)
        return done
    except (UserError, RankError) as error:
        atexit.register(_leave, EXIT_USER_ERROR if isinstance(error, UserError) else 1)
        raise


def _run_page(stage: Stage, ranks: Ranks, page: Page) -> str:
    recipe = stage.recipe
    step_s = step_limit_s(recipe, world_size=ranks.world_size)
    progress = Progress(page=page, step_s=step_s, outside_s=outside_limit_s(recipe))
    return run_stage(stage, ranks, progress)


def run_stage(stage: Stage, ranks: Ranks | None = None, progress: Progress | None = None) -> str:
    """Runs one attempt at a stage in this process, as one rank of this job. Returns "done".

    ranks: its rank, if it is known; progress: updated with what it does
    Raises SystemExit(75) after a signal, when everything is saved. After any other exception writes
    ``failures/JOB.RANK.json`` and raises it again.
    """
    interrupt = Interrupt()
    ranks = ranks or detect_ranks()
    progress = progress or Progress()
    progress.enter("setup")
    log.tell_regions(progress.enter)
    followers: list[Publishers | Evaluator] = []
    try:
        interrupt.listen(loader_workers=stage.recipe.data.workers)
        log.set_up(f"{stage.name} rank {ranks.rank}", main=ranks.is_main)
        # Importing PyTorch takes seconds. Launchers, which only pickle ``run_launched``, do not need it, and signals
        # are handled before it.
        from vjepa_scale.training.answers import answering
        from vjepa_scale.training.trainer import train_stage

        if ranks.source == "slurm":
            history = History(stage.folder)
            refuse_endless_restarts(history, job_id=ranks.job_id, max_restarts=stage.launch.max_restarts)
        sinks = stage.recipe.log
        check_sinks_installed(sinks.sinks)
        if ranks.is_main:
            followers.append(Publishers(stage, sinks.sinks, timeout_s=sinks.sink_timeout_s, live=True))
            followers.append(Evaluator(stage, ranks, interrupt))
        with answering(progress.page, folder=stage.folder, rank=ranks.rank):
            train_stage(stage, ranks, interrupt=interrupt, progress=progress)
        progress.rest()
    except SavedAndStopped:
        progress.rest()
        _end(followers, EXIT_SAVED)
        _exit_at_the_end(EXIT_SAVED)
        sys.exit(EXIT_SAVED)
    except BaseException as error:
        shown = reported_error(error)
        progress.rest()
        try:
            report_failure(stage.failures, ranks, progress.step, error, logs=stage.logs)
        except OSError as unwritten:  # must not replace the error itself
            with suppress(OSError):
                print(f"error: {shown}; its report cannot be written: {unwritten}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR if isinstance(shown, UserError) else 1
        _end(followers, code)
        if isinstance(error, NothingSaved):
            print(f"{stage.name}: {error}", file=sys.stderr, flush=True)
            code = EXIT_SAVED
        atexit.register(_leave, code)
        if code == EXIT_SAVED:
            sys.exit(EXIT_SAVED)
        raise
    _end(followers, 0)
    _exit_at_the_end(0)
    return "done"


def _end(followers: Sequence[Publishers | Evaluator], code: int) -> None:
    """Waits a little for what rank 0's followers have left. The stage has ended, whatever becomes of them."""
    for follower in followers:
        follower.end(code)


def _exit_at_the_end(code: int) -> None:
    from vjepa_scale.distributed import process_group

    # Only after finished work, and at exit, because submitit writes a result first.
    atexit.register(partial(process_group.exit_cleanly, code))


def _leave(code: int) -> NoReturn:
    """Ends a failed rank after its report and traceback, by ``os._exit``: other cleanup may wait for its peers."""
    remove_socket_folder()
    with suppress(OSError):  # logs on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one stage of a recipe as one rank of whatever job this is.")
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    recipe = load_for_training(arguments.recipe, arguments.overrides)
    stages = stages_of(recipe)
    if arguments.stage not in stages:
        raise UserError(f"no stage {arguments.stage!r}", where=arguments.recipe, fix=f"one of {', '.join(stages)}")
    run_supervised(stages[arguments.stage])
    return 0


if __name__ == "__main__":
    run_command(main)
