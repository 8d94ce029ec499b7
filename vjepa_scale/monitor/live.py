"""What a command that stays prints of a stage: one live line on a terminal, a line a minute in a log."""

import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

# What rank 0 prints of a step (run/metrics.py): stage/phase, step of steps, figures.
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
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move(self, found: re.Match[str]) -> None:
        if self._bar is None or found["stage"] != self._stage:
            self.close()
            self._stage = found["stage"]
            self._bar = tqdm(total=int(found["last"]), desc=self._stage, unit="step", file=self._output, ascii=" =")
            self._bar.initial = max(0, int(found["step"]) - 1)  # of a stage that goes on: its rate is of its own steps
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
