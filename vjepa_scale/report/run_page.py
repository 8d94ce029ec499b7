"""The sections of a run's page, from its files."""

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command
from vjepa_scale.recipe import Phase
from vjepa_scale.report import curves
from vjepa_scale.report.blocks import Charts, Code, Image, Section, Table, Text
from vjepa_scale.report.charts import bars_chart
from vjepa_scale.report.pictures import feature_pictures, mask_pictures
from vjepa_scale.report.read import PICTURES, POINTS, RunRecord, StageRecord
from vjepa_scale.report.stages import stage_blocks

# Larger files of RUN/pictures are left out of the page.
PICTURE_BYTES = 1_000_000
MASKS = (
    "Clips of the first step of each geometry, cropped as training crops them. Dark: hidden from the encoder. Orange: "
    "to be predicted."
)


def run_sections(run: RunRecord, *, features: bool | None) -> list[Section]:
    """Returns the sections about one run.

    features: draw patch features: yes, no, or None: unless the encoder is large for this machine
    """
    lines = curves.lines_of([run])
    return [
        Section("stages", "Stages", list(stage_blocks(run))),
        Section("training", "Training", list(_training(run, lines))),
        Section("collapse", "Collapse", list(_collapse(run, lines))),
        Section("speed", "Throughput", list(_speed(run, lines))),
        Section("data", "Data", list(_data(run, lines))),
        Section("masks", "Masks", list(_masks(run))),
        Section("features", "Features", list(_features(run, features))),
        Section("results", "Results", list(_results(run, lines))),
        Section("recipe", "Recipe, versions, commands", list(_recipe(run))),
    ]


# -- curves ------------------------------------------------------------------------------------------


