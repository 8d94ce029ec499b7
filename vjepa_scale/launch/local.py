"""Runs the chain of stages on this machine: a loop over attempts, each started by submitit's local executor.

The loop does what Slurm does on a cluster: a stage waits for the one before, and is started again after an
interruption or a failure, by the same rules (retry_policy.py).
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import submitit

from vjepa_scale.core.errors import OutsideError, PassingError, UserError
from vjepa_scale.core.files import GrowingFile, keep_reserve
from vjepa_scale.core.worker_pool import kill_processes, process_tree
from vjepa_scale.launch.record import Launch
from vjepa_scale.launch.retry_policy import Verdict, end_of_attempt
from vjepa_scale.launch.worker import run_launched
from vjepa_scale.monitor.follow import LiveLines, show_lines
from vjepa_scale.monitor.jobs import this_process
from vjepa_scale.recipe import Stage
from vjepa_scale.run.events import History
from vjepa_scale.training.preflight import is_finished
from vjepa_scale.training.signals import SIGNAL_DELAY

FAILURE_GRACE_S = 15.0
# A signal during submitit's start of the ranks is lost, so it is repeated. Ranks ignore repetitions.
ASK_AGAIN_S = 5.0
# Seconds to finish a step and save before submitit's local executor ends a job at its time limit.
SIGNAL_DELAY_S = 30


class StageFailedError(RuntimeError):
    """A stage ended without its last checkpoint."""


class StoppedError(Exception):
    """The launcher was stopped by a signal: its ranks have saved, or were killed after a second signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class LocalChain:
    """Runs stages in order, each to its end over restarts. Shows rank 0's lines as they come."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._job: submitit.Job | None = None
        self._stopping: int | None = None

    def run(self, stages: Sequence[Stage]) -> None:
        """Raises UserError after a user error, StoppedError after a signal, otherwise StageFailedError."""
        with self._listening():
            for stage in stages:
                if is_finished(stage):
                    print(f"{stage.name} is already complete")
                else:
                    self._run_stage(stage)

    # -- one stage -----------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        folder = stage.folder
        for leftover in (*folder.glob("failures/*.*"), *folder.glob("rendezvous/*")):
            leftover.unlink()  # a local job's name is a process id, which may be reused
        history = History(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep_reserve(folder)
        job = self._start(stage)
        history.add(
            "submitted",
            cluster="local",
            job_id=job.job_id,
            name=f"{Path(stage.recipe.run.dir).name}-{stage.name}",
            launch=str(self._launch.folder),
            **this_process(),
        )
        while True:
            self._follow(job, stage.failures)
            verdict = end_of_attempt(
                history,
                stage.failures,
                job=job.job_id,
                job_id=None,
                max_restarts=stage.launch.max_restarts,
                log=Path(job.paths.stderr),
            )
            if verdict.kind == "done":
                return
            if self._stopping is not None:
                if not any(row["event"] == "cancelled" for row in history.since_submission()):
                    history.add("cancelled")
                raise StoppedError(self._stopping)
            if verdict.kind == "stop":
                history.add("gave_up", job_id=job.job_id, reason=verdict.why)
                raise self._failure(stage, verdict, history)
            print(f"{stage.name}: {verdict.ended}; another attempt", flush=True)
            job = self._start(stage)
            history.add("requeued", job_id=job.job_id, reason=verdict.ended)

    def _start(self, stage: Stage) -> submitit.Job:
        if self._stopping is not None:
            raise StoppedError(self._stopping)
        logs, launch, engine = stage.logs, stage.launch, stage.recipe.engine
        gpus = [] if engine.device == "cpu" else _visible_gpus(os.environ)
        executor = submitit.LocalExecutor(folder=logs)
        executor.update_parameters(
            tasks_per_node=launch.tasks_per_node,
            gpus_per_node=len(gpus),  # submitit hides every GPU that is not requested
            visible_gpus=gpus,
            timeout_min=launch.timeout_min,
            signal_delay_s=SIGNAL_DELAY_S,
        )
        with _inherited(self._launch.code):
            self._job = executor.submit(run_launched, self._launch.recipe, stage.name)
        print(f"{stage.name}: {launch.tasks_per_node} processes, logs in {logs}/{self._job.job_id}_*", flush=True)
        return self._job

    def _follow(self, job: submitit.Job, failures: Path) -> None:
        """Copies rank 0's output and warnings to our stdout until the job has ended.

        After a rank has failed, the others get ``FAILURE_GRACE_S`` seconds to write reports, and are then killed: a
        rank that has not joined the process group would wait for its dead peer until ``engine.timeout_s``.
        """
        said, warned = GrowingFile(Path(job.paths.stdout)), GrowingFile(Path(job.paths.stderr))
        show = LiveLines()
        deadline: float | None = None
        asked_at = 0.0
        while True:
            if self._stopping is not None and time.monotonic() > asked_at + ASK_AGAIN_S:
                self._ask_to_save(job)
                asked_at = time.monotonic()
            over = job.done()
            with suppress(OSError):  # our stdout on a full disk: the run continues, and the ranks' logs have the lines
                show_lines(warned, whole_lines=not over, only="warning: ", stream=show)
                show_lines(said, whole_lines=not over, stream=show)
            if over:
                show.close()
                return
            if deadline is None and any(failures.glob(f"{job.job_id}.*.json")):
                deadline = time.monotonic() + FAILURE_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                kill_processes(process_tree(int(job.job_id)))
                deadline = None
            time.sleep(0.2)

    def _failure(self, stage: Stage, verdict: Verdict, history: History) -> Exception:
        failed = next(row for row in reversed(history.rows()) if row["event"] == "failed")
        passing = (PassingError.__name__, OutsideError.__name__)
        if verdict.user_error or failed["kind"] in passing:  # it was not temporary
            return UserError(failed["message"])
        named = failed["rank"] is None or failed["message"].startswith("rank ")
        who = "" if named else f"rank {failed['rank']} failed with "
        where = f"report in {failed['report']}, " if failed["report"] else ""
        return StageFailedError(
            f"{stage.name}: {who}{verdict.ended}; not started again, since {verdict.why}; {where}logs in {stage.logs}"
        )

    # -- signals -------------------------------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        """At the first signal, ranks save and stop; at the second one they are killed."""
        if self._job is None:
            raise StoppedError(number)
        if self._stopping is None:
            os.write(2, b"stopping: the ranks save first (again: end them at once)\n")
            self._stopping = number
        else:
            kill_processes(process_tree(int(self._job.job_id)))

    def _ask_to_save(self, job: submitit.Job) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(int(job.job_id), signal.SIGTERM)  # submitit passes it on to the ranks


@contextmanager
def _inherited(code: Path) -> Iterator[None]:
    """Sets what processes started inside inherit: the code of this launch, and that Ctrl-C is ignored.

    A terminal sends Ctrl-C to every process. Only the launcher handles it, so that ranks can save.
    """
    names = ("PYTHONPATH", "PYTHONSAFEPATH", "SUBMITIT_PREEMPT_SIGNAL", SIGNAL_DELAY)
    ours = {name: os.environ.get(name) for name in names}
    os.environ["PYTHONPATH"] = f"{code}{os.pathsep}{ours['PYTHONPATH']}" if ours["PYTHONPATH"] else str(code)
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR2"  # the ranks' signal; the shell may have another
    os.environ[SIGNAL_DELAY] = str(SIGNAL_DELAY_S)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in ours.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _visible_gpus(environment: Mapping[str, str]) -> list[int]:
    """Returns the GPUs that this process may use, by the numbers of CUDA_VISIBLE_DEVICES."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch  # only to count GPUs

        return list(range(torch.cuda.device_count()))
    numbers = [part.strip() for part in named.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"{named!r} is not a list of numbers", where="CUDA_VISIBLE_DEVICES", fix="for example 0,1")
    return [int(number) for number in numbers]
