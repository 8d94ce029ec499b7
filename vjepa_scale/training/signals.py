"""Being asked to save and stop: a signal only sets a flag, which is acted upon between steps.

Handlers of Python run between bytecodes, so a signal that comes inside a collective or a save is noticed
after it; what it asks for is done after the step, by all ranks together (``training_step`` spreads the flag).
"""

import signal
from types import FrameType

from vjepa_scale.core.worker_pool import start_fork_server

# USR2: Slurm before the time limit or a preemption (USR1 is NCCL's). TERM: sites that send only that.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class SavedAndStopped(Exception):
    """The stage has obeyed a signal: its state is saved, it is not at its end."""


class Interrupt:
    """``signal``: the name of the first signal that asked this process to stop, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def listen(self) -> None:
        """Take the signals from now on, and keep them from the loader's workers. In the main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        start_fork_server("vjepa_scale.data.loader", deaf_to=SIGNALS)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
