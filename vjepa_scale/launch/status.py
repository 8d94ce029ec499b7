"""What became of a run: every stage's state, from its files and, where one can be asked, from Slurm.

The files say what a stage did, Slurm says whether its job still waits or runs. Where Slurm does not answer the
files alone are read, and the answer says so. It does not import torch, so it answers at once.

The states of a stage:

    not launched   nobody has submitted it
    waiting        locally: an earlier stage of the same launch comes first
    pending        its job waits in Slurm's queue for the first time
    starting       it has processes or nodes, and has not trained yet
    running        it trains
    requeued       it has been interrupted or has failed, and is to go on by itself
    ending         this attempt is over, its job is not yet
    done           its last checkpoint is there
    failed         an error ended it
    gave up        it was not started again, for the reason that is given
    cancelled      by tools/launch.py cancel, in Slurm, or because a stage before it did not finish
    stopped        it ended before its last step, nothing goes on with it, and no error says why
"""

import json
import math
import re
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.launch import jobs
from vjepa_scale.launch.failures import worst_failure
from vjepa_scale.launch.jobs import JobState, SlurmUnavailable
from vjepa_scale.recipe import Recipe, load_recipe, resolve_phases
from vjepa_scale.recipe.folders import checkpoints_folder, failures_folder, logs_folder, stage_folder
from vjepa_scale.training.history import Attempt, Row, attempts

# As many of the last steps say how fast it goes; their rows fit in the last TAIL_BYTES of metrics.jsonl.
RECENT_STEPS = 50
TAIL_BYTES = 64 * 1024
# Without a step for this many usual ones, and this long, a running stage is said to stand still.
STILL_STEPS, STILL_S = 20.0, 300.0
WIDTH = 100

ALIVE = ("waiting", "pending", "starting", "running", "requeued", "ending")
_UNFINISHED_ENDS = ("failed", "gave up", "cancelled", "stopped")
_CHECKPOINT = re.compile(r"step_\d{8,}")

Ask = Callable[..., JobState | None]


@dataclass
class LastError:
    """The last error of a stage. ``ended``: the stage ended, or is ending, with it; otherwise it went on."""

    kind: str
    message: str
    rank: int | None = None
    step: int | None = None
    log: str | None = None
    report: str | None = None
    time: float | None = None
    user_error: bool = False
    ended: bool = False

    @property
    def who(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}: "
        step = "" if self.step is None else f" at step {self.step}"
        first_line = self.message.partition("\n")[0]
        return f"{rank}{self.kind}{step}: {first_line}" if first_line else f"{rank}{self.kind}{step}"


@dataclass
class StageStatus:
    """One stage. Steps are completed ones of the global step; times in seconds.

    detail:         why it is in its state
    without_a_word: it ended, or its last attempt did, with nothing written that says why
    owner:          "alive", "gone", or "unknown": its Slurm job or its local launcher
    attempt:        which attempt of this launch it is in, or was last; 0: none yet
    endings:        what ended the earlier ones
    first, last_step: the global step it begins at, and the one it is finished at
    step_s:         seconds per step, recently; eta_s: for the steps that are left, at this pace
    idle_s:         since its last step; still: that is far longer than a step takes
    """

    name: str
    state: str = "not launched"
    detail: str = ""
    without_a_word: bool = False
    owner: str = "unknown"
    cluster: str | None = None
    launch: str | None = None
    submitted: float | None = None
    job_id: str | None = None
    slurm: JobState | None = None
    attempt: int = 0
    endings: list[str] = field(default_factory=list)
    first: int | None = None
    step: int | None = None
    last_step: int | None = None
    loss: float | None = None
    clips_per_s: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    idle_s: float | None = None
    still: bool = False
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    error: LastError | None = None
    log: str | None = None


@dataclass
class RunStatus:
    """A run. ``problem``: what Slurm, or the shell, said instead of an answer."""

    run: str
    launched: float | None
    launch: str | None
    cluster: str | None
    commit: str | None
    dirty: bool | None
    problem: str | None
    stages: list[StageStatus]

    @property
    def exit_code(self) -> int:
        """1 if a stage failed, gave up or ended without a word, else 0."""
        return int(any(stage.state in ("failed", "gave up") or stage.without_a_word for stage in self.stages))

    @property
    def alive(self) -> list[str]:
        """The stages that somebody is still at work on, or will be."""
        return [stage.name for stage in self.stages if stage.state in ALIVE]


