"""Tables of what was measured after training: probes, held-out accuracy, planning, surprise."""

from collections.abc import Iterator, Mapping
from typing import Any

from vjepa_scale.report.blocks import Table
from vjepa_scale.report.read import RunRecord, StageRecord

_NAMES = {"linear_probe": "linear probe", "knn": "k-NN", "attentive_probe": "attentive probe"}


def result_blocks(run: RunRecord) -> Iterator[Table]:
    """Yields a table for each probe stage, and those of the demo's summary.json. Leaves out what is not there."""
    for record in run.stages:
        if record.evaluation is not None and (rows := list(_probe(record.evaluation))):
            yield Table(("measure", "accuracy"), rows, _about(record), numbers=frozenset({1}))
    if run.summary is not None:
        yield from _summary(run.summary)


def _probe(found: Mapping[str, Any]) -> Iterator[list[str]]:
    keys = {"attentive probe": "accuracy", f"{found.get('neighbours', 5)}-NN": "knn_draws", "linear": "linear_draws"}
    for name, key in keys.items():
        value = found.get(key)
        if value is None:
            value = found.get(key.removesuffix("_draws"))
        if (text := _accuracy(value)) is not None:
            yield [name, text]
    for name in ("chance", "majority"):
        if (text := _accuracy(found.get(name))) is not None:
            yield [name, text]


def _about(record: StageRecord) -> str:
    found = record.evaluation or {}
    return (
        f"{record.name}: {found.get('clips', '?')} held-out clips of {found.get('evaluated_on', '?')}, "
        f"{found.get('classes', '?')} classes, {found.get('labels_per_class') or 'all'} labels per class"
    )


def _accuracy(value: Any) -> str | None:
    """Formats a share, or the mean and spread over draws of labels."""
    if isinstance(value, Mapping):
        mean, std = value.get("mean"), value.get("std")
        text = _accuracy(mean)
        return f"{text} ± {100 * std:.1f}" if text is not None and isinstance(std, int | float) else text
    return f"{value:.1%}" if isinstance(value, int | float) and not isinstance(value, bool) else None


def _part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a section of a JSON value; empty if it is absent or something else."""
    value = found.get(key)
    return value if isinstance(value, Mapping) else {}


def _summary(found: Mapping[str, Any]) -> Iterator[Table]:
    tasks = {"joint": found, **_part(found, "parts")}
    columns = [
        (f"{_NAMES[measure]}: {task}", of_task[measure], _part(of_task, f"{measure}_std"))
        for measure in ("linear_probe", "knn")
        for task, of_task in tasks.items()
        if isinstance(of_task, Mapping) and isinstance(of_task.get(measure), Mapping)
    ]
    attentive = _part(found, "attentive_probe")
    if columns:
        names = list(columns[0][1])
        rows = [
            [
                name,
                *(_accuracy({"mean": values.get(name), "std": stds.get(name)}) or "–" for _, values, stds in columns),
                _accuracy(attentive.get(name)) or "–",
            ]
            for name in names
        ]
        head = ["features", *(title for title, *_ in columns), "attentive probe: joint"]
        yield Table(head, rows, "Frozen features, few labels, held-out clips", numbers=frozenset(range(1, len(head))))
    rows = []
    if planning := _part(found, "planning"):
        policies = {"success": "planned actions", "random": "random actions", "still": "no action"}
        rows += [
            [f"the robot reaches its goal: {name}", text, f"{planning.get('episodes', '?')} episodes"]
            for key, name in policies.items()
            if (text := _accuracy(planning.get(key))) is not None
        ]
    if surprise := _part(found, "surprise"):
        pairs = f"{surprise.get('pairs', '?')} pairs of videos"
        kinds = {"pairs_right": "trained", "untrained": "untrained"}
        rows += [
            [f"impossible motion surprises more: {name}", text, pairs]
            for key, name in kinds.items()
            if (text := _accuracy(surprise.get(key))) is not None
        ]
    if rows:
        yield Table(("measure", "share", "of"), rows, "Planning and surprise", numbers=frozenset({1}))


def headline_figures(run: RunRecord) -> dict[str, str]:
    """Returns one figure of each thing that was measured, for a comparison of runs."""
    out: dict[str, str] = {}
    for record in run.stages:
        if record.evaluation is not None:
            out |= {f"{record.name}: {name}": accuracy for name, accuracy in _probe(record.evaluation)}
    found = run.summary or {}
    for measure in ("linear_probe", "knn"):
        for task, of_task in {"joint": found, **_part(found, "parts")}.items():
            if isinstance(of_task, Mapping) and (text := _accuracy(_part(of_task, measure).get("trained"))):
                out[f"{_NAMES[measure]}, {task}"] = text
    for section, key, name in (
        ("planning", "success", "planning"),
        ("surprise", "pairs_right", "surprise, pairs right"),
    ):
        if (text := _accuracy(_part(found, section).get(key))) is not None:
            out[name] = text
    return out
