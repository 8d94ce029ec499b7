"""Decides which ranks hold up the others: those that compute wrong or slowly in checks, or wait longer for their data.

Pure decisions on the figures of all ranks, equal on every rank. ``device_watch.py`` gets the figures and reports.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Problem = Literal["wrong", "slow", "data"]

# Waits for data are compared over so many steps. A rank is named if it waits more than this multiple of the others'
# median, and more than this share of the time of these steps.
WAITS_STEPS = 100
WAITS_FACTOR = 4.0
WAITS_SHARE = 0.05


@dataclass(frozen=True)
class Finding:
    """A rank has a problem, or has it no more.

    times: the multiple of the other ranks' median time; None: not a matter of time, or the others take none
    share: of the time of the steps, for which the rank waited
    over:  it no longer has it
    """

    rank: int
    problem: Problem
    times: float | None = None
    share: float | None = None
    over: bool = False


class Reference:
    """The right sums of a check: the exact ones.

    If no rank has an exact one at the first check, this kind of device rounds otherwise, and the sum that most of the
    ranks have is the reference from then on.
    """

    def __init__(self, exact: Sequence[int]) -> None:
        self._sums = list(exact)
        self.inexact: list[int] = []  # which sums no rank had exactly
        self._settled = False

    def wrong(self, of_ranks: Sequence[Sequence[int]]) -> dict[int, int]:
        """Returns which ranks differ, each with the number of the first sum that does."""
        if not self._settled:
            self._settle(of_ranks)
        found: dict[int, int] = {}
        for rank, sums in enumerate(of_ranks):
            for index, (value, right) in enumerate(zip(sums, self._sums, strict=True)):
                if value != right:
                    found.setdefault(rank, index)
        return found

    def _settle(self, of_ranks: Sequence[Sequence[int]]) -> None:
        self._settled = True
        for index, values in enumerate(zip(*of_ranks, strict=True)):
            if self._sums[index] not in values:
                self.inexact.append(index)
                self._sums[index] = statistics.mode(values)


class SlowDevices:
    """Finds the ranks whose time is above ``factor`` × the median of the others in ``window`` checks in a row."""

    def __init__(self, factor: float | None, window: int) -> None:
        self._factor = factor
        self._last = deque[list[float]](maxlen=window)
        self._slow: set[int] = set()

    def add(self, seconds: Sequence[float]) -> list[Finding]:
        """Takes every rank's time of one check. Returns what is new: ranks that are slow, or no longer."""
        if self._factor is None or len(seconds) < 2:
            return []
        self._last.append([_times(seconds, rank) or 1.0 for rank in range(len(seconds))])
        if len(self._last) < (self._last.maxlen or 1):
            return []
        slow = {rank for rank in range(len(seconds)) if all(times[rank] > self._factor for times in self._last)}
        mean = [statistics.median(times) for times in zip(*self._last, strict=True)]
        new = [Finding(rank, "slow", times=mean[rank]) for rank in sorted(slow - self._slow)]
        over = [Finding(rank, "slow", times=mean[rank], over=True) for rank in sorted(self._slow - slow)]
        self._slow = slow
        return new + over


class LateData:
    """Finds the ranks that wait much longer for their batches than the others, over ``WAITS_STEPS`` steps."""

    def __init__(self) -> None:
        self._waited: list[float] = []
        self._seconds, self._steps = 0.0, 0
        self._late: set[int] = set()

    def add(self, waited_s: Sequence[float], seconds: float) -> list[Finding]:
        """Takes every rank's wait in a step that took so many seconds. Returns what is new, after each window."""
        if len(waited_s) < 2:
            return []
        self._waited = [a + b for a, b in zip(self._waited or [0.0] * len(waited_s), waited_s, strict=True)]
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps < WAITS_STEPS:
            return []
        waited, total = self._waited, self._seconds
        self._waited, self._seconds, self._steps = [], 0.0, 0
        found = {rank: Finding(rank, "data", _times(waited, rank), waited[rank] / total) for rank in range(len(waited))}
        late = {
            rank
            for rank, finding in found.items()
            if finding.share is not None
            and finding.share > WAITS_SHARE
            and (finding.times is None or finding.times > WAITS_FACTOR)
        }
        new = [found[rank] for rank in sorted(late - self._late)]
        over = [Finding(rank, "data", over=True) for rank in sorted(self._late - late)]
        self._late = late
        return new + over


def _times(values: Sequence[float], rank: int) -> float | None:
    """Returns a rank's value divided by the median of the others'; None if that is 0."""
    others = statistics.median(value for other, value in enumerate(values) if other != rank)
    return values[rank] / others if others > 0 else None
