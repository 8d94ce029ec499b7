"""The status of a run and of its stages, as ``status.read_status`` returns it.

The states of a stage:

    not launched   it was never submitted
    waiting        on one machine: for an earlier stage of the same launch
    pending        its job waits in Slurm's queue for the first time
    starting       it has processes or nodes, and has not trained yet
    running        it trains
    requeued       it was interrupted or failed, and will be started again
    ending         the attempt is over, its job is not
    done           its last checkpoint is there
    damaged        it was done, but its last checkpoint, or a probe's result, is damaged or gone
    failed         an error ended it
    gave up        it was not started again; the reason is given
    cancelled      by tools/launch.py cancel, in Slurm, or because a stage before it did not finish
    stopped        it ended before its last step, no job runs it, and no error is recorded
"""

from dataclasses import dataclass, field
from datetime import datetime

from vjepa_scale.monitor.jobs import JobState

ALIVE = ("waiting", "pending", "starting", "running", "requeued", "ending")
UNFINISHED_ENDS = ("failed", "gave up", "cancelled", "stopped", "damaged")


@dataclass
class LastError:
    """The last error of a stage. ``ended``: the stage ended, or is ending, with it; otherwise it continued."""

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
        """One line: rank, exception, step, message."""
        first_line = self.message.partition("\n")[0]
        rank = "" if self.rank is None or first_line.startswith("rank ") else f"rank {self.rank}: "
        step = "" if self.step is None else f" at step {self.step}"
        return f"{rank}{self.kind}{step}: {first_line}" if first_line else f"{rank}{self.kind}{step}"


@dataclass
class BestCheckpoint:
    """The best of a stage's evaluated checkpoints (checkpoint/evaluations.py). Accuracies: 0 … 1

    words:     its results as text
    evaluated: number of checkpoints with comparable results, itself included
    """

    checkpoint: str
    step: int
    words: str
    evaluated: int
    knn: float | None = None
    linear: float | None = None
    effective_rank: float | None = None
    held_out_loss: float | None = None


@dataclass
class StageStatus:
    """One stage. Steps are completed ones of the global step; times in seconds.

    detail:         why it is in its state
    without_a_word: it ended, or its last attempt did, without a recorded reason
    owner:          "alive", "gone", or "unknown": its Slurm job or its local launcher
    attempt:        which attempt of this launch it is in, or was last; 0: none yet
    endings:        what ended the earlier ones
    first, last_step: the global step it begins at, and the one it is finished at
    step_s:         seconds per step, recently; eta_s: for the remaining steps, at this rate
    signs:          of a collapse, in its last attempt
    stragglers:     ranks that hold up the others now, in words
    spikes:         in all its attempts, in words
    idle_s:         since its last step, or since its attempt's start where there is no_step_yet
    late:           it runs, and has been idle for longer than its steps take; still: for much longer
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
    no_step_yet: bool = False
    late: bool = False
    still: bool = False
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    best: BestCheckpoint | None = None
    signs: list[str] = field(default_factory=list)
    stragglers: list[str] = field(default_factory=list)
    spikes: str | None = None
    error: LastError | None = None
    log: str | None = None


@dataclass
class RunStatus:
    """A run. ``problem``: the error message of Slurm, or of the shell, if Slurm does not answer."""

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
        """1 if a stage failed, gave up, is damaged, or ended without a recorded error, else 0."""
        bad = ("failed", "gave up", "damaged")
        return int(any(stage.state in bad or stage.without_a_word for stage in self.stages))

    @property
    def alive(self) -> list[str]:
        """The stages that run, or will run."""
        return [stage.name for stage in self.stages if stage.state in ALIVE]


def duration(seconds: float) -> str:
    """90 s, 2.5 min, 3.0 h, 12 days: at most two significant digits."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}" if seconds < 10 * size else f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def clock(when: float, now: float) -> str:
    """A local time; with its date if it is not today's."""
    moment = datetime.fromtimestamp(when)
    same_day = moment.date() == datetime.fromtimestamp(now).date()
    return moment.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M")
