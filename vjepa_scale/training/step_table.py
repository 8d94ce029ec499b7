"""Sums a trace of PyTorch's profiler to a table: where each step's time went, and which operators took most of it.

The trace is Chrome's JSON as PyTorch exports it. Its times are microseconds. Of a GPU, an operation counts for the step
and the part of it that launched it, though it runs later. Does not import PyTorch.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Span = tuple[float, float]

# The parts of a step, in their order: the names of core/log.py's ``region``.
PARTS = ("load", "forward", "backward", "observe", "reduce", "optimizer", "ema", "save")
OPERATORS = 25

_STEP = re.compile(r"step (\d+)")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Of the host, Gloo's and NCCL's names for a collective from its start to its end; of a GPU, NCCL's kernels.
_COLLECTIVE = re.compile(r"(gloo|nccl):|nccl(Dev)?Kernel|ncclKernel", re.IGNORECASE)


def step_name(step: int) -> str:
    """Returns the name of a step's region in a trace."""
    return f"step {step}"


def table_of(trace: Row) -> Row:
    """Returns ``steps`` and ``operators`` of a trace, whose times are seconds.

    Of a step: ``seconds`` of the host, ``host`` by part, with ``other``; ``collectives``: while at least one was at
    work. With a GPU also ``device`` by part, the sum of its operations without collectives; ``busy``: while at least
    one of these was at work; ``exposed``: while collectives were at work and none of these.
    Of an operator: ``name``, ``calls``, ``host`` without the operators that it calls, and ``device``.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = sorted((event for event in events if event.get("cat") == "user_annotation"), key=_span)
    steps = [event for event in marks if _STEP.fullmatch(event["name"])]
    work = _of_device(events)
    return {
        "steps": [_step(step, marks, work) for step in steps],
        "operators": _operators(events, work, steps),
    }


def _step(step: Row, marks: Sequence[Row], work: Sequence[Row]) -> Row:
    begin, end = _span(step)
    parts = [
        (_span(mark), mark["name"]) for mark in marks if mark["name"] in PARTS and begin <= float(mark["ts"]) < end
    ]
    host = {part: sum(b - a for (a, b), name in parts if name == part) for part in PARTS}
    host["other"] = end - begin - sum(host.values())
    found: Row = {"step": int(step["name"].split()[1]), "seconds": _s(end - begin), "host": _in_seconds(host)}
    own = [event for event in work if begin <= event["launched"] < end]
    if not own:
        clipped = ((max(a, begin), min(b, end)) for a, b in map(_span, filter(_is_collective, marks)))
        return found | {"collectives": _s(_length(_union((a, b) for a, b in clipped if a < b)))}
    starts = [first for (first, _), _ in parts]
    device: dict[str, float] = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in own:
        if not _is_collective(event):
            index = bisect_right(starts, event["launched"]) - 1
            during = index >= 0 and event["launched"] < parts[index][0][1]
            device[parts[index][1] if during else "other"] += float(event["dur"])
    busy = _union(_span(event) for event in own if not _is_collective(event))
    both = _union(map(_span, own))
    return found | {
        "device": _in_seconds(device),
        "busy": _s(_length(busy)),
        "collectives": _s(_length(_union(_span(event) for event in own if _is_collective(event)))),
        "exposed": _s(_length(both) - _length(busy)),
    }


def _of_device(events: Sequence[Row]) -> list[Row]:
    """Returns the operations of the device, each with the time at which the host has ``launched`` it."""
    launches = {_correlation(event): event for event in events if event.get("cat") in _LAUNCHES}
    found = []
    for event in events:
        if event.get("cat") in _DEVICE:
            launch = launches.get(_correlation(event))
            found.append(event | {"launched": float(launch["ts"] if launch else event["ts"])})
    return found


def _operators(events: Sequence[Row], work: Sequence[Row], steps: Sequence[Row]) -> list[Row]:
    """Returns those with most time of the device, or of the host if there is no device."""
    spans = [_span(step) for step in steps]
    found = defaultdict[str, Row](lambda: {"calls": 0, "host": 0.0, "device": 0.0})
    by_thread = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" and any(begin <= float(event["ts"]) < end for begin, end in spans):
            by_thread[event.get("tid")].append(event)
    for of_thread in by_thread.values():
        open_now: list[Row] = []
        for event in sorted(of_thread, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
            while open_now and _span(open_now[-1])[1] <= float(event["ts"]):
                open_now.pop()
            if open_now:
                found[open_now[-1]["name"]]["host"] -= float(event["dur"])
            row = found[event["name"]]
            row["calls"] += 1
            row["host"] += float(event["dur"])
            open_now.append(event)
    names = {
        event["args"]["External id"]: event["name"]
        for of_thread in by_thread.values()
        for event in of_thread
        if "External id" in event.get("args", {})
    }
    for event in work:
        if any(begin <= event["launched"] < end for begin, end in spans):
            # A kernel that no operator launched, such as a compiled one, has a row of its own.
            operator = names.get(event.get("args", {}).get("External id"))
            row = found[operator or event["name"]]
            row["device"] += float(event["dur"])
            row["calls"] += operator is None
    rows = [{"name": name, **row, "host": _s(row["host"]), "device": _s(row["device"])} for name, row in found.items()]
    rows.sort(key=lambda row: (row["device"], row["host"]), reverse=True)
    return rows[:OPERATORS]


def in_words(table: Row) -> str:
    """Returns the table as text."""
    parts = (*PARTS, "other")
    lines = ["Seconds of each step, of the host (the thread that trains)", ""]
    lines += _aligned(
        [["step", "all", *parts, "collectives"]]
        + [
            [row["step"], row["seconds"], *(row["host"][part] for part in parts), row["collectives"]]
            for row in table["steps"]
        ]
    )
    on_device = [row for row in table["steps"] if "device" in row]
    if on_device:
        lines += ["", "Seconds of the GPU's operations, by the part that launched them, without collectives", ""]
        lines += _aligned(
            [["step", "busy", "exposed", *parts]]
            + [
                [row["step"], row["busy"], row["exposed"], *(row["device"][part] for part in parts)]
                for row in on_device
            ]
        )
    lines += ["", "Operators, seconds over all these steps", ""]
    lines += _aligned(
        [["GPU", "host", "calls", "operator"][not on_device :]]
        + [[row["device"], row["host"], row["calls"], row["name"]][not on_device :] for row in table["operators"]]
    )
    return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    words = not isinstance(rows[-1][-1], int | float)  # a last column of words is aligned to the left
    return [
        "  ".join(
            cell if words and column == len(widths) - 1 else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        )
        for row in cells
    ]


# -- spans of time -------------------------------------------------------------------------------------------------


def _span(event: Row) -> Span:
    begin = float(event["ts"])
    return begin, begin + float(event["dur"])


def _union(spans: Iterable[Span]) -> list[Span]:
    """Returns the times that at least one of the spans covers, in order, without overlaps."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _is_collective(event: Row) -> bool:
    return _COLLECTIVE.match(event["name"]) is not None


def _correlation(event: Row) -> Any:
    return event.get("args", {}).get("correlation")


def _in_seconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: _s(value) for name, value in parts.items()}


def _s(microseconds: float) -> float:
    return round(microseconds * 1e-6, 7)
