"""Runs a rank as the child of a small process, which can tell of its end when the rank cannot.

The process that the cluster manager has started forks before PyTorch is imported and before there are threads. The
child is the rank. The parent, its supervisor, waits for it, passes signals on, and ends as it ends: the same value,
exception or exit code. It writes a report (run/failures.py)

- if a signal ends the rank: the rank itself writes nothing then;
- if the rank's progress (run/progress.py) stops for longer than its limit, also where the rank is stopped or holds
  Python's lock. Then it ends the rank;
- if the rank makes no progress and a peer has failed: then the rank waits in a collective, maybe for ever;
- if the rank makes no progress and the job is told to end: the rank may be killed before anything else is known of it.

So a job ends soon after one of its ranks, also where no launcher ends the others. While steps take less than LOOK_S
seconds, or as long as usual, a supervisor reads no file. What it reads and writes then it does in threads: while the
file server hangs it goes on to judge, and to end, its rank. If a supervisor is killed, its rank dies with it. Does not
import PyTorch.
"""

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, NoReturn

import psutil

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch.oom_kills import oom_kills
from vjepa_scale.launch.peers import Peers, aside, result_of, say, size_of, tells_of_a_lost_peer
from vjepa_scale.run.failures import write_report
from vjepa_scale.run.progress import OUTSIDE_STEPS, Page, part_of, shared_page, step_of
from vjepa_scale.run.rank_places import in_words, place_of, places_of

TICK_S = 0.25
# Of a rank without progress: when its supervisor begins to look for reports of peers, and how often it does. Not before
# so many times the usual time of a step; with many ranks less often, all together 32 times per second.
LOOK_S, LOOK_STEPS, LOOK_EVERY_S, LOOKS_PER_S = 5.0, 3.0, 2.0, 32.0
# How long a turn waits for files, and in total for a report, after which its words go to stderr.
LOOK_WAIT_S, FILES_S = TICK_S, 2.0
# The rank's time to answer; a hung rank's peers' time to write their accounts; the time that a rank has to end by
# itself after a peer's failure.
ANSWER_S, ACCOUNTS_S, PEER_GRACE_S = 3.0, 5.0, 15.0
# How long a rank that has only lost a peer stays: the cluster manager may end all others when it leaves, and who they
# were waiting for is known from who has written a report.
HOLD_S = 10.0
# A rank whose outcome is written may take this long to end, and one that was sent SIGKILL, which is sent twice.
EXIT_S, KILLED_S = 60.0, 30.0

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = 0x80  # si_code SI_KERNEL: the terminal sends its signals to the rank, too
_PR_SET_PDEATHSIG = 1
# Signals that are an error of the code if they come twice at the same step. Others come from outside.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_STOP_REQUESTS = (signal.SIGTERM, signal.SIGUSR2)


class RankError(RuntimeError):
    """An exception of the rank, as text, so that its class (which may be PyTorch's) need not be imported here."""


class _RankTraceback(Exception):
    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return f"\n{self._text}"


@dataclass(frozen=True)
class Outcome:
    """How the rank's function ended. kind: value, exit or error; value: what it returned, its code, or its exception"""

    kind: str
    value: Any
    trace: str = ""


def supervised(run: Callable[[Page], Any], *, ranks: Ranks, failures: Path, logs: Path) -> Any:
    """Calls ``run`` in a child process, the rank, with the page of its progress. Returns what it returns.

    Raises its UserError or SystemExit; its other exceptions as RankError, with its traceback; SystemExit(128 + n) if
    signal n ends it. Where the system has no sigtimedwait (macOS) it is called in this process.
    """
    page = shared_page()
    if not hasattr(signal, "sigtimedwait"):
        return run(page)
    written = os.fdopen(os.memfd_create("vjepa_outcome"), "w+b")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*_FORWARDED, signal.SIGCHLD])
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: NumPy's, which handles a fork
        pid = os.fork()
    if pid == 0:
        _be_the_rank(run, page, written, parent, before)
    supervisor = Supervisor(pid, page, ranks=ranks, failures=failures, logs=logs)
    handlers = {number: signal.signal(number, supervisor.forward) for number in _FORWARDED}
    try:
        status = supervisor.wait()
        with written:
            outcome = _read(written)
        supervisor.tell(status, outcome)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _as_the_rank(outcome, status)


