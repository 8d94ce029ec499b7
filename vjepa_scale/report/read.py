"""Reads what a report shows of a run: status, attempts, curves, evaluations. Does not import PyTorch.

A file that is missing or damaged leaves its part of the report empty; nothing here raises for one, except for a run
folder without a readable recipe.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.checkpoint.evaluations import results_of
from vjepa_scale.checkpoint.manifest import newest_first, read_manifest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, read_jsonl
from vjepa_scale.monitor.states import RunStatus, StageStatus
from vjepa_scale.monitor.status import read_status, run_recipe
from vjepa_scale.recipe import Phase, Recipe, Stage, stages_of
from vjepa_scale.run.events import Attempt, History, attempts
from vjepa_scale.run.ledger import LEDGER

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


# -- a run -------------------------------------------------------------------------------------------


SUMMARY, PICTURES = "summary.json", "pictures"
Json = dict[str, Any]


@dataclass
class StageRecord:
    """One stage: its status, and what its files have.

    attempts:    of all launches, oldest first
    until:       the time at which each attempt was last known to be at work, seconds since 1970
    evaluations: comparable rows of evaluations.jsonl, by step
    evaluation:  evaluation.json of a probe
    """

    stage: Stage
    status: StageStatus
    metrics: StageMetrics
    attempts: list[Attempt]
    until: list[float]
    evaluations: list[Json]
    evaluation: Json | None

    @property
    def name(self) -> str:
        return self.stage.name

    @cached_property
    def phases(self) -> list[Phase]:
        return self.stage.phases_from(self.status.first)

    @property
    def rank_seconds(self) -> float:
        """Time of all attempts multiplied by their ranks."""
        return sum(
            max(0.0, until - attempt.started["time"]) * attempt.started.get("world_size", 1)
            for attempt, until in zip(self.attempts, self.until, strict=True)
            if attempt.started is not None
        )

    @property
    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return newest_first(self.stage.checkpoints)[::-1]


@dataclass
class RunRecord:
    """One run. name: of its folder; substituted: clips by (stage, data set, cause); libraries: versions by name"""

    folder: Path
    recipe: Recipe
    status: RunStatus
    stages: list[StageRecord]
    substituted: Counter[tuple[str, str, str]]
    summary: Json | None
    source: Json
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.folder.resolve().name

    @property
    def lineages(self) -> list[list[StageRecord]]:
        """Stages that share one count of steps (``lineages``)."""
        records = {record.name: record for record in self.stages}
        return [[records[stage.name] for stage in line] for line in lineages([record.stage for record in self.stages])]

    @cached_property
    def libraries(self) -> dict[str, str]:
        """Versions that the newest checkpoint of the run was written with."""
        for record in reversed(self.stages):
            for checkpoint in reversed(record.checkpoints):
                with suppress(UserError, OSError):
                    return {name: str(version) for name, version in read_manifest(checkpoint)["libraries"].items()}
        return {}

    @property
    def yaml(self) -> str:
        """The recipe as it was resolved by the version that launched it."""
        return (self.folder / "recipe.yaml").read_text()


def read_run(folder: Path) -> RunRecord:
    """Reads a run. Raises UserError if the folder has no readable recipe."""
    recipe, status = run_recipe(folder), read_status(folder)
    by_name = {stage.name: stage for stage in status.stages}
    stages = [_stage(stage, by_name[name]) for name, stage in stages_of(recipe).items()]
    substituted = Counter(
        (str(row.get("stage")), str(row.get("dataset")), str(row.get("cause")))
        for row in read_jsonl(folder / LEDGER)
        if row.get("event") == "substituted"
    )
    sources = sorted(folder.glob("launches/*/source.json"))
    source = _json(sources[-1]) if sources else None
    return RunRecord(folder, recipe, status, stages, substituted, _json(folder / SUMMARY), source or {})


def lineages(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Returns groups of stages that share one count of steps: each continues from the one before it."""
    out: list[list[Stage]] = []
    for stage in stages:
        line = next((line for line in out if line[-1].name == stage.config.continue_from), None)
        if line is None:
            out.append([stage])
        else:
            line.append(stage)
    return out


def _stage(stage: Stage, status: StageStatus) -> StageRecord:
    tried = attempts(History(stage.folder).rows())
    metrics = read_metrics(stage.folder / "metrics.jsonl")
    return StageRecord(
        stage,
        status,
        metrics,
        tried,
        _ends(stage, tried),
        results_of(stage).rows,
        _json(stage.evaluation),
    )


def _ends(stage: Stage, tried: Sequence[Attempt]) -> list[float]:
    """Returns until when each attempt was at work: its last row, or for the last one its last row of metrics."""
    rows = History(stage.folder).rows()
    starts = [attempt.started["time"] if attempt.started else None for attempt in tried]
    out = []
    for number, attempt in enumerate(tried):
        start = starts[number] or 0.0
        later = [time for time in starts[number + 1 :] if time is not None]
        limit = min(later, default=float("inf"))
        known = [row["time"] for row in rows if start <= row["time"] < limit and row["event"] in ("started", "saved")]
        if attempt.end is not None:
            known = [attempt.end["time"]]
        elif limit == float("inf"):
            with suppress(OSError):
                known.append((stage.folder / "metrics.jsonl").stat().st_mtime)
        out.append(max(known, default=start))
    return out


def _json(path: Path) -> Json | None:
    """Returns a JSON file's object; None if it is absent or damaged."""
    try:
        found = read_json(path)
    except (UserError, OSError):
        return None
    return found if isinstance(found, dict) else None


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns the recipes' keys whose values differ, with each run's value as text; "" where a recipe lacks the key.

    Leaves out ``run.dir``, which always differs.
    """
    flat = [dict(_leaves(run.recipe.model_dump(mode="json", exclude_none=True))) for run in runs]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    rows = [(key, [leaves.get(key, "") for leaves in flat]) for key in keys if key != "run.dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(node: Any, prefix: str = "") -> Any:
    """Yields dotted keys and values as text; a list without sections is one value."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{prefix}{number}.")
    else:
        yield prefix.removesuffix("."), node if isinstance(node, str) else json.dumps(node)
