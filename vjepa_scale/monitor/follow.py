"""Watch a run from a terminal: rank 0's output, and changes of its jobs.

Watching changes nothing: Ctrl-C ends the watching, not the run. A run takes weeks, so Slurm's controller is queried
seldom; the files are read all the time.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vjepa_scale.core.errors import EXIT_USER_ERROR, UserError
from vjepa_scale.core.files import GrowingFile
from vjepa_scale.core.installed import as_called, command
from vjepa_scale.core.log import shown
from vjepa_scale.monitor import jobs
from vjepa_scale.monitor.jobs import JobState, SlurmUnavailable
from vjepa_scale.monitor.states import ALIVE, RunStatus, StageStatus
from vjepa_scale.monitor.status import read_status, run_recipe
from vjepa_scale.recipe import stages_of

EXIT_INTERRUPTED = 130

LOGS_EVERY_S = 0.2
STATUS_EVERY_S = 2.0
# How long an answer of Slurm is good for.
ASK_WAITING_S, ASK_RUNNING_S, ASK_DEPENDANT_S, ASK_AGAIN_S = 5.0, 15.0, 60.0, 30.0
# A verdict that ends the watching is held back for this long where it may be early: another node's files may be
# seen late, and Slurm takes a moment to cancel dependants.
SURE_AFTER_S = 10.0
LAST_LINES = 10

Say = Callable[[str], Any]


def follow(run_folder: Path, *, stream: Say = print) -> int:
    """Show a run until its last launch is over.

    stream: gets every line, without its end
    Returns 0 if every stage of the launch is done, 2 if one failed by a user error, 1 if one failed
    otherwise or was cancelled, 130 after Ctrl-C. Raises UserError if there is no run, or none launched.
    """
    try:
        return _Follower(run_folder, stream).run()
    except KeyboardInterrupt:
        stream(f"no longer following; the run is not changed: {run_folder}")
        return EXIT_INTERRUPTED


def show_lines(log: GrowingFile, *, whole_lines: bool, only: str = "", stream: Say) -> None:
    """Give ``stream`` the new lines of a log, as ``core/log.py: shown`` shows them, without submitit's.

    whole_lines: leave out a last line without its end, which is still being written
    only:        those that begin with this then
    """
    for line in log.lines(whole=whole_lines):
        text = shown(line.decode("utf-8", errors="replace").rstrip("\r\n"))
        if text is not None and text.startswith(only) and not text.startswith("submitit "):
            stream(text)


class _PatientAsker:
    """jobs.slurm_job with a cache: an answer is reused as long as it is likely to be true."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, JobState | SlurmUnavailable | None]] = {}

    def __call__(self, job_id: str, *, name: str | None = None) -> JobState | None:
        known = self._answers.get(job_id)
        if known is None or time.monotonic() > known[0]:
            answer: JobState | SlurmUnavailable | None
            try:
                answer = jobs.slurm_job(job_id, name=name)
            except SlurmUnavailable as error:
                answer = error
            known = self._answers[job_id] = (time.monotonic() + _good_for(answer), answer)
        if isinstance(known[1], SlurmUnavailable):
            raise known[1]
        return known[1]

    def forget(self) -> None:
        """Something has changed: ask anew."""
        self._answers.clear()


def _good_for(answer: JobState | SlurmUnavailable | None) -> float:
    """Seconds."""
    if isinstance(answer, SlurmUnavailable):
        return ASK_AGAIN_S
    if answer is None or not jobs.is_alive(answer):
        return ASK_RUNNING_S
    if answer.reason == "Dependency":
        return ASK_DEPENDANT_S
    return ASK_WAITING_S if answer.state != "RUNNING" else ASK_RUNNING_S