def _training(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    if not lines:
        yield Text("No step yet.", remark=True)
    for columns, main in ((1, True), (2, False)):
        yield Charts([curves.loss_chart(line) for line in lines.values() if line[0].trains_encoder == main], columns)
    if any(record.metrics.rows > POINTS for record in run.stages):
        yield Text(
            f"Curves of more than {POINTS:,} rows show the minimum and maximum of {POINTS // 2:,} equal parts.",
            remark=True,
        )
    for record in run.stages:
        loss = record.metrics.columns.get("loss")
        if loss is not None and (count := int((~np.isfinite(loss.values)).sum())):
            yield Text(
                f"The loss of {record.name} is not finite in {count:,} of {len(loss):,} steps: gaps in its curve."
            )
        if (spikes := record.status.spikes) is not None:
            yield Text(f"Spikes of {record.name}: {spikes}.")
    yield from _lacking(run, "training")


def _collapse(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    found = curves.alarms(run)
    if found:
        yield Text("Beyond a limit: " + "; ".join(found) + ". See docs/watching.md.")
    yield Charts(curves.collapse_charts(lines), 3)
    yield from _lacking(run, "collapse")


def _speed(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    shares = {record.name: found for record in run.stages if (found := _shares(record))}
    parts = [part for part in ("computing", "waiting for data", "saving") if any(part in s for s in shares.values())]
    if len(parts) > 1:
        values = {part: [100 * share.get(part, 0.0) for share in shares.values()] for part in parts}
        caption = "Means over a stage's rows; the rest is computing."
        yield Charts(
            [
                bars_chart(
                    "Where the time goes", list(shares), values, unit="% of the time", caption=caption, stacked=True
                )
            ]
        )
    yield Charts(curves.speed_charts(lines), 3)
    yield from _lacking(run, "speed")


def _shares(record: StageRecord) -> dict[str, float]:
    """Returns the mean shares of time of a stage; empty without their columns."""
    columns = {"waiting for data": "waiting", "saving": "saving"}
    found = {
        part: float(np.nanmean(series.values))
        for part, name in columns.items()
        if (series := record.metrics.columns.get(name)) is not None and series.last is not None
    }
    return {"computing": max(0.0, 1 - sum(found.values())), **found} if found else {}


def _lacking(run: RunRecord, section: str) -> Iterator[Text]:
    """Says which columns this run's metrics do not have, for example since it is of an earlier version."""
    missing = curves.missing_columns([run], curves.MISSABLE[section])
    if missing and any(record.metrics.rows for record in run.stages):
        yield Text("Not in this run's metrics: " + ", ".join(f"`{name}`" for name in missing) + ".", remark=True)


# -- data --------------------------------------------------------------------------------------------


def _data(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    from vjepa_scale.training.planned_start import planned_order

    rows, charts = [], []
    for record in run.stages:
        step = record.status.step
        if not record.metrics.rows or step is None:
            continue
        try:
            phases, order, manifests = planned_order(record.stage)
            step = min(max(step, phases[0].first), phases[-1].end)
            base, drawn = order.drawn(phases[0].first), order.drawn(step)
        except (UserError, OSError) as error:
            yield Text(f"The mixture of {record.name} is not known: {error}", remark=True)
            continue
        clips = {name: drawn[name] - base[name] for name in drawn if drawn[name] > base[name]}
        planned = {name: _planned(name, phases, step) for name in clips}
        total, expected = max(1, sum(clips.values())), max(1e-9, sum(planned.values()))
        for name, count in clips.items():
            records = manifests[name].records
            rows.append(
                [
                    record.name,
                    name,
                    f"{count:,}",
                    f"{count / total:.1%}",
                    f"{records:,}",
                    f"{drawn[name] / records:.2f}",
                ]
            )
        if len(clips) > 1:
            values = {
                "weights of the recipe": [100 * planned[name] / expected for name in clips],
                "drawn": [100 * count / total for count in clips.values()],
            }
            charts.append(bars_chart(f"{record.name}: mixture", list(clips), values, unit="% of the clips"))
    if rows:
        head = ("stage", "data set", "clips drawn", "share", "records", "passes")
        caption = "Clips drawn so far. Passes: over all records, with the stages that this one continues from."
        yield Table(head, rows, caption, numbers=frozenset({2, 3, 4, 5}))
    yield Charts(charts, 2)
    yield Charts([chart for of_stage in lines.values() if (chart := curves.data_loss_chart(of_stage)) is not None])
    if run.substituted:
        replaced = [[*where, f"{count:,}"] for where, count in run.substituted.most_common()]
        head_of_causes = ("stage", "data set", "cause", "clips replaced")
        yield Table(
            head_of_causes, replaced, "Clips that were replaced since they do not decode", numbers=frozenset({3})
        )
    elif any(record.metrics.rows for record in run.stages):
        yield Text("No clip was replaced: all that were drawn decode.")
    yield from _lacking(run, "data")


def _planned(name: str, phases: Sequence[Phase], step: int) -> float:
    """Returns the clips of a data set before a step by the weights alone."""
    return sum(
        phase.mixture.get(name, 0.0)
        / sum(phase.mixture.values())
        * phase.global_batch
        * min(max(0, step - phase.first), phase.steps)
        for phase in phases
    )


# -- pictures ----------------------------------------------------------------------------------------


def _masks(run: RunRecord) -> Iterator[Any]:
    yield Text(MASKS)
    yield from mask_pictures([record.stage for record in run.stages])


def _features(run: RunRecord, features: bool | None) -> Iterator[Any]:
    if features is False:
        yield Text("Left out (`--no-features`).", remark=True)
        return
    lines = [line for line in run.lineages if line[0].stage.has_target_encoder]
    if not lines:
        yield Text("No stage of this run trains an encoder.", remark=True)
    for line in lines:
        checkpoints = [path for record in line for path in record.checkpoints]
        stages = [record.stage for record in line if record.checkpoints]
        yield Text(
            "The first three principal components of the target encoder's patch features as red, green and blue, over "
            "the clips that are shown. Parts that the encoder takes for the same thing get one colour."
        )
        yield from feature_pictures(run.recipe, stages, checkpoints, forced=features is True)


def _results(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    found = [chart for of_stage in lines.values() if (chart := curves.evaluation_chart(of_stage)) is not None]
    blocks = list(result_blocks(run))
    pictures = list(_pictures(run.folder / PICTURES))
    if not found and not blocks and not pictures:
        yield Text("Nothing has been evaluated yet: no evaluations.jsonl, no probe, no summary.json.", remark=True)
    if found:
        yield Charts(found)
    yield from blocks
    yield from pictures


def _pictures(folder: Path) -> Iterator[Image]:
    """Yields pictures of planning that a tool wrote into the run. Masks and features are drawn above."""
    captions = {
        "episode.png": "Planning: what the camera sees at each step of an episode, and the goal",
        "landscape.png": "Planning: energy over the first action",
    }
    for name, caption in captions.items():
        path = folder / name
        if path.is_file() and path.stat().st_size <= PICTURE_BYTES:
            yield Image(
                f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
                caption,
                wide=name == "episode.png",
            )


# -- recipe ------------------------------------------------------------------------------------------


def _recipe(run: RunRecord) -> Iterator[Any]:
    source = run.source
    facts = {
        "launched": f"{source.get('time', '?')} on {source.get('host', '?')} by {source.get('user', '?')}"
        if source
        else None,
        "commit": _commit(source),
        "code": source.get("code_digest") and f"code/{source['code_digest']}",
        **run.libraries,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value]
    if rows:
        yield Table(("what", "version"), rows, code=frozenset({1}))
    yield Code("Commands", "\n".join(commands(run)))
    yield Code("The resolved recipe", run.yaml, folded=True)


def _commit(source: dict[str, Any]) -> str | None:
    if not source.get("commit"):
        return None
    return f"{source['commit'][:12]} of {source.get('branch') or '?'}" + (
        ", with local changes" if source.get("dirty") else ""
    )


def commands(run: RunRecord) -> Sequence[str]:
    """Returns commands that go on with a run: resume, look after it, export."""
    folder = shlex.quote(str(run.folder))
    out = [
        "# continue where it stopped (or do nothing, where it is complete)",
        f"{command('launch')} {shlex.quote(str(run.folder / 'recipe.yaml'))} run.dir={folder}",
    ]
    if isinstance(given := run.source.get("command"), list) and run.source.get("folder"):
        words = [str(word) for word in given]
        where = next((place for place, word in enumerate(words) if "launch" in word), None)
        if where is not None:
            original = shlex.join(words[where + 1 :])
            out += [f"# as it was launched, in {run.source['folder']}", f"{command('launch')} {original}"]
    out += ["# state of each stage", f"{command('launch')} status {folder}"]
    out += [
        "# weights for this package, or for transformers",
        f"{command('consolidate')} {folder} --to safetensors --out DIR",
    ]
    out += [f"{command('consolidate')} {folder} --to huggingface --out DIR"]
    return out


# -- results -----------------------------------------------------------------------------------------


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
