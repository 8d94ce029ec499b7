"""Curves of metrics.jsonl: reads each column once, smooths it, and thins it to a number of points that a page can show.

Does not import PyTorch.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.files import read_jsonl

Floats = npt.NDArray[np.float64]

# Points of a curve on the page. A run may have 300,000 rows.
POINTS = 2000
# The smoothed curve is a mean over this fraction of a phase's rows on either side.
SMOOTHED_OVER = 0.02
# Where that is less: this many rows on either side, of a phase with at least ten times as many.
_FEW = 2


@dataclass(frozen=True)
class Series:
    """One column of one stage. steps, values: float64 [n], steps ascending; a value that is not finite is a gap"""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """The last finite value; None without one."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else None

    def split(self, at: list[int]) -> Iterator["Series"]:
        """Yields the parts between some steps, without empty ones. at: first steps of later parts, ascending"""
        edges = np.searchsorted(self.steps, at)
        for steps, values in zip(np.split(self.steps, edges), np.split(self.values, edges), strict=True):
            if len(steps):
                yield Series(steps, values)


@dataclass
class StageMetrics:
    """What metrics.jsonl of a stage has.

    columns: by name, as in run/columns.py; only numbers
    phases:  name, first and last step of each phase that has rows, in their order
    rows:    number of rows that were read
    """

    columns: dict[str, Series] = field(default_factory=dict)
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    rows: int = 0

    def family(self, pattern: str) -> dict[str, Series]:
        """Returns the columns whose names match a pattern, such as ``mask_loss/*``."""
        return {name: series for name, series in self.columns.items() if fnmatchcase(name, pattern)}

    @property
    def phase_starts(self) -> list[int]:
        """First steps of all phases but the first."""
        return [first for _, first, _ in self.phases[1:]]


def read_metrics(path: Path) -> StageMetrics:
    """Reads the numbers of a metrics.jsonl. Skips damaged rows; a file that is not there has no rows."""
    # Columns and not rows: 300,000 rows as dictionaries would take a gigabyte.
    found: dict[str, tuple[array[float], array[float]]] = {}
    out = StageMetrics()
    for row in read_jsonl(path):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        out.rows += 1
        phase = str(row.get("phase", ""))
        if out.phases and out.phases[-1][0] == phase:
            out.phases[-1] = (phase, out.phases[-1][1], step)
        else:
            out.phases.append((phase, step, step))
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = found.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
    for name, (steps, values) in found.items():
        ordered, index = np.unique(np.frombuffer(steps, np.float64), return_index=True)
        out.columns[name] = Series(ordered, np.frombuffer(values, np.float64)[index])
    return out


def smoothed(series: Series) -> Series:
    """Returns means over a window around each row: 2·``SMOOTHED_OVER`` of the rows, less at the ends. Skips gaps."""
    half = max(int(SMOOTHED_OVER * len(series)), _FEW if len(series) >= 10 * _FEW else 0)
    if half == 0:
        return series
    finite = np.isfinite(series.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    rows = np.arange(len(series))
    low, high = np.maximum(rows - half, 0), np.minimum(rows + half + 1, len(series))
    with np.errstate(invalid="ignore"):
        return Series(series.steps, (sums[high] - sums[low]) / (counts[high] - counts[low]))


def thinned(series: Series, points: int = POINTS) -> Series:
    """Returns at most ``points`` points: the minimum and the maximum of equal buckets of rows, in the rows' order.

    So outliers stay visible. A shorter series is returned unchanged.
    """
    if len(series) <= points:
        return series
    edges = np.linspace(0, len(series), points // 2 + 1).astype(int)
    kept: list[int] = []
    for begin, end in pairwise(edges):
        values = series.values[begin:end]
        if np.isfinite(values).any():
            kept += sorted({begin + int(np.nanargmin(values)), begin + int(np.nanargmax(values))})
        else:
            kept.append(begin)
    return Series(series.steps[kept], series.values[kept])