def read_status(run_folder: Path, *, ask: Ask = jobs.slurm_job) -> RunStatus:
    """Look at a run. Raises UserError if there is none.

    ask: what is asked about a Slurm job, as jobs.slurm_job is
    """
    recipe = run_recipe(run_folder)
    problem: str | None = None
    stages: list[StageStatus] = []
    for name in recipe.stages():
        reader = _StageReader(recipe, name)
        if reader.rows and not reader.finished and problem is None:
            try:
                reader.ask_slurm(ask)
            except SlurmUnavailable as error:
                problem = str(error)  # the others are not asked: each would wait for its time-out
        stages.append(reader.read(stages, problem))
    submitted = [stage for stage in stages if stage.submitted is not None]
    last = max(submitted, key=lambda stage: stage.submitted or 0.0, default=None)
    source = _json(run_folder / "launches" / last.launch / "source.json") if last and last.launch else {}
    if last is not None and last.cluster == "local":
        _judge_those_to_come(stages, last, source.get("stages", []))
    return RunStatus(
        run=str(run_folder),
        launched=min(stage.submitted or 0.0 for stage in submitted if stage.launch == last.launch) if last else None,
        launch=last.launch if last else None,
        cluster=last.cluster if last else next((stage.cluster for stage in stages if stage.cluster), None),
        commit=source.get("commit"),
        dirty=source.get("dirty"),
        problem=problem,
        stages=stages,
    )


def _judge_those_to_come(stages: list[StageStatus], last: StageStatus, planned: Sequence[str]) -> None:
    """The local loop submits a stage when its turn comes: until then only the launch's own list names it."""
    before: StageStatus | None = None
    for stage in stages:
        if stage.name not in planned:
            continue
        if stage.launch != last.launch and stage.state != "done":
            stage.launch, stage.cluster, stage.owner, stage.job_id = last.launch, last.cluster, last.owner, None
            stage.without_a_word, stage.attempt, stage.endings = False, 0, []
            if before is not None and before.state in _UNFINISHED_ENDS:
                stage.state, stage.detail = "cancelled", f"because {before.name} did not finish"
            elif before is not None and last.owner != "gone":
                stage.state, stage.detail = "waiting", f"for {before.name}"
            else:
                stage.state, stage.detail = "stopped", "the launcher ended before its turn came"
                stage.without_a_word = True
            if stage.error is not None:
                stage.error.ended = False
        before = stage


def run_recipe(run_folder: Path) -> Recipe:
    """The recipe of a run, with run.dir as the run is addressed now. Raises UserError if it is no run."""
    if not (run_folder / "recipe.yaml").is_file():
        raise UserError(
            "not a run folder: it has no recipe.yaml" if run_folder.is_dir() else "no such folder",
            where=run_folder,
            fix="give the run.dir of a recipe that was launched",
        )
    return load_recipe(run_folder / "recipe.yaml", [f"run.dir={json.dumps(str(run_folder))}"])


