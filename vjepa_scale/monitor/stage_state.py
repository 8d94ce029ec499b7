"""The state of a stage, from its files, from its job or launcher, and from the stage before it."""

import re
from collections.abc import Callable

from vjepa_scale.core.installed import as_called
from vjepa_scale.monitor import jobs
from vjepa_scale.monitor.jobs import JobState
from vjepa_scale.monitor.stage_files import StageFiles, is_over
from vjepa_scale.monitor.states import ALIVE, UNFINISHED_ENDS, StageStatus, clock, duration
from vjepa_scale.run.events import Attempt

# Without a step for this many usual ones, and this long, a running stage is reported as still.
STILL_STEPS, STILL_S = 20.0, 300.0
# Without a step for this many usual ones, and this long, its rate is no longer its rate. A save may take as long.
LATE_STEPS, LATE_S = 5.0, 60.0

Ask = Callable[..., JobState | None]
# State and detail, as in StageStatus.
Judgement = tuple[str, str]


def who_runs(files: StageFiles, ask: Ask) -> tuple[str, JobState | None]:
    """Is its Slurm job, or its launcher on this machine, "alive", "gone" or "unknown"? And what Slurm says of the job.

    Raises SlurmUnavailable.
    """
    submitted, started = files.submitted, files.last.started if files.last else None
    if submitted is not None and submitted["cluster"] == "local":
        alive = jobs.local_launcher(submitted)
        return ("unknown" if alive is None else "alive" if alive else "gone"), None
    if submitted is not None:
        job_id, name = str(submitted["job_id"]), submitted.get("name")
    elif started is not None and _slurm_restart(started["job"]) is not None:
        job_id, name = started["job"].partition(".")[0], None  # by a site's own sbatch script
    else:
        return "unknown", None
    job = ask(job_id, name=name)
    return ("alive" if job is not None and jobs.is_alive(job) else "gone"), job


def judge_stage(
    files: StageFiles, owner: str, job: JobState | None, *, before: StageStatus | None, unanswered: bool
) -> StageStatus:
    """The whole status of a stage.

    owner, job: from who_runs
    before:     the stage before it in the same launch
    unanswered: Slurm did not answer, about this stage or another
    """
    status = files.status
    status.owner, status.slurm = owner, job
    if job is not None and status.cluster is None:
        status.cluster = "slurm"
    status.state, status.detail = _Judge(files, before).judge()
    if unanswered and owner == "unknown" and status.state in (*ALIVE, "stopped"):
        status.detail = _joined(status.detail, "by its files")
    if status.error is not None:
        status.error.ended = files.ended_by_error and status.state in ("failed", "gave up", "ending")
    if status.state == "running":
        status.still, status.late = _stands_still(status), _is_late(status)
        if status.late:
            status.clips_per_s = None
        elif status.step_s is not None and status.last_step is not None and status.step is not None:
            status.eta_s = max(0, status.last_step - status.step) * status.step_s
    return status


def judge_stage_to_come(stage: StageStatus, before: StageStatus | None, current: StageStatus) -> None:
    """Judge a stage that its local launch has not reached: it has files of an earlier launch only.

    before:  the stage before it in this launch
    current: the stage that this launch reached last
    """
    stage.launch, stage.cluster, stage.owner, stage.job_id = current.launch, current.cluster, current.owner, None
    stage.without_a_word, stage.attempt, stage.endings = False, 0, []
    if before is not None and before.state in UNFINISHED_ENDS:
        stage.state, stage.detail = "cancelled", f"because {before.name} did not finish"
    elif before is not None and current.owner != "gone":
        stage.state, stage.detail = "waiting", f"for {before.name}"
    else:
        stage.state, stage.detail = "stopped", "the launcher ended before this stage"
        stage.without_a_word = True
    if stage.error is not None:
        stage.error.ended = False


