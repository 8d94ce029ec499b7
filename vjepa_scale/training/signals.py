"""Signals to save and stop. A signal only sets a flag, which is checked between steps.

Python runs signal handlers between bytecodes, so a signal during a collective or a save is handled after it.
All ranks save and stop together after the step: the flag is reduced with the loss (``compute_gradients``).

A rank that waits for data in vain never comes to that. ``ends_wait`` ends its wait some time after the signal, and
the attempt without a save: the peers wait in a collective, and all steps since the last checkpoint are trained again.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from vjepa_scale.core.worker_pool import start_fork_server
from vjepa_scale.run.failures import NothingSaved

# USR2: from Slurm, before the time limit or a preemption (NCCL uses USR1). TERM: for sites that send only that.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

# Environment variable that launchers set: seconds from USR2 to the end of the job.
SIGNAL_DELAY = "VJEPA_SIGNAL_DELAY_S"
# After a signal, the time for data to come. It usually comes sooner, and its step is worth finishing and saving.
DATA_PATIENCE_S = 10.0
# Of the time that the launcher's signal gives, the share for data to come. The rest is for the step and the save.
DATA_SHARE = 0.5


def data_patience_s(name: str, env: Mapping[str, str] = os.environ) -> float:
    """Returns how long a rank waits for its data after the signal of this name.

    USR2 is the launcher's, which gives the time up to the job's end in ``SIGNAL_DELAY``. After TERM, and where no
    launcher has set it, the job may be killed after some 30 s.
    """
    given = env.get(SIGNAL_DELAY, "")
    if name != "SIGUSR2" or not given.isdecimal():
        return DATA_PATIENCE_S
    return max(DATA_PATIENCE_S, DATA_SHARE * int(given))


class SavedAndStopped(Exception):
    """The stage has saved and stopped after a signal, before its end."""


class Interrupt:
    """``signal``: the name of the first signal that asked this process to stop, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._awaited: str | None = None
        self._patience_s = float("inf")
        self._listens = False

    def listen(self, *, loader_workers: int) -> None:
        """Handles the signals from now on, and blocks them in the loader's workers. Call it in the main thread.

        loader_workers: data.workers; with 0 no fork server is started, which would import PyTorch a second time
        """
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.signal(signal.SIGALRM, self._end_wait)
        self._listens = True
        if loader_workers:
            start_fork_server("vjepa_scale.data.loader", deaf_to=SIGNALS)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.signal = self.signal or name
        self._patience_s = min(self._patience_s, data_patience_s(name))
        if self._awaited is not None:
            left_s = signal.getitimer(signal.ITIMER_REAL)[0]
            if not left_s or left_s > self._patience_s:  # TERM after USR2: there is less time
                signal.setitimer(signal.ITIMER_REAL, self._patience_s)

    @contextmanager
    def ends_wait(self, awaited: str) -> Iterator[None]:
        """Raises NothingSaved inside, ``data_patience_s`` after a signal. awaited: the data, in words"""
        if not self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._awaited = awaited
        if self.signal is not None:
            signal.setitimer(signal.ITIMER_REAL, self._patience_s)
        try:
            yield
        finally:
            self._awaited = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _end_wait(self, _: int, __: FrameType | None) -> None:
        if self._awaited is not None and self.signal is not None:
            awaited, self._awaited = self._awaited, None
            raise NothingSaved(
                self.signal,
                f"stopped by {self.signal} while it waited for {awaited}: nothing is saved, since no step was "
                "completed meanwhile",
            )
