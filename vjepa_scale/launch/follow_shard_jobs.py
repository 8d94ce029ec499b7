"""Follows the Slurm jobs that make a data set: their progress, by the files that they write, and their ends."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import GrowingFile
from vjepa_scale.data.manifest import MANIFEST
from vjepa_scale.launch.shard_worker import STEPS
from vjepa_scale.monitor.jobs import JobState, SlurmUnavailable, is_alive, run_slurm
from vjepa_scale.shards.plan import Plan
from vjepa_scale.shards.work import Progress, Work

LOOK_S = 1.0
ASK_S = 5.0
# Seconds after which files of another node are visible here.
SURE_AFTER_S = 60.0


class JobFailedError(RuntimeError):
    """A job ended with its work unfinished. The message names the job, its log and the log's last line."""


@dataclass(frozen=True)
class Job:
    """A step's job, or its array of several tasks."""

    step: str
    job_id: str
    tasks: int

    def __str__(self) -> str:
        return f"job {self.job_id}" if self.tasks == 1 else f"jobs {self.job_id}_[0-{self.tasks - 1}]"


def follow(work: Work, jobs: dict[str, Job], logs: Path, *, progress: Progress) -> None:
    """Shows the progress of the jobs until the data set is finished.

    Reports a failed task at once, follows the others of its array to their end, since their results are kept, and
    then raises JobFailedError. After KeyboardInterrupt prints that the jobs continue.
    """
    follower = _Follower(work, jobs, logs, progress)
    try:
        follower.run()
    except KeyboardInterrupt:
        ids = " ".join(job.job_id for job in jobs.values())
        print(f"\nthe jobs run on; the same command follows them again, scancel {ids} ends them", flush=True)
        raise


class _Follower:
    """_failed: by task; _printed: the last line printed about each step."""

    def __init__(self, work: Work, jobs: dict[str, Job], logs: Path, progress: Progress) -> None:
        self._work, self._jobs, self._logs, self._progress = work, jobs, logs, progress
        self._files = Files(work)
        self._steps = {job.job_id: step for step, job in jobs.items()}
        self._failed: dict[str, JobState] = {}
        self._printed: dict[str, str] = {}
        self._shown: dict[str, int] = {}

    def run(self) -> None:
        ask_at = 0.0
        while True:
            self._show()
            if self._finished():
                ask_at = min(ask_at, time.monotonic() + LOOK_S)
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + ASK_S
                try:
                    tasks = self._query()
                except SlurmUnavailable as error:
                    self._say("", f"Slurm does not answer: {error}")
                else:
                    if not any(map(is_alive, tasks)):
                        break
                    self._announce(tasks)
            time.sleep(LOOK_S)
        self._end()

    def _end(self) -> None:
        deadline = time.monotonic() + SURE_AFTER_S
        while not self._failed and not self._finished() and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        self._show()
        if self._finished():
            return
        if not self._failed:
            raise JobFailedError(f"the jobs have ended without an error, but it is not finished: logs in {self._logs}")
        first = min(self._failed.values(), key=lambda task: STEPS.index(task.name))
        raise JobFailedError(f"{self._failure(first)} (the same command goes on)")

    def _finished(self) -> bool:
        return (self._work.out / MANIFEST).exists() and not self._work.folder.exists()

    # -- files -----------------------------------------------------------------------------------------

    def _show(self) -> None:
        for doing, done, total in self._files.so_far():
            if self._shown.get(doing) != done:
                self._shown[doing] = done
                self._progress(doing, done, total)

    # -- Slurm -----------------------------------------------------------------------------------------

    def _query(self) -> list[JobState]:
        """Returns every job and task that Slurm still knows; their name is the step's."""
        ids = ",".join(self._steps)
        asked = run_slurm(["squeue", "--noheader", "--states=all", f"--jobs={ids}", "--format=%F|%K|%T|%r"])
        if asked.returncode and "invalid job id" not in asked.stderr.lower():
            raise SlurmUnavailable(" ".join(asked.stderr.split()))
        tasks = []
        for line in asked.stdout.splitlines():
            job_id, index, state, reason = line.strip().split("|", 3)
            named = job_id if index == "N/A" else f"{job_id}_{index}"
            tasks.append(JobState(named, self._steps[job_id], state, reason))
        for task in tasks:
            if not is_alive(task) and task.state != "COMPLETED":
                self._fail(task, others=sum(is_alive(other) and other.name == task.name for other in tasks))
            else:
                self._failed.pop(task.job_id, None)  # it was queued again
        return tasks

    def _fail(self, task: JobState, *, others: int) -> None:
        if task.job_id not in self._failed:
            self._failed[task.job_id] = task
            if others:
                print(f"warning: {self._failure(task)}; the others continue", flush=True)

    def _announce(self, tasks: Sequence[JobState]) -> None:
        step = next((step for step in STEPS if any(t.name == step and is_alive(t) for t in tasks)), None)
        if step is None:
            return
        now = [task for task in tasks if task.name == step and is_alive(task)]
        running = any(task.state != "PENDING" for task in now)
        reason = next((task.reason for task in now if task.reason not in ("", "None")), "")
        words = "runs" if running else f"is pending ({reason})" if reason else "is pending"
        self._say(step, f"{step}: Slurm {self._jobs[step]} {words}")

    def _say(self, about: str, words: str) -> None:
        if self._printed.get(about) != words:
            self._printed[about] = words
            print(words, flush=True)

    def _failure(self, task: JobState) -> str:
        """Returns one line: step, job, how it ended, its log and the log's last line."""
        ended = {"CANCELLED": "was cancelled", "TIMEOUT": "ran into its time limit"}
        words = ended.get(task.state, task.state.lower().replace("_", " "))
        log = self._logs / f"{task.job_id}_0_log.err"
        said = last_words(log)
        return f"{task.name}: Slurm job {task.job_id} {words}: {log}" + (f": {said}" if said else "")