class _Judge:
    """Fills attempt, endings and without_a_word of a status that knows its owner."""

    def __init__(self, files: StageFiles, before: StageStatus | None) -> None:
        self.files, self.status, self.before = files, files.status, before
        self.job, self.last = self.status.slurm, files.last
        self.in_slurm = files.submitted is None or files.submitted["cluster"] == "slurm"

    def judge(self) -> Judgement:
        self._count_attempts()
        if self.files.finished:
            return "done", ""
        if not self.files.rows:
            return "not launched", ""
        if self.status.owner == "alive":
            return self._in_slurm(self.job) if self.job is not None else self._here()
        if self._was_done():
            again = f": the same launch trains it again from {self.status.checkpoint}" if self.status.checkpoint else ""
            return "damaged", f"its last checkpoint is damaged or gone{again}"
        if self._orphaned():
            return "running", "its launcher has ended: neither this stage nor the next will be started again"
        return self._by_files()

    def _was_done(self) -> bool:
        """Does its history have the end that its recipe has now?"""
        end = self.last.end if self.last is not None else None
        return end is not None and end["event"] == "done" and end["step"] == self.status.last_step

    # -- attempts ----------------------------------------------------------------------------------------

    def _count_attempts(self) -> None:
        tries = self.files.attempts
        restarts = (self.job.restarts or 0) if self.job is not None else 0
        self.status.attempt = max(len(tries), restarts + 1 if tries or restarts else 0)
        over = [attempt for attempt in tries if is_over(attempt) or not self._is_current(attempt)]
        self.status.endings = [_ending(attempt) for attempt in over]
        # Starts that only Slurm knows of: they ended before anything was written.
        self.status.endings += ["ended without an error message"] * max(0, restarts - len(over))

    def _is_current(self, attempt: Attempt) -> bool:
        """Is it the last one, and of the job's present start?"""
        if attempt is not self.last:
            return False
        row = attempt.started or attempt.end
        restart = _slurm_restart(row.get("job", "")) if row is not None else None
        if restart is None or self.job is None or self.job.restarts is None:
            return True
        # More than Slurm says: follow remembers an answer of it for some seconds.
        return restart >= self.job.restarts and self.job.state not in jobs.WAITING

    def _last_ending(self) -> str:
        if self.last is not None and is_over(self.last):
            return _ending(self.last)
        return self.status.endings[-1] if self.status.endings else ""

    def _orphaned(self) -> bool:
        """Do its local processes train on without their launcher?"""
        started = self.last.started if self.last is not None else None
        return self.status.owner == "gone" and started is not None and jobs.rank_starter(started) is not None

    # -- it has a job or a launcher ------------------------------------------------------------------------

    def _in_slurm(self, job: JobState) -> Judgement:
        cancelled, last = self.files.cancelled is not None, self.last
        if job.state in jobs.WAITING:
            reason = self._waits(job)
            if cancelled:
                return "ending", f"was cancelled, and Slurm still has its job ({reason})"
            if last is not None or job.restarts:
                return "requeued", _joined(self._last_ending(), reason)
            return "pending", reason
        if job.state in jobs.PREPARING:
            return "starting", "Slurm prepares its nodes"
        nodes = f"on {job.nodes}" if job.nodes else ""
        if job.state in jobs.ENDING or cancelled:
            return "ending", "was cancelled" if cancelled else self._last_ending()
        if last is None or not self._is_current(last):
            return "starting", nodes
        if is_over(last):
            return "ending", _ending(last)
        if self.files.report is not None:
            return "ending", self.files.report.who
        return "running", _joined(nodes, "Slurm has suspended it" if job.state in jobs.HALTED else "")

    def _waits(self, job: JobState) -> str:
        """Why Slurm does not start a job, and when it expects to."""
        if job.reason == "Dependency" and self.before is not None:
            return f"waits for {self.before.name}"
        reason, expected = job.reason or job.state, job.start_time or 0.0
        later = expected > self.files.now
        return f"{reason}, expected to start {clock(expected, self.files.now)}" if later else reason

    def _here(self) -> Judgement:
        """Its launcher lives, on this machine."""
        last, before = self.last, self.before
        if self.files.cancelled is not None:
            return "ending", "was cancelled"
        if last is None:
            if before is not None and before.state != "done":
                return "waiting", f"for {before.name}"
            return "starting", ""
        if (gave_up := self._gave_up()) is not None:
            return gave_up
        if last.later:
            return "requeued", self._last_ending()
        return ("ending", _ending(last)) if last.end is not None else ("running", "")

    # -- it has none, or that is not known ---------------------------------------------------------------

    def _by_files(self) -> Judgement:
        last, cancelled = self.last, self.files.cancelled
        if cancelled is not None:
            saved = f", saved {self.status.checkpoint}" if self.status.checkpoint else ""
            return "cancelled", f"at {clock(cancelled['time'], self.files.now)}{saved}"
        if (gave_up := self._gave_up()) is not None:
            return gave_up
        if last is not None and last.end is not None and last.end["event"] == "failed" and not last.later:
            return "failed", ""  # the error is reported separately
        if self.status.owner == "unknown":
            return self._unasked()
        because = f"because {self.before.name} did not finish" if self.before is not None else ""
        failed_before = self.before is not None and self.before.state in UNFINISHED_ENDS
        if self.job is not None and self.job.state == "CANCELLED":
            if last is None and (self.job.reason.startswith("Dependency") or failed_before):
                return "cancelled", because or self.job.reason
            return "cancelled", _joined(as_called("in Slurm, not by tools/launch.py"), self._last_ending())
        if self.files.report is not None:
            return "failed", ""
        if last is None and failed_before:
            return "cancelled", because
        return self._stopped()

    def _stopped(self) -> Judgement:
        last, slurm_reason = self.last, self._slurms_word()
        if last is not None and last.end is not None and not last.later:
            return "stopped", f"{_ending(last)}; was not started again{slurm_reason}"
        self.status.without_a_word = True
        if last is None:
            return "stopped", f"ended without an error message before its first step{slurm_reason}"
        if last.later:
            return "stopped", f"{self._last_ending()}; should have been started again, but was not{slurm_reason}"
        at = "" if self.status.step is None else f" after step {self.status.step}"
        return "stopped", f"ended without an error message{at}{slurm_reason}"

    def _gave_up(self) -> Judgement | None:
        """No other attempt was made: by a rule, or because of a user error."""
        last = self.last
        if last is None or not last.later or last.later[-1]["event"] != "gave_up":
            return None
        reason = str(last.later[-1]["reason"])
        if last.end is not None and last.end["event"] == "failed":
            return ("failed" if last.end["user_error"] else "gave up"), reason
        return "gave up", _joined(_ending(last), reason)

    def _unasked(self) -> Judgement:
        """By its files alone."""
        last, submitted, where = self.last, self.files.submitted, ""
        if not self.in_slurm and submitted is not None:
            where = f"on {submitted.get('host')}: whether its launcher lives can only be seen there"
        if last is None:
            return ("pending" if self.in_slurm else "starting"), where
        if last.later:
            return "requeued", _joined(self._last_ending(), where)
        if last.end is not None:
            return "stopped", _joined(_ending(last), where)
        if submitted is None and self.files.report is not None:
            return "failed", ""  # of torchrun: whether that starts it again, only it knows
        if submitted is None and _stands_still(self.status):
            self.status.without_a_word = True
            idle = duration(self.status.idle_s or 0.0)
            return "stopped", f"no step for {idle}, and nothing says that it still runs"
        return "running", where or (as_called("not started by tools/launch.py") if submitted is None else "")

    def _slurms_word(self) -> str:
        """Slurm's name for how it ended, in brackets."""
        if self.job is None:
            launched = self.files.submitted is not None and self.in_slurm
            return " (Slurm no longer knows its job)" if launched else ""
        code = f"exit code {self.job.exit_code}" if self.job.exit_code not in ("", "0:0") else ""
        reason = self.job.reason if self.job.reason != "NonZeroExitCode" else ""
        return f" (Slurm: {', '.join(filter(None, [self.job.state, reason, code]))})"