class _StageReader:
    """Collects what the files and Slurm say about one stage, and judges it."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.recipe, self.name, self.now = recipe, name, time.time()
        self.folder = stage_folder(recipe, name)
        path = self.folder / "history.jsonl"
        self.all_rows = _json_rows(path.read_bytes()) if path.exists() else []
        marks = [index for index, row in enumerate(self.all_rows) if row["event"] == "submitted"]
        self.submitted: Row | None = self.all_rows[marks[-1]] if marks else None
        self.rows = self.all_rows[marks[-1] :] if marks else self.all_rows  # of the last launch
        # `cancelled` is about the stage, not about an attempt: it may come before the attempt's own end.
        self.cancelled = next((row for row in self.rows if row["event"] == "cancelled"), None)
        self.attempts = attempts([row for row in self.rows if row["event"] != "cancelled"])
        self.job: JobState | None = None
        self.owner = "unknown"
        self.status = StageStatus(name)
        self._read_checkpoint()
        self._read_steps()

    # -- files ---------------------------------------------------------------------------------------

    def _read_checkpoint(self) -> None:
        """The newest checkpoint that looks whole, by its manifest and the sizes of its files, as store.newest_name."""
        status, folder = self.status, checkpoints_folder(self.recipe, self.name)
        names = [path.name for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
        manifest: dict[str, Any] = {}
        for name in sorted(names, key=lambda name: int(name[5:]), reverse=True):
            manifest = _json(folder / name / "manifest.json")
            if "step" in manifest and _is_whole(folder / name, manifest):
                status.checkpoint, status.checkpoint_step = name, manifest["step"]
                status.checkpoint_age_s = self.now - (folder / name / "manifest.json").stat().st_mtime
                break
            manifest = {}
        begun = [row["step"] for row in self.all_rows if row["event"] == "started" and row.get("kind") != "resume"]
        status.first = manifest.get("first", begun[-1] if begun else self._planned_first())
        if status.first is not None:
            status.last_step = resolve_phases(self.recipe, self.name, first=status.first)[-1].end
        self.finished = status.last_step is not None and status.checkpoint_step == status.last_step

    def _planned_first(self) -> int | None:
        before = self.recipe.stages()[self.name].continue_from
        if before is None or before in self.recipe.stages():
            return resolve_phases(self.recipe, self.name)[0].first
        return None  # of a checkpoint elsewhere: known when the stage has begun

    def _read_steps(self) -> None:
        """Step, loss and pace, from the end of metrics.jsonl."""
        status, path = self.status, self.folder / "metrics.jsonl"
        rows = [row for row in _json_rows(_tail(path)) if "step" in row][-RECENT_STEPS:]
        started = self.attempts[-1].started if self.attempts else None
        if started is not None:
            written = path.stat().st_mtime if rows else 0.0
            status.idle_s = max(0.0, self.now - max(written, started["time"]))
        if not rows:
            status.step = status.checkpoint_step
            return
        last = rows[-1]
        status.step, status.loss = last["step"] + 1, last["loss"]
        # One geometry only; and not an attempt's first step, which waits for the loader, if there is another.
        same = [row for row in rows if row["phase"] == last["phase"] and row["clips_per_s"] > 0]
        later = [row for row in same if started is None or row["step"] != started["step"]] or same
        batch = {phase.name: phase.global_batch for phase in resolve_phases(self.recipe, self.name)}.get(last["phase"])
        if later and batch:
            status.step_s = sum(batch / row["clips_per_s"] for row in later) / len(later)
            status.clips_per_s = batch / status.step_s

    def _error(self) -> LastError | None:
        """The last ``failed`` row; or, where an attempt ended before it was written, a rank's own report."""
        if (report := self._report()) is not None:
            return report
        failed = [row for row in self.all_rows if row["event"] == "failed"]
        return self._told(failed[-1], failed[-1]["time"]) if failed else None

    def _report(self) -> LastError | None:
        """What a rank left behind of an attempt whose end is in no row."""
        last = self.attempts[-1] if self.attempts else None
        if last is not None and (last.end is not None or last.later or last.started is None):
            return None
        if last is not None and last.started is not None:
            job = str(last.started.get("job"))
        elif self.submitted is not None:
            job = f"{self.submitted['job_id']}*"  # it failed before training: the rest of the name is not known
        else:
            return None
        try:
            told = worst_failure(failures_folder(self.recipe, self.name), job)
        except UserError:  # a report that cannot be read says nothing
            return None
        if told is None or (self.submitted and Path(told["report"]).stat().st_mtime < self.submitted["time"]):
            return None
        return self._told(told, Path(told["report"]).stat().st_mtime)

    def _told(self, row: dict[str, Any], when: float) -> LastError:
        """A ``failed`` row or a rank's report."""
        return LastError(
            kind=row.get("kind", "error"),
            message=row.get("message", ""),
            rank=row.get("rank"),
            step=row.get("step"),
            log=self._here(row.get("log"), logs_folder(self.recipe, self.name)),
            report=self._here(row.get("report"), failures_folder(self.recipe, self.name)),
            time=when,
            user_error=bool(row.get("user_error")),
        )

    def _here(self, recorded: object, folder: Path) -> str | None:
        """A recorded path, as it is now: the run may have been moved."""
        if not recorded:
            return None
        path = Path(str(recorded))
        here = folder / path.name
        return str(here if here.exists() or not path.exists() else path)

    # -- who runs it -----------------------------------------------------------------------------------

    def ask_slurm(self, ask: Ask) -> None:
        """Ask about its job, if it is Slurm's. Raises SlurmUnavailable."""
        started = self.attempts[-1].started if self.attempts else None
        if self.submitted is not None:
            if self.submitted["cluster"] != "slurm":
                return
            job_id, name = str(self.submitted["job_id"]), self.submitted.get("name")
        elif started is not None and re.fullmatch(r"\d+\.\d+-\d+", started.get("job", "")):
            job_id, name = started["job"].partition(".")[0], None  # by a site's own sbatch script
        else:
            return
        self.job = ask(job_id, name=name)
        self.owner = "alive" if self.job is not None and jobs.is_alive(self.job) else "gone"

    def _ask_this_machine(self) -> None:
        if self.submitted is not None and self.submitted["cluster"] == "local":
            alive = jobs.local_launcher(self.submitted)
            self.owner = "unknown" if alive is None else "alive" if alive else "gone"

    def _orphaned(self) -> bool:
        """Do its local processes train on without their launcher?"""
        started = self.attempts[-1].started if self.attempts else None
        return self.owner == "gone" and started is not None and jobs.rank_starter(started) is not None

    # -- the answer --------------------------------------------------------------------------------------

    def read(self, earlier: Sequence[StageStatus], problem: str | None) -> StageStatus:
        status = self.status
        if not self.finished:
            self._ask_this_machine()
        status.owner, status.slurm = self.owner, self.job
        if self.submitted is not None:
            launch = self.submitted.get("launch")
            status.cluster, status.submitted = self.submitted["cluster"], self.submitted["time"]
            status.launch = None if launch is None else Path(str(launch)).name
        # Slurm's job keeps its id; locally every attempt has one of its own.
        having = [row for row in self.rows if row["event"] in ("submitted", "started", "requeued") and "job_id" in row]
        job_id = having[0 if status.cluster == "slurm" else -1]["job_id"] if having else None
        status.job_id = None if job_id is None else str(job_id)
        if self.job is not None and status.cluster is None:
            status.cluster = "slurm"
        if job_id is not None:
            log = logs_folder(self.recipe, self.name) / f"{job_id}_0_log.out"
            status.log = str(log) if log.exists() else None
        self._count_attempts()
        status.error = self._error()
        # Its dependants wait for the stage before it in the same launch.
        before = next((other for other in reversed(earlier) if other.launch == status.launch), None)
        status.state, status.detail = self._judged(before)
        if problem is not None and self.owner == "unknown" and status.state in (*ALIVE, "stopped"):
            status.detail = "; ".join(filter(None, [status.detail, "by its files"]))
        if status.error is not None:
            current = self.submitted is None or (status.error.time or 0) >= self.submitted["time"]
            last = self.attempts[-1] if self.attempts else None
            by_error = last is None or last.end is None or last.end["event"] == "failed"
            status.error.ended = current and (
                status.state in ("failed", "gave up") or (status.state == "ending" and by_error)
            )
        if status.state == "running":
            if status.step_s is not None and status.last_step is not None and status.step is not None:
                status.eta_s = max(0, status.last_step - status.step) * status.step_s
            idle = status.idle_s
            status.still = idle is not None and idle > max(STILL_S, STILL_STEPS * (status.step_s or 0.0))
        return status

    def _count_attempts(self) -> None:
        status, tries = self.status, self.attempts
        restarts = self.job.restarts if self.job is not None and self.job.restarts else 0
        status.attempt = max(len(tries), restarts + 1 if tries or restarts else 0)
        over = [attempt for attempt in tries if attempt.end is not None or attempt.later or attempt is not tries[-1]]
        if tries and tries[-1] not in over and not self._is_current(tries[-1]) and restarts:
            over.append(tries[-1])
        status.endings = [_ending(attempt) for attempt in over]
        # Starts that only Slurm knows of: they ended before anything was written.
        status.endings += ["ended without a word"] * max(0, restarts - len(over))

    def _is_current(self, attempt: Attempt) -> bool:
        """Is this attempt of the job's present start? Slurm's restart count tells, else the clock."""
        if self.job is None:
            return True
        if attempt.started is not None and self.job.restarts is not None:
            named = re.fullmatch(r"(\d+)\.\d+-(\d+)", attempt.started.get("job", ""))
            if named and named[1] == self.job.job_id:
                return int(named[2]) == self.job.restarts and self.job.state not in jobs.WAITING
        row = attempt.started or attempt.end
        began = self.job.start_time
        return row is None or began is None or row["time"] >= began

    def _judged(self, before: StageStatus | None) -> tuple[str, str]:
        """State and detail."""
        if self.finished:
            return "done", ""
        if not self.rows:
            return "not launched", ""
        if self.owner == "alive":
            return self._judged_in_slurm(before) if self.job is not None else self._judged_here(before)
        if self._orphaned():
            return "running", "its launcher has ended: nothing will start it again, or the stage after it"
        return self._judged_by_files(before)

    def _judged_in_slurm(self, before: StageStatus | None) -> tuple[str, str]:
        job = self.job
        assert job is not None
        if job.state in jobs.WAITING:
            reason = _waits(job, before, self.now)
            if self.cancelled is not None:
                return "ending", f"was cancelled, and Slurm still has its job ({reason})"
            if self.attempts or job.restarts:
                return "requeued", f"{self._last_ending()}; {reason}"
            return "pending", reason
        if job.state in jobs.PREPARING:
            return "starting", "Slurm prepares its nodes"
        nodes = f"on {job.nodes}" if job.nodes else ""
        last = self.attempts[-1] if self.attempts else None
        if job.state in jobs.ENDING or self.cancelled is not None:
            return "ending", "was cancelled" if self.cancelled is not None else self._last_ending()
        if last is None or not self._is_current(last):
            return "starting", nodes
        if last.end is not None or last.later:
            return "ending", _ending(last)
        if (report := self._report()) is not None:
            return "ending", report.who
        return "running", "; ".join(filter(None, [nodes, "Slurm has suspended it" * (job.state in jobs.HALTED)]))

    def _judged_here(self, before: StageStatus | None) -> tuple[str, str]:
        """Its launcher lives, on this machine."""
        last = self.attempts[-1] if self.attempts else None
        if self.cancelled is not None:
            return "ending", "was cancelled"
        if last is None:
            if before is not None and before.state != "done":
                return "waiting", f"for {before.name}"
            return "starting", ""
        if (gave_up := self._gave_up()) is not None:
            return gave_up
        if last.later:
            return "requeued", self._last_ending()
        if last.end is not None:
            return "ending", _ending(last)
        return "running", ""

    def _gave_up(self) -> tuple[str, str] | None:
        """No other attempt was made: by a rule, or because an error is the user's to mend."""
        last = self.attempts[-1] if self.attempts else None
        if last is None or not last.later or last.later[-1]["event"] != "gave_up":
            return None
        reason = str(last.later[-1].get("reason", ""))
        if last.end is not None and last.end.get("user_error"):
            return "failed", reason
        interrupted = last.end is not None and last.end["event"] == "interrupted"
        return "gave up", f"{_ending(last)}; {reason}" if interrupted else reason

    def _judged_by_files(self, before: StageStatus | None) -> tuple[str, str]:
        """Nobody is at work on it, or nobody can say."""
        last = self.attempts[-1] if self.attempts else None
        if self.cancelled is not None:
            saved = self.status.checkpoint
            return "cancelled", f"at {_clock(self.cancelled['time'], self.now)}" + (f", saved {saved}" if saved else "")
        if (gave_up := self._gave_up()) is not None:
            return gave_up
        if last is not None and last.end is not None and last.end["event"] == "failed" and not last.later:
            return "failed", ""  # the error is told by itself
        if self.owner == "unknown":
            return self._judged_unasked(last)
        if self._report() is not None:
            return "failed", ""
        in_slurm = self._slurms_word()
        if self.job is not None and self.job.state == "CANCELLED":
            if last is None and (self.job.reason.startswith("Dependency") or _failed_before(before)):
                return "cancelled", f"because {before.name} did not finish" if before else self.job.reason
            return "cancelled", "; ".join(filter(None, ["in Slurm, not by tools/launch.py", self._last_ending()]))
        if last is None:
            if _failed_before(before):
                assert before is not None
                return "cancelled", f"because {before.name} did not finish"
            self.status.without_a_word = True
            return "stopped", f"ended without a word before its first step{in_slurm}"
        if last.later:
            self.status.without_a_word = True
            return "stopped", f"{self._last_ending()}; was to be started again, but is not{in_slurm}"
        if last.end is not None:
            return "stopped", f"{_ending(last)}; was not started again{in_slurm}"
        self.status.without_a_word = True
        at = "" if self.status.step is None else f" after step {self.status.step}"
        return "stopped", f"ended without a word{at}{in_slurm}"

    def _judged_unasked(self, last: Attempt | None) -> tuple[str, str]:
        where = ""
        if self.submitted is not None and self.submitted["cluster"] == "local":
            where = f"on {self.submitted.get('host')}: whether its launcher lives can only be seen there"
        if last is None:
            return ("pending" if self.submitted is None or self.submitted["cluster"] == "slurm" else "starting"), where
        if last.later:
            return "requeued", "; ".join(filter(None, [self._last_ending(), where]))
        if last.end is not None:
            return "stopped", "; ".join(filter(None, [_ending(last), where]))
        idle, usual = self.status.idle_s, self.status.step_s or 0.0
        if self.submitted is None and idle is not None and idle > max(STILL_S, STILL_STEPS * usual):
            self.status.without_a_word = True
            return "stopped", f"no step for {_duration(idle)}, and nothing says that it still runs"
        return "running", where or ("not started by tools/launch.py" if self.submitted is None else "")

    def _last_ending(self) -> str:
        endings = self.status.endings
        if self.attempts and (self.attempts[-1].end is not None or self.attempts[-1].later):
            return _ending(self.attempts[-1])
        return endings[-1] if endings else ""

    def _slurms_word(self) -> str:
        """Slurm's name for how it ended, in brackets."""
        if self.submitted is None or self.submitted["cluster"] != "slurm":
            return "" if self.job is None else f" (Slurm: {self.job.state})"
        if self.job is None:
            return " (Slurm no longer knows its job)"
        code = f", exit code {self.job.exit_code}" if self.job.exit_code not in ("", "0:0") else ""
        reason = f", {self.job.reason}" if self.job.reason not in ("", "NonZeroExitCode") else ""
        return f" (Slurm: {self.job.state}{reason}{code})"


