"""The sections of a page about several runs: figures side by side, differences of recipes, curves over each other."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vjepa_scale.report import curves
from vjepa_scale.report.blocks import Charts, Section, Table, Text
from vjepa_scale.report.read import RunRecord, differences
from vjepa_scale.report.run_page import headline_figures
from vjepa_scale.report.stages import tiles

# Figures that are of a stage, or of a step.
_WITH_NOTE = ("state", "loss", "best checkpoint")


def named_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs, called by their paths where folders of one name are among them."""
    if len({run.name for run in runs}) == len(runs):
        return list(runs)
    for run in runs:
        run.name = str(run.folder)
    return list(runs)


def comparison(runs: Sequence[RunRecord]) -> list[Section]:
    """Returns the sections about several runs."""
    lines = curves.lines_of(runs)
    return [
        Section("runs", "Runs", list(_figures(runs))),
        Section("differences", "Differences of recipes", [_differences(runs)]),
        Section("training", "Training", list(_losses(lines))),
        Section("results", "Evaluations", [Charts(list(_evaluations(lines)))]),
        Section("collapse", "Collapse", [Charts(curves.collapse_charts(lines), 3)]),
        Section("speed", "Throughput", [Charts(curves.speed_charts(lines), 3)]),
    ]


def _figures(runs: Sequence[RunRecord]) -> Iterator[Any]:
    """Yields a table of the figures at the top of each run's own page, and one of results. A row per figure."""
    of_runs = [
        {tile.label: f"{tile.value} ({tile.note})" if tile.label in _WITH_NOTE else tile.value for tile in tiles(run)}
        for run in runs
    ]
    yield _side_by_side(runs, of_runs, "")
    results = [headline_figures(run) for run in runs]
    if any(results):
        yield _side_by_side(runs, results, "Results")


def _side_by_side(runs: Sequence[RunRecord], figures: Sequence[dict[str, str]], caption: str) -> Table:
    names = dict.fromkeys(name for of_run in figures for name in of_run)
    rows = [[name, *(of_run.get(name, "–") for of_run in figures)] for name in names]
    return Table(["", *(run.name for run in runs)], rows, caption)


def _differences(runs: Sequence[RunRecord]) -> Table | Text:
    rows = [[key, *(value or "–" for value in values)] for key, values in differences(runs)]
    if not rows:
        return Text("The recipes are equal, but for `run.dir`.")
    return Table(["key", *(run.name for run in runs)], rows, code=frozenset(range(len(runs) + 1)))


def _losses(lines: dict[str, list[curves.Line]]) -> Iterator[Charts]:
    for columns, main in ((1, True), (2, False)):
        charts = [curves.loss_chart(line) for line in lines.values() if line[0].trains_encoder == main]
        yield Charts(charts, columns)


def _evaluations(lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    for of_stage in lines.values():
        if (chart := curves.evaluation_chart(of_stage)) is not None:
            yield replace(chart, legend=curves.legend_of(of_stage))