def _ending(attempt: Attempt) -> str:
    """What ended an attempt, in a few words."""
    end = attempt.end
    if end is None:
        at = "" if attempt.saved is None else f" after saving step {attempt.saved}"
        reason = next((row["reason"] for row in attempt.later if row.get("reason")), None)
        return str(reason) if reason else f"ended without an error message{at}"
    if end["event"] == "interrupted":
        saved = "before the first step" if end["step"] is None else f"saved at step {end['step']}"
        return f"{end['signal']}, {saved}"
    if end["event"] == "failed":
        at = "" if end["step"] is None else f" at step {end['step']}"
        rank = "" if end["rank"] is None else f" of rank {end['rank']}"
        return f"{end['kind']}{rank}{at}"
    return str(end["event"])


def _slurm_restart(job: str) -> int | None:
    """Which start of a Slurm job this is, by Ranks.job or a pattern for it; None for another kind of job."""
    named = re.fullmatch(r"\d+\.(?:\d+|\*)-(\d+)", job)
    return int(named[1]) if named else None


def _stands_still(status: StageStatus) -> bool:
    return status.idle_s is not None and status.idle_s > max(STILL_S, STILL_STEPS * (status.step_s or 0.0))


def _is_late(status: StageStatus) -> bool:
    return (status.idle_s or 0.0) > max(LATE_S, LATE_STEPS * (status.step_s or 0.0))


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