def _ending(attempt: Attempt) -> str:
    """What ended an attempt, in a few words."""
    end = attempt.end
    if end is None:
        at = "" if attempt.saved is None else f" after saving step {attempt.saved}"
        told = next((row["reason"] for row in attempt.later if row.get("reason")), None)
        return str(told) if told else f"ended without a word{at}"
    if end["event"] == "interrupted":
        return f"{end.get('signal', 'a signal')}, saved at step {end.get('step')}"
    if end["event"] == "failed":
        at = "" if end.get("step") is None else f" at step {end['step']}"
        rank = "" if end.get("rank") is None else f" of rank {end['rank']}"
        return f"{end.get('kind', 'error')}{rank}{at}"
    return str(end["event"])


def _waits(job: JobState, before: StageStatus | None, now: float) -> str:
    """Why Slurm does not start a job, and when it expects to."""
    if job.reason == "Dependency" and before is not None:
        return f"waits for {before.name}"
    expected = job.start_time is not None and job.start_time > now
    return (job.reason or job.state) + (f", expected to start {_clock(job.start_time or 0, now)}" if expected else "")


def _failed_before(before: StageStatus | None) -> bool:
    return before is not None and before.state in _UNFINISHED_ENDS


# -- files of others -----------------------------------------------------------------------------------