class _Follower:
    """logs: as far as each has been shown. said: the last announcement of each stage; errors: its time."""

    def __init__(self, run_folder: Path, stream: Say) -> None:
        self.run_folder, self.stream = run_folder, stream
        self._stages = stages_of(run_recipe(run_folder))
        self.ask = _PatientAsker()
        self.logs: dict[Path, GrowingFile] = {}
        self.said: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.began = time.time()
        self.current: StageStatus | None = None
        self.verdict: tuple[int, float] | None = None
        self.problem: str | None = None

    def run(self) -> int:
        while True:
            status = read_status(self.run_folder, ask=self.ask)
            stages = of_last_launch(status)
            if not stages:
                raise UserError(
                    as_called("nothing of this run was launched by tools/launch.py"),
                    where=self.run_folder,
                    fix=f"{command('launch')} RECIPE",
                )
            self._announce(status, stages)
            verdict = _verdict(status, stages)
            if verdict is not None and self._is_sure(verdict, stages):
                self._copy_logs(whole_lines=False)
                return self._end(verdict, stages)
            look_again = time.monotonic() + STATUS_EVERY_S
            while time.monotonic() < look_again:
                self._copy_logs(whole_lines=True)
                time.sleep(LOGS_EVERY_S)

    # -- states ----------------------------------------------------------------------------------------

    def _announce(self, status: RunStatus, stages: list[StageStatus]) -> None:
        """Say what has changed since the last look, after the lines that came before it."""
        if status.problem != self.problem:
            self.problem = status.problem
            self.stream(f"Slurm does not answer: {status.problem}" if status.problem else "Slurm answers again")
        current = next((stage for stage in stages if stage.state != "done"), stages[-1])
        if self.current is None:
            self._skip_to_the_end(current)
        elif self.current.name != current.name:
            self._copy_logs(whole_lines=False)
            finished = [stage for stage in stages if stage.state == "done" and stage.name in self.said]
            for stage in finished:
                self._say(stage)
            self._skip_earlier_launches(current)
        self.current = current
        self._say_error(current)
        self._say(current)

    def _say_error(self, stage: StageStatus) -> None:
        """Say why an attempt failed after which another follows; the last one's error is said at the end."""
        error = stage.error
        if error is None or error.time is None or error.ended or stage.state not in ALIVE:
            return
        if self.began <= error.time and self.errors.get(stage.name) != error.time:
            self.errors[stage.name] = error.time
            self._copy_logs(whole_lines=True)
            self.stream(f"{stage.name}: an attempt failed: {error.who}")

    def _say(self, stage: StageStatus) -> None:
        text = _announcement(stage)
        if self.said.get(stage.name) != text:
            self._copy_logs(whole_lines=True)
            self.ask.forget()
            self.said[stage.name] = text
            self.stream(text)

    def _is_sure(self, verdict: int, stages: list[StageStatus]) -> bool:
        """Some ends are a row of the history; others are concluded from what is not there, or not there yet."""
        first = next((stage for stage in stages if stage.state != "done"), None)
        if first is None:
            return True
        if self.verdict is None or self.verdict[0] != verdict:
            self.verdict = verdict, time.monotonic()
            self.ask.forget()
            return False
        settled = first.state != "stopped" and not any(stage.state in ALIVE for stage in stages)
        return settled or time.monotonic() - self.verdict[1] >= SURE_AFTER_S

    def _end(self, verdict: int, stages: list[StageStatus]) -> int:
        for stage in stages:
            if stage.state == "cancelled":
                self._say(stage)
        for stage in stages:
            if stage.state in ("failed", "gave up", "stopped", "damaged"):
                print(f"error: {_what_failed(stage)}", file=sys.stderr, flush=True)
                break
        return verdict

    # -- logs ------------------------------------------------------------------------------------------

    def _logs(self, stage: StageStatus, kind: str = "out") -> list[Path]:
        """Rank 0's logs, oldest first. Slurm appends over requeues; locally each attempt has its own."""
        found = self._stages[stage.name].logs.glob(f"*_0_log.{kind}")
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def _is_of_this_launch(self, log: Path, stage: StageStatus) -> bool:
        if stage.cluster == "slurm":
            return log.name.startswith(f"{stage.job_id}_")
        return stage.submitted is not None and log.stat().st_mtime >= stage.submitted - 1

    def _skip_to_the_end(self, stage: StageStatus) -> None:
        """Of a stage that already runs, only the last lines are shown."""
        for path in (*self._logs(stage), *self._logs(stage, "err")):
            self._log(path).skip_all()
        if (logs := self._logs(stage)) and self._is_of_this_launch(logs[-1], stage):
            self._log(logs[-1]).skip_to_last(LAST_LINES)

    def _skip_earlier_launches(self, stage: StageStatus) -> None:
        for path in (*self._logs(stage), *self._logs(stage, "err")):
            if not self._is_of_this_launch(path, stage):
                self._log(path).skip_all()

    def _copy_logs(self, *, whole_lines: bool) -> None:
        if self.current is None:
            return
        for kind, only in (("err", "warning: "), ("out", "")):
            for path in self._logs(self.current, kind):
                show_lines(self._log(path), whole_lines=whole_lines, only=only, stream=self.stream)

    def _log(self, path: Path) -> GrowingFile:
        return self.logs.setdefault(path, GrowingFile(path))


