"""Writes the stacks of a rank while one of its steps takes many times the median.

A thread of every rank watches the rank's own clock. So a rank whose peers hang writes its stacks too, and no collective
is needed. ``RUN/STAGE/stacks/step_S_rank_R.txt``, at most ``MOST_FILES`` for each rank, over all attempts.
"""

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vjepa_scale.core.errors import reason_of
from vjepa_scale.core.files import open_atomic
from vjepa_scale.core.stacks import write_stacks
from vjepa_scale.recipe.log_sections import ProfileConfig

AT_LEAST_S = 10.0
MOST_FILES = 10
# Steps of a phase before the median means something; the first one, which starts workers and compiles, is not counted.
FEWEST_STEPS = 3
_MEDIAN_OF = 50
_TICK_S, _PATIENCE_S = 0.5, 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # each arming is another one, even of the same step
class _Armed:
    """A step that is being watched. median, limit: seconds"""

    step: int
    median: float
    limit: float


class SlowSteps:
    """Watches steps from ``arm`` to ``disarm``. Use it in a ``with`` statement, which ends its thread.

    cfg:   its ``slow_factor``; None: nothing is watched. Profiled steps are not watched either: while a rank writes its
           profile, the others wait for it in the next step
    event: gets the values of a history row about each slow step
    """

    def __init__(self, cfg: ProfileConfig, *, folder: Path, rank: int, event: Callable[..., None]) -> None:
        self._factor, self._folder, self._rank, self._event = cfg.slow_factor, folder / "stacks", rank, event
        first, end = cfg.steps or (0, -1)
        self._profiled = range(first, end + 1)
        self._seconds = deque[float](maxlen=_MEDIAN_OF)
        self._counted_from = 0
        self._armed: _Armed | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slow-steps", daemon=True)

    def __enter__(self) -> "SlowSteps":
        if self._factor is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._armed = None
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)  # not for ever: it may be writing to a file server that hangs

    def begin(self, first: int) -> None:
        """Forgets the steps so far: a phase, or its rest, begins with this step."""
        self._seconds.clear()
        self._counted_from = first + 1

    def arm(self, step: int) -> None:
        """Watches this step from now on, if enough steps before it have been measured."""
        if self._factor is None or len(self._seconds) < FEWEST_STEPS or step in self._profiled:
            return
        median = statistics.median(self._seconds)
        self._armed = _Armed(step, median, max(AT_LEAST_S, self._factor * median))

    def disarm(self, step: int, *, seconds: float) -> None:
        """The step has ended after so many seconds."""
        self._armed = None
        if step >= self._counted_from:
            self._seconds.append(seconds)

    def _watch(self) -> None:
        watched: _Armed | None = None
        waited = 0.0
        then = time.monotonic()
        while not self._ended.wait(_TICK_S):
            now = time.monotonic()
            # Counts turns of this loop, not wall time: a suspended job has not been slow.
            passed, then = min(now - then, 2 * _TICK_S), now
            armed = self._armed
            if armed is not watched:
                watched, waited = armed, 0.0
            elif armed is not None:
                before, waited = waited, waited + passed
                if before <= armed.limit < waited:
                    self._report(armed, waited)

    def _report(self, slow: _Armed, seconds: float) -> None:
        said = f"step {slow.step} has taken {seconds:.0f} s, the median is {slow.median:.3g} s"
        path = self._folder / f"step_{slow.step}_rank_{self._rank}.txt"
        try:
            if len(list(self._folder.glob(f"step_*_rank_{self._rank}.txt"))) >= MOST_FILES:
                _log.warning("%s; no more stacks: %s has %d files of this rank", said, self._folder, MOST_FILES)
                return
            with open_atomic(path) as file:
                file.write(f"{said}; stacks of rank {self._rank}, innermost call first\n\n".encode())
                write_stacks(file)
            _log.warning("%s: stacks of rank %d are in %s", said, self._rank, path)
            self._event("slow_step", step=slow.step, seconds=seconds, median=slow.median, stacks=str(path))
        except OSError as error:  # training itself does not need the file
            _log.warning("%s; its stacks cannot be written: %s", said, reason_of(error))
