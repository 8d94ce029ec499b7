"""Signals to save and stop. A signal only sets a flag, which is checked between steps.

Python runs signal handlers between bytecodes, so a signal during a collective or a save is handled after it.
All ranks save and stop together after the step: the flag is reduced with the loss (``compute_gradients``).
"""

import signal
from types import FrameType

from vjepa_scale.core.worker_pool import start_fork_server

# USR2: from Slurm, before the time limit or a preemption (NCCL uses USR1). TERM: for sites that send only that.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class SavedAndStopped(Exception):
    """The stage has saved and stopped after a signal, before its end."""


class Interrupt:
    """``signal``: the name of the first signal that asked this process to stop, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def listen(self, *, loader_workers: int) -> None:
        """Handles the signals from now on, and blocks them in the loader's workers. Call it in the main thread.

        loader_workers: data.workers; with 0 no fork server is started, which would import PyTorch a second time
        """
        for number in SIGNALS:
            signal.signal(number, self._note)
        if loader_workers:
            start_fork_server("vjepa_scale.data.loader", deaf_to=SIGNALS)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
