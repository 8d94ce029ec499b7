"""Charts as Plotly figures: panels of curves over the step that share one x axis, and bars.

Colours that depend on the page's scheme (text, grid) are left to the page's script; curves have colours that are
visible on light and on dark ground.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np

from vjepa_scale.report.read import Series

COLOURS = (
    *("#3f7fd0", "#d97a1f", "#2f9e78", "#a45cc0", "#c94a56", "#1d9bb0"),
    *("#8c7a2b", "#d0649a", "#6f7bd9", "#6f9a2c", "#b0683a", "#7d8794"),
)
GREY, ALARM = "#8a8f98", "#d64545"
# Labels of a time axis by the distance of its ticks in ms: one line each, since Plotly's own put the date below the
# first time, which is wider than its place on a narrow page.
_DATES = [
    {"dtickrange": [None, 60_000], "value": "%H:%M:%S"},
    {"dtickrange": [60_000, 10_799_999], "value": "%H:%M"},
    {"dtickrange": [10_800_000, 86_399_999], "value": "%b %-d %Hh"},
    {"dtickrange": [86_400_000, "M1"], "value": "%b %-d"},
    {"dtickrange": ["M1", None], "value": "%b %Y"},
]
_GAP, _TOP, _NAMES, _BOTTOM, _LEFT = 34, 22, 16, 42, 54  # pixels; _NAMES: of the phases, above the first panel


@dataclass(frozen=True)
class Curve:
    """One line. name: in the legend; faint: drawn thin and pale, not in the legend; stepped: for values that jump"""

    name: str
    series: Series
    colour: str = COLOURS[0]
    faint: bool = False
    dashed: bool = False
    stepped: bool = False
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves with one y axis. limits: dashed horizontal lines, value -> text; height: pixels"""

    title: str
    curves: Sequence[Curve]
    limits: Mapping[float, str] = field(default_factory=dict)
    height: int = 90
    logarithmic: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Band:
    """A phase, shaded. first, end: steps; opens: it is the first of its stage"""

    name: str
    first: float
    end: float
    opens: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure and its text.

    title:   plain text
    figure:  Plotly's JSON
    caption: Markdown of one paragraph
    legend:  names and colours; below the figure, since a legend inside one covers curves on a narrow page
    """

    title: str
    figure: dict[str, Any]
    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @property
    def height(self) -> int:
        return int(self.figure["layout"]["height"])


def curves_chart(title: str, panels: Sequence[Panel], bands: Sequence[Band] = (), *, caption: str = "") -> Chart:
    """Returns panels below each other over one x axis, the step. Panels without a finite value are left out."""
    import plotly.graph_objects as go

    panels = [panel for panel in panels if any(np.isfinite(curve.series.values).any() for curve in panel.curves)]
    inner = sum(panel.height for panel in panels) + _GAP * (len(panels) - 1)
    above = _TOP + (_NAMES if bands else 0)
    figure = go.Figure(layout=_layout(inner + above + _BOTTOM, top=above))
    legend: dict[str, str] = {}
    top = float(inner)
    for number, panel in enumerate(panels, start=1):
        x, y = (f"{axis}{number if number > 1 else ''}" for axis in "xy")
        domain = [max(0.0, (top - panel.height) / inner), top / inner]
        for curve in panel.curves:
            figure.add_trace(_line(curve, x, y))
        names = {curve.name: curve.colour for curve in panel.curves if not curve.faint}
        if len(names) > 1:  # a single curve is named by the panel's title
            legend |= names
        is_last = number == len(panels)
        figure.update_layout(
            {
                f"xaxis{number}": {"anchor": y, "showticklabels": is_last, **({} if number == 1 else {"matches": "x"})},
                f"yaxis{number}": {"anchor": x, "domain": domain, **_y_axis(panel)},
            }
        )
        shift = _NAMES if bands and number == 1 else 0
        heading = _text(panel.title, x=0, y=domain[1], xanchor="left", yanchor="bottom", size=12)
        figure.add_annotation({**heading, "yshift": shift})
        for value, text in panel.limits.items():
            line = {"color": ALARM, "width": 1, "dash": "dash"}
            figure.add_shape(type="line", xref="x domain", x0=0, x1=1, yref=y, y0=value, y1=value, line=line)
            height = math.log10(value) if panel.logarithmic else value
            label = _text(text, x=1, y=height, xanchor="right", yanchor="bottom", size=10)
            figure.add_annotation({**label, "yref": y, "font": {"size": 10, "color": ALARM}})
        top -= panel.height + _GAP
    if panels:
        _shade(figure, bands)
        figure.update_layout({f"xaxis{len(panels)}": {"title": {"text": "step", "standoff": 8}}})
    return Chart(title, _plain(figure), caption, list(legend.items()))


def bars_chart(
    title: str,
    names: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    *,
    unit: str,
    caption: str = "",
    stacked: bool = False,
) -> Chart:
    """Returns horizontal bars: for each name one bar of each entry of ``values``, or all of them as one bar."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(8 + _BOTTOM + (15 * (1 if stacked else len(values)) + 12) * len(names), top=8))
    legend = list(zip(values, cycle(COLOURS)))
    for (entry, colour), of_names in zip(legend, values.values(), strict=True):
        hover = f"%{{x:.4g}} {unit}<extra>{entry}</extra>"
        figure.add_trace(
            go.Bar(name=entry, y=list(names), x=[_number(v) for v in of_names], orientation="h",
                   marker={"color": colour}, hovertemplate=hover)
        )  # fmt: skip
    figure.update_layout(
        barmode="stack" if stacked else "group",
        bargap=0.25,
        hovermode="closest",
        xaxis={"title": {"text": unit, "standoff": 8}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return Chart(title, _plain(figure), caption, legend if len(values) > 1 else ())


def timeline_chart(title: str, bars: Sequence[tuple[str, float, float, str, str]], *, caption: str = "") -> Chart:
    """Returns spans of time. bars: row, begin and end in seconds since 1970, kind (of the legend), text"""
    import plotly.graph_objects as go

    rows = list(dict.fromkeys(row for row, *_ in bars))
    first = min((begin for _, begin, *_ in bars), default=0.0)
    kinds = list(dict.fromkeys(kind for *_, kind, _ in bars))
    figure = go.Figure(layout=_layout(8 + _BOTTOM + 30 * len(rows), top=8))
    colours = {"done": COLOURS[2], "running": COLOURS[0], "failed": ALARM, "interrupted": COLOURS[1]}
    for kind in kinds:
        mine = [bar for bar in bars if bar[3] == kind]
        figure.add_trace(
            go.Bar(
                name=kind, orientation="h", y=[row for row, *_ in mine],
                base=[1000 * begin for _, begin, *_ in mine],  # milliseconds: Plotly's dates
                x=[1000 * max(end - begin, 0.5) for _, begin, end, *_ in mine],
                marker={"color": colours.get(kind, GREY)}, width=0.55,
                customdata=[text for *_, text in mine], hovertemplate="%{customdata}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        barmode="overlay",
        hovermode="closest",
        xaxis={
            "type": "date",
            "title": {"text": f"UTC, from {time.strftime('%Y-%m-%d', time.gmtime(first))}", "standoff": 8},
            "nticks": 4,
            "tickformatstops": _DATES,
            "ticklabeloverflow": "hide past domain",
        },
        yaxis={"autorange": "reversed", "automargin": True},
    )
    legend = [(kind, colours.get(kind, GREY)) for kind in kinds]
    return Chart(title, _plain(figure), caption, legend if len(kinds) > 1 else ())


def _line(curve: Curve, x: str, y: str) -> Any:
    import plotly.graph_objects as go

    line: dict[str, Any] = {"color": curve.colour, "width": 1 if curve.faint else 1.8}
    if curve.dashed:
        line["dash"] = "dot"
    if curve.stepped:
        line["shape"] = "hv"
    return go.Scatter(
        x=[int(step) if step == int(step) else step for step in curve.series.steps.tolist()],
        y=[_number(value) for value in curve.series.values.tolist()],
        name=curve.name,
        mode="lines+markers" if curve.points or len(curve.series) == 1 else "lines",
        marker={"size": 5},
        line=line,
        opacity=0.3 if curve.faint else 1,
        hoverinfo="skip" if curve.faint else None,
        hovertemplate=None if curve.faint else "%{y:.5g}",
        xaxis=x,
        yaxis=y,
    )


def _number(value: float | None) -> float | None:
    """Rounds to what can be seen; None, a gap, for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _y_axis(panel: Panel) -> dict[str, Any]:
    axis: dict[str, Any] = {"nticks": 6 if panel.height > 120 else 3, "exponentformat": "e"}
    if panel.logarithmic:
        axis |= {"type": "log", "tickformat": ".2~g"}
    if panel.from_zero:
        axis["rangemode"] = "tozero"
    return axis


def _shade(figure: Any, bands: Sequence[Band]) -> None:
    """Shades every second phase over all panels, and names the phases that are wide enough (the page's script)."""
    total = max((band.end for band in bands), default=0) - min((band.first for band in bands), default=0)
    for number, band in enumerate(bands):
        if band.opens:
            figure.add_vline(x=band.first, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")
        if number % 2 == 0:
            figure.add_vrect(x0=band.first, x1=band.end, fillcolor=GREY, opacity=0.10, line_width=0, layer="below")
        named = _text(band.name, size=10, x=(band.first + band.end) / 2, y=1, xanchor="center", yanchor="bottom")
        share = (band.end - band.first) / total if total else 1
        figure.add_annotation({**named, "xref": "x", "name": f"share {share:.4f}"})


def _text(text: str, *, x: float, y: float, size: int, xanchor: str, yanchor: str) -> dict[str, Any]:
    place = {"xref": "paper", "yref": "paper", "x": x, "y": y, "xanchor": xanchor, "yanchor": yanchor}
    return {**place, "text": text, "showarrow": False, "font": {"size": size}}


def _layout(height: int, *, top: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "margin": {"l": _LEFT, "r": 14, "t": top, "b": _BOTTOM},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "dragmode": False,  # on a phone a drag scrolls the page
        "showlegend": False,
    }


def _plain(figure: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    return found
