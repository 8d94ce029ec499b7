"""Charts of what metrics.jsonl has: loss and schedules, collapse figures, throughput. For one run, or over several."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np

from vjepa_scale.recipe.guard_sections import LIMITS, Limit
from vjepa_scale.report.charts import COLOURS, Band, Chart, Curve, Panel, curves_chart
from vjepa_scale.report.read import RunRecord, Series, StageRecord, smoothed, thinned
from vjepa_scale.run.columns import COLUMNS, Column, column_of

# By kind of training, what is drawn with the loss: parts of it, or values on its scale.
_BESIDE_LOSS = ("mask_loss/*", "teacher_loss", "rollout_loss", "copy_loss")
_COLLAPSE = ("effective_rank", "collapse/*", "update_ratio")
_SPEED = ("clips_per_s", "mfu", "waiting", "saving", "decode/seconds", "decode/cores", "memory/*")


# The rows of more runs than these would hide each other.
_RAW_OF_RUNS = 3


@dataclass(frozen=True)
class Line:
    """Stages of one run that share one count of steps, and what their curves are called.

    name: of the run where there are several; colour: likewise, else None
    """

    records: Sequence[StageRecord]
    name: str = ""
    colour: str | None = None

    @property
    def trains_encoder(self) -> bool:
        return any(record.stage.has_target_encoder for record in self.records)

    def curves(
        self, column: str, name: str, colour: str, *, raw: bool = False, mean: bool = True, stepped: bool = False
    ) -> list[Curve]:
        """Returns a column's curves, one per stage. raw: also each row, faint; mean: smoothed"""
        out: list[Curve] = []
        for record in self.records:
            series = record.metrics.columns.get(column)
            if series is None:
                continue
            label, own = self.name or name, self.colour or colour
            if raw:
                out.append(Curve(label, thinned(series), own, faint=True))
            # A phase of another geometry has another level: a mean over both would show a slope that is not there.
            parts = [smoothed(part) for part in series.split(record.metrics.phase_starts)] if mean else [series]
            joined = Series(*(np.concatenate([getattr(part, of) for part in parts]) for of in ("steps", "values")))
            out.append(Curve(label, thinned(joined), own, stepped=stepped))
        return out

    def names(self, *patterns: str) -> list[str]:
        """Returns the columns that match the patterns and that some stage has, in the order of run/columns.py."""
        found = {name for pattern in patterns for record in self.records for name in record.metrics.family(pattern)}
        return sorted(found, key=lambda name: (_place(name), name))

    def bands(self) -> list[Band]:
        out = []
        for number, record in enumerate(self.records):
            for place, (name, first, last) in enumerate(record.metrics.phases):
                out.append(Band(name, first, last + 1, opens=record.name if number and not place else ""))
        return out


def lines_of(runs: Sequence[RunRecord]) -> dict[str, list[Line]]:
    """Returns the lines with rows of all runs by their first stage's name, in the recipes' order."""
    out: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        several = len(runs) > 1
        colour = COLOURS[number % len(COLOURS)] if several else None
        for records in run.lineages:
            if any(record.metrics.rows for record in records):
                line = Line(records, run.name if several else "", colour)
                out.setdefault(records[0].name, []).append(line)
    return out


def title_of(lines: Sequence[Line]) -> str:
    """Returns ``pretrain → cooldown``: the stages that some of the lines have."""
    return " → ".join(dict.fromkeys(record.name for line in lines for record in line.records))


def loss_chart(lines: Sequence[Line]) -> Chart:
    """Returns loss, with phases shaded, over gradient norm, schedules and geometry."""
    raw = len(lines) <= _RAW_OF_RUNS
    loss = [curve for line in lines for curve in line.curves("loss", "loss", COLOURS[0], raw=raw)]
    single = len(lines) == 1
    if single:
        for colour, name in zip(cycle(COLOURS[1:7]), lines[0].names(*_BESIDE_LOSS)):
            loss += lines[0].curves(name, name, colour)
        loss += _held_out(lines[0])
    panels = [
        Panel("loss", loss, height=220),
        _panel(lines, "best_loss", "loss of the best probe"),
        _panel(lines, "accuracy", "accuracy of the best probe, on its batches"),
        _panel(lines, "grad_norm", "gradient norm", logarithmic=True),
        _panel(lines, "lr", "learning rate", mean=False, height=70),
        _panel(lines, "weight_decay", "weight decay", mean=False, height=60),
        _panel(lines, "ema", "EMA momentum", mean=False, height=60, unless_constant=True),
        Panel("height of frames, pixels", _geometry(lines, lambda phase: phase.size[0]), height=60, from_zero=True),
        Panel("frames of a clip", _geometry(lines, lambda phase: phase.frames), height=60, from_zero=True),
    ]
    caption = "Pale: each step. Strong: means over 4 % of a phase's steps. Shaded: every second phase."
    found = curves_chart(title_of(lines), panels, lines[0].bands() if single else (), caption=caption)
    return found if single else replace(found, caption="", legend=legend_of(lines))


