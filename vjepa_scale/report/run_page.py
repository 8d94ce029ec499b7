"""The sections of a run's page, from its files."""

import base64
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command
from vjepa_scale.recipe import Phase
from vjepa_scale.report import curves
from vjepa_scale.report.blocks import Charts, Code, Image, Section, Table, Text
from vjepa_scale.report.charts import bars_chart
from vjepa_scale.report.read import PICTURES, RunRecord, StageRecord
from vjepa_scale.report.results import result_blocks
from vjepa_scale.report.seen import feature_pictures, mask_pictures
from vjepa_scale.report.series import POINTS
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