# -- the child -------------------------------------------------------------------------------------


def _be_the_rank(
    run: Callable[[Page], Any], page: Page, written: BinaryIO, parent: int, mask: Iterable[int]
) -> NoReturn:
    import atexit

    code = 1
    try:
        _die_with(parent)
        page.pid = os.getpid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            outcome, code = Outcome("value", run(page)), 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
            outcome = Outcome("exit", code)
        except BaseException as error:  # noqa: BLE001 (the parent raises it)
            shown = error if isinstance(error, (UserError, KeyboardInterrupt)) else _in_words(error)
            outcome = Outcome("error", shown, "".join(traceback.format_exception(error)))
        pickle.dump(outcome, written)
        written.flush()
        page.ended = 1
        atexit._run_exitfuncs()  # may leave by os._exit
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _in_words(error: BaseException) -> RankError:
    return RankError("".join(traceback.format_exception_only(error)).strip())


def _die_with(parent: int) -> None:
    """SIGKILL when the parent has ended, however it ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# -- the parent ------------------------------------------------------------------------------------


def _read(written: BinaryIO) -> Outcome | None:
    """Returns the outcome; None if the rank ended before it was whole."""
    written.seek(0)
    try:
        found = pickle.load(written)  # noqa: S301 (of our own child)
    except (EOFError, pickle.UnpicklingError, AttributeError, IndexError):
        return None
    return found if isinstance(found, Outcome) else None


def _as_the_rank(outcome: Outcome | None, status: int) -> Any:
    if outcome is None:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(128 - code if code < 0 else code or 1)
    if outcome.kind == "value":
        return outcome.value
    if outcome.kind == "exit":
        raise SystemExit(outcome.value)
    raise outcome.value from _RankTraceback(outcome.trace)


def _is_from_terminal(came: signal.struct_siginfo) -> bool:
    return came.si_signo == signal.SIGINT and came.si_code == _FROM_TERMINAL


class Supervisor:
    """Waits for a rank and judges its progress, one turn after another.

    Seconds without progress are counted in turns, not by the clock: a job that is suspended as a whole has not hung.
    """

    def __init__(self, pid: int, page: Page, *, ranks: Ranks, failures: Path, logs: Path) -> None:
        self.pid, self.page, self.ranks, self.failures, self.logs = pid, page, ranks, failures, logs
        self.silent_s = 0.0
        self._beats = page.beats
        self._beats_s: deque[float] = deque([0.0], maxlen=9)  # between beats
        self._look: Future[bool] | None = None
        self._look_every_s = max(LOOK_EVERY_S, ranks.world_size / LOOKS_PER_S)
        self._look_in_s = self._first_look_s()
        self._oom_kills = oom_kills()
        self._kill_in_s: float | None = None  # the rank is given up
        self._told_to_end = False
        self._kills = 0
        self._reaped = False
        self._reports: list[Future[None]] = []
        self._peers = Peers(failures, ranks)
        if ranks.source == "torchrun":  # whose jobs' names are equal if the address is
            result_of(aside(self._peers.forget_earlier), None, patience_s=FILES_S)
        self._log = logs / f"{ranks.job_id}_{ranks.rank}_log.err"
        self._log_before = result_of(aside(partial(size_of, self._log)), 0, patience_s=FILES_S)

    def forward(self, number: int, _: object = None) -> None:
        """Passes a signal on to the rank. Its pid may be another process's once it has been waited for."""
        if not self._reaped:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> int:
        """Returns the rank's wait status, when it has ended; that of SIGKILL if the kernel does not end it."""
        signals = (*_FORWARDED, signal.SIGCHLD)
        then = time.monotonic()
        while True:
            came = signal.sigtimedwait(signals, TICK_S)
            if came is not None and came.si_signo != signal.SIGCHLD and not _is_from_terminal(came):
                self.pass_on(came.si_signo)
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._reaped = True
                return status
            if self.cannot_be_ended:
                say(f"error: {in_words(self._place())} cannot be ended (state {self._state()})", patience_s=FILES_S)
                return signal.SIGKILL
            now = time.monotonic()
            passed, then = min(now - then, 2 * TICK_S), now
            self.turn(passed)

    @property
    def cannot_be_ended(self) -> bool:
        """SIGKILL has had no effect, twice: the rank is in a call of the kernel that does not return."""
        return self._kills == 2 and self._kill_in_s is not None and self._kill_in_s <= 0

    def pass_on(self, number: int) -> None:
        """Passes on a signal that somebody has sent to the job."""
        self._told_to_end = self._told_to_end or number == signal.SIGTERM
        self.forward(number)

    def turn(self, passed: float) -> None:
        """Judges the rank after so many further seconds."""
        page = self.page
        if self._kill_in_s is not None:
            self._kill_in_s -= passed
            if self._kill_in_s <= 0 and self._kills < 2:
                self._kill_in_s = KILLED_S
                self._kills += 1
                self.forward(signal.SIGKILL)
            return
        if page.ended:
            self._kill_in_s = EXIT_S
            return
        if page.beats != self._beats:
            self._beats_s.append(self.silent_s)
            self._beats, self.silent_s, self._look_in_s = page.beats, 0.0, self._first_look_s()
            return
        self.silent_s += passed
        self._look_in_s -= passed
        if not page.limit_ms:  # it ends, or nothing limits it
            return
        if self.silent_s > page.limit_ms / 1000:
            self._give_up(overdue=True, grace_s=ACCOUNTS_S if self.ranks.world_size > 1 else 0.0)
        elif self._told_to_end and self.silent_s >= self._unusual_s() and part_of(page) not in OUTSIDE_STEPS:
            self._told_to_end = False
            if self.ranks.world_size > 1:
                self._account(overdue=False, told_to_end=True)
        elif self._look_in_s <= 0 and self.ranks.world_size > 1 and self._a_peer_has_failed():
            self._give_up(overdue=False, grace_s=PEER_GRACE_S)

    def _first_look_s(self) -> float:
        """Returns the seconds without progress before the first look, another time for each rank."""
        return self._unusual_s() + self._look_every_s * self.ranks.rank / self.ranks.world_size

    def _unusual_s(self) -> float:
        """Returns the seconds without progress after which a step takes longer than usual."""
        return max(LOOK_S, min(LOOK_STEPS * median(self._beats_s), self.page.limit_ms / 2000))

    def _a_peer_has_failed(self) -> bool:
        """Looks for reports of peers, or waits on for a look that has not returned."""
        look = self._look = self._look or aside(self._peers.have_failed)
        found = result_of(look, False, patience_s=LOOK_WAIT_S)
        if look.done():
            self._look, self._look_in_s = None, self._look_every_s
        return found

    def _give_up(self, *, overdue: bool, grace_s: float) -> None:
        """Writes the account of a rank that does not go on. It is killed ``grace_s`` seconds later."""
        self._kill_in_s = grace_s  # first of all: whatever becomes of the account
        self._account(overdue=overdue)

    def _account(self, *, overdue: bool, told_to_end: bool = False) -> None:
        """Reports what a rank does that does not go on."""
        answered = self._asked()
        waits = answered and bool(self.page.waits)
        step, part = step_of(self.page), part_of(self.page)
        place = self._place()
        account = {
            "place": place,
            "part": part,
            "waited_s": self.silent_s,
            "overdue": overdue,
            "answered": answered,
            "waits": waits,
            "state": self._state(),
        }
        at = "before the first step" if step is None else f"in step {step}"
        did = "waited for its peers" if waits else "did not go on" if answered else "did not answer"
        self._report(
            step=step,
            kind="Hung",
            message=f"{in_words(place)} {did} for {self.silent_s:.0f} s {at} ({part})",
            bystander=waits or (answered and not overdue),
            recurs=answered,
            cause=f"Hung, {part}",
            account=account,
            told_to_end=told_to_end,
        )

    def _asked(self) -> bool:
        """Asks the rank, which writes its stacks too. Returns whether it has answered."""
        asked = self.page.asked = self.page.asked + 1
        for _ in range(int(ANSWER_S / TICK_S)):
            time.sleep(TICK_S)
            if self.page.answered == asked:
                return True
        return False

    def _state(self) -> str:
        try:
            return str(psutil.Process(self.pid).status())
        except psutil.Error:
            return "gone"

    def _place(self) -> dict[str, Any]:
        """Returns the rank's place as it has registered it; on which GPU it is, only the rank knows."""
        look = aside(partial(places_of, self.failures.parent, self.ranks.job))
        for place in result_of(look, [], patience_s=FILES_S):
            if place["rank"] == self.ranks.rank:
                return place
        return place_of(self.ranks, pid=self.pid, on_gpu=False)

    def tell(self, status: int, outcome: Outcome | None) -> None:
        """Writes a report about a rank that has ended without its own. Holds the exit of one that has lost a peer."""
        lost_a_peer = outcome is not None and outcome.kind == "error" and self.ranks.world_size > 1
        if outcome is None and self._kill_in_s is None:
            lost_a_peer = self._report_end(os.waitstatus_to_exitcode(status))
        if lost_a_peer:
            # Of many ranks each reads the folder every few seconds, at another time.
            every_s = max(2 * TICK_S, self.ranks.world_size / 128) * (1 + self.ranks.rank / self.ranks.world_size) / 2
            hold = aside(partial(self._peers.wait_for_words, HOLD_S, every_s=every_s))
            result_of(hold, None, patience_s=HOLD_S + FILES_S)
        wait(self._reports, HOLD_S)  # a file server may be slow

    def _report_end(self, code: int) -> bool:
        """Reports how a rank has ended. Returns whether it had lost a peer."""
        step, number = step_of(self.page), -code
        if step is None and number in _STOP_REQUESTS:  # before it could handle it: no failure
            return False
        who, part = in_words(self._place()), part_of(self.page)
        if code >= 0:
            kind, how = "Ended", f"ended with exit code {code} and no error message"
            cause = f"exit code {code}, {part}"
        else:
            kind, how = "Killed", f"ended by {signal.Signals(number).name}"
            cause = f"{signal.Signals(number).name}, {part}"
        if number == signal.SIGKILL and oom_kills() > self._oom_kills:
            how += ": the kernel has ended a process of this job for lack of memory"
        lost_a_peer = number == signal.SIGABRT and self._was_aborted_for_a_peer()
        if lost_a_peer:
            how += " in a collective, as after the loss of a peer"
        recurs = (code >= 0 or number in _CRASHES) and not lost_a_peer
        self._report(step=step, kind=kind, message=f"{who} {how}", bystander=lost_a_peer, recurs=recurs, cause=cause)
        say(f"error: {who} {how}", patience_s=FILES_S)
        return lost_a_peer

    def _was_aborted_for_a_peer(self) -> bool:
        """Returns whether a collective has ended the rank: NCCL's watchdog aborts all ranks whose peer is gone."""
        if self.ranks.world_size == 1:
            return False
        if part_of(self.page) == "reduce":
            return True
        look = aside(partial(tells_of_a_lost_peer, self._log, self._log_before))
        return result_of(look, False, patience_s=FILES_S)

    def _report(self, **values: Any) -> None:
        """Writes a report; if that fails or takes long, its message goes to stderr: the rank's end must be seen."""
        more: dict[str, Any] = {"logs": self.logs, "supervisor": True, "user_error": False, "traceback": ""}
        report = aside(partial(write_report, self.failures, self.ranks, **more, **values))
        self._reports.append(report)
        wait([report], FILES_S)
        error = report.exception() if report.done() else "the file system does not answer"
        if error is not None:
            say(f"error: {values['message']}; its report cannot be written: {error}", patience_s=FILES_S)
