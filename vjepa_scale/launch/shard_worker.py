"""The process of each Slurm job of ``make_shards --cluster slurm``: runs its share of one step.

A step writes its progress to disk and continues from it. So a job that gets a signal exits at once, with the status
after which epilogue.sh queues it again.
"""

import os
import signal
import time
from types import FrameType

from vjepa_scale.core import log
from vjepa_scale.core.errors import EXIT_SAVED, run_command
from vjepa_scale.core.worker_pool import start_fork_server
from vjepa_scale.data.manifest import MANIFEST
from vjepa_scale.shards.plan import plan
from vjepa_scale.shards.probe import probe
from vjepa_scale.shards.work import Part, Work, tidy
from vjepa_scale.shards.write import finish, write

STEPS = ("probe", "plan", "write", "finish")


def run_share(work: Work, step: str, part: Part, *, workers: int, timeout_min: int) -> None:
    """Runs one job's share of a step, or the rest of it. Exits as ``run_command`` does, or with 75 after a signal."""
    attempt = Attempt(timeout_min)
    signals = (signal.SIGTERM, signal.SIGUSR2)
    for number in signals:
        signal.signal(number, attempt.leave)

    def share() -> None:
        log.set_up(f"{step} job {part.index}", main=part.index == 0)
        # A worker that a signal ends would be taken for one that its video has crashed.
        start_fork_server("vjepa_scale.shards.probe", "vjepa_scale.shards.write", deaf_to=signals)
        if (work.out / MANIFEST).exists() and not work.folder.exists():
            tidy(work.out)  # the step ``finish`` was interrupted at its end, perhaps during this
            return
        if step == "probe":
            probe(work, part, workers=workers, progress=attempt.count)
        elif step == "plan":
            plan(work)
        elif step == "write":
            write(work, part, workers=workers, progress=attempt.count)
        else:
            finish(work)

    run_command(share)


class Attempt:
    """Stops the requeueing of a job that finishes nothing within its time limit."""

    def __init__(self, timeout_min: int) -> None:
        self._done, self._timeout_min, self._started = 0, timeout_min, time.monotonic()

    def count(self, doing: str, done: int, total: int) -> None:
        self._done += 1

    def leave(self, number: int, _: FrameType | None) -> None:
        # Only after half of the limit: a job may be preempted just after its start.
        if not self._done and time.monotonic() - self._started > 60 * self._timeout_min / 2:
            os.write(2, f"error: nothing was finished in {self._timeout_min} minutes (--timeout-min)\n".encode())
            os._exit(1)
        os._exit(EXIT_SAVED)
