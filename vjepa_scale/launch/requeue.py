"""Decides whether a Slurm job whose attempt has failed is queued again.

srun --ntasks 1 python -m vjepa_scale.launch.requeue RECIPE STAGE [key=value …]

Runs inside the job (vjepa_scale/launch/epilogue.sh calls it). Writes the failure into the stage's history and logs
the decision in one line. Exit codes: 75 queue the job again; 0 the stage is complete; 2 or 1 do not queue it again.
Does not import PyTorch, since a job that is being preempted has little time.

--refused: Slurm did not queue the job again; only records that.
--setup-failed: no rank was started, because a line of the site's setup failed.
"""

import signal

# Slurm signals all processes of a job, so signals are ignored before the slow imports.
for _number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402

from vjepa_scale.core import log  # noqa: E402
from vjepa_scale.core.errors import EXIT_SAVED, EXIT_USER_ERROR, run_command  # noqa: E402
from vjepa_scale.launch.retry_policy import end_of_attempt  # noqa: E402
from vjepa_scale.recipe import load_recipe, stages_of  # noqa: E402
from vjepa_scale.run.events import History  # noqa: E402

_log = logging.getLogger("vjepa_scale.launch.requeue")  # not __name__: it runs as __main__


def main() -> int:
    parser = argparse.ArgumentParser(description="Decide whether a stage's Slurm job is to be queued again.")
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--refused", action="store_true")
    parser.add_argument("--setup-failed", metavar="WORDS")
    parser.add_argument("--status", type=int, help="srun's")
    arguments = parser.parse_intermixed_args()
    stage = stages_of(load_recipe(arguments.recipe, arguments.overrides))[arguments.stage]
    log.set_up(f"{stage.name} requeue")
    history = History(stage.folder)
    job_id, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    if arguments.refused:
        history.add("gave_up", job_id=job_id, reason="Slurm did not queue its job again")
        return 1
    verdict = end_of_attempt(
        history,
        stage.failures,
        job=f"{job_id}.*-{restart}",
        job_id=job_id,
        max_restarts=stage.launch.max_restarts,
        log=stage.logs / f"{job_id}_0_log.err",
        setup=arguments.setup_failed,
        early_signal="SIGUSR2" if arguments.status == 128 + signal.SIGUSR2 else None,
    )
    if verdict.kind == "done":
        return 0
    if verdict.kind == "again":
        history.add("requeued", job_id=job_id, reason=verdict.ended)
        _log.info(f"{stage.name}: {verdict.ended}: job {job_id} will be queued again")
        return EXIT_SAVED
    history.add("gave_up", job_id=job_id, reason=verdict.why)
    _log.info(f"{stage.name}: {verdict.ended}: not queued again, since {verdict.why}")
    return EXIT_USER_ERROR if verdict.user_error else 1


if __name__ == "__main__":
    run_command(main)