class Files:
    """The progress of a data set, read from its files. Repeated calls are cheap: they read only what is new."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._files: dict[str, GrowingFile] = {}
        self._lines = Counter[str]()
        self._shards: int | None = None

    def so_far(self) -> list[tuple[str, int, int]]:
        """Returns (activity, number done, total), as arguments of Progress."""
        if self._shards is None:
            with suppress(UserError):
                self._shards = Plan.open(self._work).shards
        progress = [("probing", self._work.files if self._shards is not None else self._sources(), self._work.files)]
        if self._shards is not None:
            there = sum(name.startswith("shard-") and name.endswith(".tar") for name in os.listdir(self._work.out))
            progress.append(("writing", there, self._shards))
        return progress

    def _sources(self) -> int:
        """Returns the number of probed sources. One that two processes have probed counts once in a finished chunk."""
        known = Counter[int]()
        with suppress(FileNotFoundError):  # the data set has just been finished
            names = sorted(os.listdir(self._work.folder / "probed"))
            for name in names:
                if name.endswith(".part"):
                    known[int(name[:6])] += self._read(name)
            for name in names:
                if name.endswith(".jsonl") and not name.startswith("."):
                    known[int(name[:6])] = self._work.files_in(int(name[:6]))
        return sum(min(lines, self._work.files_in(chunk)) for chunk, lines in known.items())

    def _read(self, name: str) -> int:
        """Returns the number of whole lines of one file of probe results so far."""
        file = self._files.setdefault(name, GrowingFile(self._work.folder / "probed" / name))
        self._lines[name] += sum(1 for _ in file.lines())
        return self._lines[name]


def last_words(log: Path) -> str:
    """Returns a log's last line that is not srun's or submitit's, without ``error:``; empty if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    own = [line for line in lines if line.strip() and not line.startswith(("srun: ", "submitit "))]
    return own[-1].strip().removeprefix("error: ") if own else ""