def legend_of(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Returns names and colours of runs."""
    return [(line.name, line.colour or COLOURS[0]) for line in lines]


def collapse_charts(lines: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Returns a small chart of each collapse figure, with its limit as a dashed line. lines: as ``lines_of``"""
    return list(_small_charts(lines, _COLLAPSE, from_zero=False))


def speed_charts(lines: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Returns small charts of throughput, memory and the shares of time. lines: as ``lines_of``"""
    return list(_small_charts(lines, _SPEED, from_zero=True))


def data_loss_chart(lines: Sequence[Line]) -> Chart | None:
    """Returns the loss of each data set; None for several runs, or where there is no such column."""
    names = _names(lines, "data_loss/*")
    if len(lines) > 1 or not names:
        return None
    curves = [
        curve
        for colour, name in zip(cycle(COLOURS), names)
        for curve in lines[0].curves(name, name.removeprefix("data_loss/"), colour)
    ]
    title = f"{title_of(lines)}: loss by data set"
    return curves_chart(title, [Panel("loss", curves, height=160)], lines[0].bands(), caption=described("data_loss/*"))


def evaluation_chart(lines: Sequence[Line]) -> Chart | None:
    """Returns what evaluations.jsonl has over the step; None if it has nothing."""
    titles = {
        "knn": "k-NN accuracy on held-out clips",
        "linear": "accuracy of a linear probe on held-out clips",
        "held_out_loss": "loss on held-out clips, under fixed masks",
        "effective_rank": "effective rank on held-out clips",
    }
    panels = []
    for key, title in titles.items():
        curves = [
            Curve(line.name or title, series, line.colour or COLOURS[0], points=True)
            for line in lines
            if (series := _evaluated(line, key)) is not None
        ]
        if curves:
            panels.append(Panel(title, curves, height=110))
    return curves_chart(f"{title_of(lines)}: evaluations of checkpoints", panels) if panels else None


def missing_columns(runs: Iterable[RunRecord], patterns: Sequence[str]) -> list[str]:
    """Returns the columns of the table that match the patterns and that no stage has."""
    metrics = [record.metrics for run in runs for record in run.stages]
    return [
        column.name
        for column in COLUMNS
        if any(_matches(column, pattern) for pattern in patterns) and not any(m.family(column.name) for m in metrics)
    ]


MISSABLE = {"training": ("mask_loss/*",), "collapse": _COLLAPSE, "speed": _SPEED, "data": ("data_loss/*",)}


def described(name: str) -> str:
    """Returns the table's words about a column: what it is, and what is normal."""
    column = column_of(name)
    if column is None:
        return ""
    unit = f" ({column.unit})" if column.unit else ""
    normal = f" Normal: {column.normal}." if column.normal else ""
    return f"{column.meaning[:1].upper()}{column.meaning[1:]}{unit}.{normal}"


def alarms(run: RunRecord) -> list[str]:
    """Returns the columns whose last values are beyond their limit: signs of a collapse.

    As ``guards`` of the recipe judges them: as many measurements as its patience, after the limit's time to settle.
    """
    return [words for record in run.stages for name in record.metrics.columns if (words := _alarm(record, name))]


def _alarm(record: StageRecord, name: str) -> str:
    limit, value = _limit(record, name)
    guards, phases = record.stage.recipe.guards, record.phases
    if limit is None or value is None or guards.collapse == "off":
        return ""
    series, first = record.metrics.columns[name], phases[0].first
    held = [limit.holds(int(step) - first, phases[-1].end - first) for step in series.steps]
    last = series.values[held][-guards.patience :]
    if len(last) < guards.patience or not all(limit.is_passed(each, value) for each in last):
        return ""
    return f"`{name}` of {record.name} is {last[-1]:.3g}, {_side(limit)} {value:g}"


def _limit(record: StageRecord, name: str) -> tuple[Limit | None, float | None]:
    """Returns a column's limit and its value in this recipe; None: it has none."""
    limit = LIMITS.get(name)
    if limit is None:
        return None, None
    return limit, record.stage.recipe.guards.limits.get(name, limit.value)


def _side(limit: Limit) -> str:
    return "above" if limit.above else "below"


def _small_charts(lines: Mapping[str, Sequence[Line]], columns: Sequence[str], *, from_zero: bool) -> Iterator[Chart]:
    """Yields the charts of each column that some stage has. Only the first one of a column explains it."""
    for name in dict.fromkeys(name for of_stage in lines.values() for name in _names(of_stage, *columns)):
        of_stages = [of_stage for of_stage in lines.values() if _names(of_stage, name)]
        for number, of_stage in enumerate(of_stages):
            title = f"{name}: {title_of(of_stage)}" if len(of_stages) > 1 else name
            chart = _small(of_stage, name, title, from_zero=from_zero)
            legend = chart.legend if len(of_stage) == 1 else ()  # of runs: once, at the loss
            yield replace(chart, caption="" if number else chart.caption, legend=legend)


def _small(lines: Sequence[Line], name: str, title: str, *, from_zero: bool) -> Chart:
    column, single = column_of(name), len(lines) == 1
    curves = [curve for line in lines for curve in line.curves(name, name, COLOURS[0], raw=single)]
    limit, value = _limit(lines[0].records[0], name)
    limits = {value: f"collapse {_side(limit)} {value:g}"} if limit is not None and value is not None else {}
    panel = Panel(column.unit if column is not None else "", curves, limits, height=130, from_zero=from_zero)
    return curves_chart(title, [panel], lines[0].bands() if single else (), caption=described(name))


def _panel(
    lines: Sequence[Line],
    column: str,
    title: str,
    *,
    mean: bool = True,
    height: int = 90,
    logarithmic: bool = False,
    unless_constant: bool = False,
) -> Panel:
    raw = mean and len(lines) == 1
    curves = [curve for line in lines for curve in line.curves(column, title, COLOURS[0], raw=raw, mean=mean)]
    if unless_constant and len({value for curve in curves for value in curve.series.values.tolist()}) < 2:
        curves = []
    if logarithmic:  # a logarithm has no place for 0
        curves = [curve for curve in curves if (curve.series.values > 0).any()]
    return Panel(title, curves, height=height, logarithmic=logarithmic)


def _geometry(lines: Sequence[Line], of: Callable[..., float]) -> list[Curve]:
    """Returns stepped curves of a value of the phases, as far as there are rows."""
    out = []
    for line in lines:
        steps, values = [], []
        for record in line.records:
            phases = {phase.name: phase for phase in record.phases}
            for name, first, last in record.metrics.phases:
                if name in phases:
                    steps += [first, last]
                    values += [of(phases[name])] * 2
        if steps:
            series = Series(np.array(steps, float), np.array(values, float))
            out.append(Curve(line.name or "geometry", series, line.colour or COLOURS[0], stepped=True))
    same = len({value for curve in out for value in curve.series.values.tolist()}) < 2
    return [] if same else out  # the table of phases has it


def _held_out(line: Line) -> list[Curve]:
    series = _evaluated(line, "held_out_loss")
    return [] if series is None else [Curve("loss on held-out clips", series, COLOURS[7], points=True)]


def _evaluated(line: Line, key: str) -> Series | None:
    rows = [
        (row["step"], row[key])
        for record in line.records
        for row in record.evaluations
        if isinstance(row.get(key), int | float)
    ]
    return Series(*np.array(rows, float).T) if rows else None


def _names(lines: Sequence[Line], *patterns: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.names(*patterns)))


def _place(name: str) -> int:
    column = column_of(name)
    return COLUMNS.index(column) if column is not None else len(COLUMNS)


def _matches(column: Column, pattern: str) -> bool:
    return column.name == pattern or (pattern.endswith("/*") and column.name.startswith(pattern[:-1]))