def of_last_launch(status: RunStatus) -> list[StageStatus]:
    """The stages that the last launch is about, in their order."""
    return [stage for stage in status.stages if stage.launch is not None and stage.launch == status.launch]


def _verdict(status: RunStatus, stages: list[StageStatus]) -> int | None:
    """The exit code of a launch that is over; None while it is not."""
    if all(stage.state == "done" for stage in stages):
        return 0
    if any(stage.owner == "unknown" and stage.cluster == "slurm" and stage.state != "done" for stage in stages):
        return None  # Slurm does not answer: what looks like an end may be a restart
    for stage in stages:
        if stage.state in ("failed", "gave up", "stopped", "damaged"):
            mistake = stage.error is not None and stage.error.ended and stage.error.user_error
            return EXIT_USER_ERROR if mistake else 1
    return None if any(stage.state in ALIVE for stage in stages) else 1


def _announcement(stage: StageStatus) -> str:
    """One line about a stage, which stays the same as long as nothing changes."""
    job = f"Slurm job {stage.job_id}" if stage.cluster == "slurm" else ""
    reason = stage.detail.partition(", expected to start")[0]  # an estimate that changes all the time
    detail = f" ({reason})" if reason else ""
    if stage.state in ("pending", "starting", "running", "requeued"):
        again = f", attempt {stage.attempt}" if stage.attempt > 1 and stage.state == "running" else ""
        return f"{stage.name}: {f'{job} is ' if job else ''}{stage.state}{again}{detail}"
    if stage.state == "waiting":
        return f"{stage.name}: waiting {stage.detail}"
    return f"{stage.name}: {stage.state}{detail}"


def _what_failed(stage: StageStatus) -> str:
    """One line: stage, rank, exception, log."""
    error = stage.error if stage.error is not None and stage.error.ended else None
    parts = [f"{stage.name}: {error.who if error else stage.state}"]
    if stage.detail:
        parts.append(stage.detail)
    files = [("report", error.report), ("log", error.log)] if error else []
    parts += [f"{word} {path}" for word, path in [*files, ("log", stage.log)] if path][:2]
    return "; ".join(parts)


# -- one live line on a terminal, a line a minute in a log -------------------------------------------

# What rank 0 logs of a step (run/metrics.py): stage/phase, step of steps, figures.
_STEP = re.compile(r"(?P<stage>[^\s/]+)/(?P<phase>\S+)  step (?P<step>\d+)/(?P<last>\d+)  (?P<figures>.*)")
LOG_EVERY_S = 60.0


class LiveLines:
    """Prints the lines of rank 0, those of steps by what the output is.

    On a terminal a stage has one bar, which its step lines move. Anywhere else a step line is printed at most once a
    minute, and the last of a stage always. All other lines are printed as they are.
    """

    def __init__(self, output: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = sys.stdout if output is None else output
        self._clock = clock
        self._terminal = self._output.isatty()
        self._bar: tqdm | None = None
        self._stage = ""
        self._printed_at = -LOG_EVERY_S

    def __call__(self, line: str) -> None:
        """One line, without its end."""
        found = _STEP.fullmatch(line)
        if found is None:
            self._print(line)
        elif self._terminal:
            self._move(found)
        else:
            now = self._clock()
            if found["stage"] != self._stage or found["step"] == found["last"] or now - self._printed_at >= LOG_EVERY_S:
                self._stage, self._printed_at = found["stage"], now
                self._print(line)

    def close(self) -> None:
        """Close the bar at its present position."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move(self, found: re.Match[str]) -> None:
        if self._bar is None or found["stage"] != self._stage:
            self.close()
            self._stage = found["stage"]
            self._bar = tqdm(total=int(found["last"]), desc=self._stage, unit="step", file=self._output, ascii=" =")
            self._bar.initial = max(0, int(found["step"]) - 1)  # of a resumed stage: its rate is of its own steps
        self._bar.set_postfix_str(f"{found['phase']}  {' '.join(found['figures'].split())}", refresh=False)
        self._bar.update(int(found["step"]) - self._bar.n)
        if found["step"] == found["last"]:
            self.close()

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(line, file=self._output, flush=True)
        if self._bar is not None:
            self._bar.refresh()