def _tail(path: Path) -> bytes:
    """Whole lines from the end of a file: it may have a row for each of a million steps."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        content = file.read()
    return content if size <= TAIL_BYTES else content.partition(b"\n")[2]


def _json_rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of JSON lines. One that a kill or a full disk cut short is left out: it was never finished."""
    rows = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where there is none, or not yet."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_whole(checkpoint: Path, manifest: dict[str, Any]) -> bool:
    try:
        return all((checkpoint / name).stat().st_size == told["bytes"] for name, told in manifest["files"].items())
    except (OSError, KeyError):
        return False


# -- for people ----------------------------------------------------------------------------------------


def as_json(status: RunStatus) -> str:
    """Everything, for programs."""
    content = asdict(status) | {"exit_code": status.exit_code, "time": time.time()}
    return json.dumps(_finite(content), indent=1)


def _finite(value: Any) -> Any:
    """JSON has no word for a loss that is not a number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(status: RunStatus) -> str:
    """A line about the run, then a line per stage with what there is to say below it."""
    now = time.time()
    lines = [_headline(status, now)]
    if status.problem is not None:
        lines += _wrapped(f"Slurm does not answer ({status.problem}): this is from the run's files", "")
    table = [["stage", "state", "job", "step", "loss", "clips/s", "left*", "checkpoint"]]
    table += [_cells(stage) for stage in status.stages]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row, stage in zip(table, [None, *status.stages], strict=True):
        cells = [
            cell.rjust(width) if column in (3, 4, 5, 6) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if stage is not None:
            indent = " " * (widths[0] + 2)
            for remark in _remarks(stage, now):
                lines += _wrapped(remark, indent)
            lines += [f"{indent}  {path}" for path in _paths(stage)]  # whole, to be copied
    if any(stage.eta_s is not None for stage in status.stages):
        lines.append("* at the pace of the last steps; a phase of another geometry takes its own time")
    return "\n".join(lines)


def _headline(status: RunStatus, now: float) -> str:
    if status.launched is None:
        return f"{status.run}: never launched by tools/launch.py"
    folder = f" (launches/{status.launch})" if status.launch else ""
    commit = ""
    if status.commit:
        commit = f", commit {status.commit[:10]}" + (" with local changes" if status.dirty else "")
    return f"{status.run}: launched {_clock(status.launched, now)}{folder} on {status.cluster}{commit}"


def _cells(stage: StageStatus) -> list[str]:
    return [
        stage.name,
        stage.state,
        stage.job_id or "-",
        f"{'-' if stage.step is None else stage.step}/{'?' if stage.last_step is None else stage.last_step}",
        "-" if stage.loss is None else f"{stage.loss:.4f}",
        "-" if stage.clips_per_s is None else f"{stage.clips_per_s:.1f}",
        "-" if stage.eta_s is None else _duration(stage.eta_s),
        "-" if stage.checkpoint is None else f"{stage.checkpoint}, {_duration(stage.checkpoint_age_s or 0.0)} ago",
    ]


def _remarks(stage: StageStatus, now: float) -> list[str]:
    out = [stage.detail] if stage.detail else []
    if stage.still:
        out.append(f"running, but no step for {_duration(stage.idle_s or 0.0)}")
    if stage.attempt > 1 or (stage.endings and stage.state in ALIVE):
        # Weeks of time limits are one item, not hundreds.
        grouped = Counter(ending.partition(", saved")[0].partition(" at step")[0] for ending in stage.endings)
        causes = ", ".join(what if count == 1 else f"{count} × {what}" for what, count in grouped.items())
        causes = causes.replace("ended without a word", "an end without a word")
        out.append(f"attempt {stage.attempt}" + (f", after {causes}" if causes else ""))
    error = stage.error
    if error is not None and stage.state != "done":
        when = f" ({_clock(error.time, now)})" if error.time is not None else ""
        out.append(("error: " if error.ended else "an earlier error: ") + error.who + when)
    return out


def _paths(stage: StageStatus) -> list[str]:
    """Where an error is told in full."""
    if stage.error is None or stage.state == "done":
        return []
    told = (("log", stage.error.log), ("report", stage.error.report))
    return [f"{word} {path}" for word, path in told if path]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}" if seconds < 10 * size else f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def _clock(when: float, now: float) -> str:
    """A local time; with its date if it is another day's."""
    moment = datetime.fromtimestamp(when)
    same_day = moment.date() == datetime.fromtimestamp(now).date()
    return moment.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M")
