"""The sections of a run's page, from its files."""

import base64
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command
from vjepa_scale.monitor.states import ALIVE, UNFINISHED_ENDS, clock, duration
from vjepa_scale.report import curves
from vjepa_scale.report.blocks import Charts, Code, Image, Pictures, Section, Table, Text, Tile
from vjepa_scale.report.charts import bars_chart, timeline_chart
from vjepa_scale.report.read import PICTURES, RunRecord, StageRecord
from vjepa_scale.report.results import result_blocks
from vjepa_scale.report.seen import feature_pictures, mask_pictures
from vjepa_scale.report.series import POINTS, smoothed
from vjepa_scale.run.events import Attempt

# Larger files of RUN/pictures are left out of the page.
PICTURE_BYTES = 1_000_000


def run_sections(run: RunRecord, *, features: bool | None) -> list[Section]:
    """Returns the sections about one run.

    features: draw patch features: yes, no, or None: unless the encoder is large for this machine
    """
    lines = curves.lines_of([run])
    return [
        Section("stages", "Stages", list(_chain(run))),
        Section("training", "Training", list(_training(run, lines))),
        Section("collapse", "Collapse", list(_collapse(run, lines))),
        Section("speed", "Throughput", list(_speed(run, lines))),
        Section("data", "Data", list(_data(run, lines))),
        Section("masks", "Masks", list(_masks(run))),
        Section("features", "Features", list(_features(run, features))),
        Section("results", "Results", list(_results(run, lines))),
        Section("recipe", "Recipe, versions, commands", list(_recipe(run))),
    ]


def tiles(run: RunRecord) -> list[Tile]:
    """Returns the figures at the top: state, last figures of the encoder's training, cost."""
    out = [_state(run)]
    lines = [line for line in run.lineages if line[0].stage.has_target_encoder] or run.lineages
    record = next((record for line in lines for record in reversed(line) if record.metrics.rows), None)
    if record is not None:
        loss, rank = (record.metrics.columns.get(name) for name in ("loss", "effective_rank"))
        if loss is not None and (mean := smoothed(loss).last) is not None:
            out.append(Tile("loss", f"{mean:.4f}", f"{record.name}, step {int(loss.steps[-1]) + 1:,}"))
        if rank is not None and rank.last is not None:
            out.append(Tile("effective rank", f"{rank.last:.1f}", f"of {run.recipe.model.encoder.width} dimensions"))
        if (speed := record.status.clips_per_s) is not None:
            out.append(Tile("clips/s", f"{speed:,.1f}", f"{record.name}, last steps"))
    if (best := _best(run)) is not None:
        out.append(best)
    hours = sum(record.rank_seconds for record in run.stages) / 3600
    unit = "GPU-hours" if run.recipe.engine.device != "cpu" else "process-hours"
    out.append(Tile(unit, f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}", "all stages and attempts"))
    begun = [record for record in run.stages if record.attempts]
    restarts = sum(len(record.attempts) - 1 for record in begun)
    return [*out, Tile("restarts", str(restarts), f"in {len(begun)} stages")]


def _state(run: RunRecord) -> Tile:
    """Returns the state of the whole run: done, or the first stage that is not and its state."""
    bad = next((record for record in run.stages if record.status.state in UNFINISHED_ENDS), None)
    active = next((record for record in run.stages if record.status.state in ALIVE), None)
    left = next((record for record in run.stages if record.status.state != "done"), None)
    if (record := bad or active or left) is None:
        return Tile("state", "done", "all stages", "good")
    return Tile("state", record.status.state, record.name, "bad" if record is bad else "")


def _best(run: RunRecord) -> Tile | None:
    """Returns the best evaluated checkpoint: by k-NN where there are labels, else by the loss on held-out clips."""
    rows = [(record.name, row) for record in run.stages for row in record.evaluations]
    by_knn = [(name, row) for name, row in rows if isinstance(row.get("knn"), int | float)]
    if by_knn:
        name, row = max(by_knn, key=lambda item: (item[1]["knn"], item[1].get("linear") or 0, item[1]["step"]))
        return Tile("best checkpoint", f"step {row['step']:,}", f"{name}, k-NN {row['knn']:.1%}")
    by_loss = [(name, row) for name, row in rows if isinstance(row.get("held_out_loss"), int | float)]
    if by_loss:
        name, row = min(by_loss, key=lambda item: item[1]["held_out_loss"])
        return Tile("best checkpoint", f"step {row['step']:,}", f"{name}, held-out loss {row['held_out_loss']:.4f}")
    return None


# -- stages ------------------------------------------------------------------------------------------


def _chain(run: RunRecord) -> Iterator[Any]:
    if run.status.problem is not None:
        yield Text(f"Slurm does not answer ({run.status.problem}): states are from the run's files.", remark=True)
    rows = [_stage_row(record) for record in run.stages]
    head = ("stage", "state", "steps", "attempts", "time at work", "loss", "clips/s", "checkpoint", "starts from")
    yield Table(head, rows, numbers=frozenset({2, 3, 4, 5, 6}))
    bars = [
        (record.name, attempt.started["time"], until, _end_of(attempt, record), _attempt_in_words(attempt, until))
        for record in run.stages
        for attempt, until in zip(record.attempts, record.until, strict=True)
        if attempt.started is not None
    ]
    if bars:
        yield Charts([timeline_chart("Attempts", bars, caption="Each bar is one attempt at a stage, until its last sign of life.")])
    phases = [row for record in run.stages for row in _phase_rows(record)]
    yield Table(
        ("stage", "phase", "steps", "clip", "tokens", "batch", "learning rate"),
        phases,
        "Phases, as planned",
        numbers=frozenset({2, 4, 5}),
    )
    errors = [
        (record.name, clock(row["time"], 0), f"{row['kind']}: {row['message']}".split("\n")[0][:300])
        for record in run.stages
        for attempt in record.attempts
        if (row := attempt.end) is not None and row["event"] == "failed"
    ]
    if errors:
        yield Table(("stage", "time", "error"), errors, "Failures")


def _stage_row(record: StageRecord) -> list[str]:
    status, work = record.status, sum(
        max(0.0, until - attempt.started["time"])
        for attempt, until in zip(record.attempts, record.until, strict=True)
        if attempt.started is not None
    )
    done = "–" if status.step is None else f"{status.step:,}"
    return [
        record.name,
        status.state + (f": {status.detail}" if status.detail else ""),
        f"{done} of {status.last_step:,}" if status.last_step is not None else done,
        str(len(record.attempts)),
        duration(work) if work else "–",
        "–" if status.loss is None else f"{status.loss:.4f}",
        "–" if status.clips_per_s is None else f"{status.clips_per_s:,.1f}",
        status.checkpoint or "–",
        f"{record.stage.starts_by}: {record.stage.starts_from}" if record.stage.starts_by else "fresh weights",
    ]


def _end_of(attempt: Attempt, record: StageRecord) -> str:
    if attempt.end is not None:
        return str(attempt.end["event"])
    if attempt is record.attempts[-1] and record.status.state in ("running", "ending"):
        return "running"
    return "cancelled" if any(row["event"] == "cancelled" for row in attempt.later) else "ended without a word"


def _attempt_in_words(attempt: Attempt, until: float) -> str:
    started = attempt.started or {}
    words = f"{started.get('kind', '')} from step {started.get('step', '?')}, {started.get('world_size', '?')} ranks"
    saved = "" if attempt.saved is None else f"<br>saved step {attempt.saved}"
    return f"{clock(started['time'], 0)}, {duration(until - started['time'])}<br>{words}{saved}"


def _phase_rows(record: StageRecord) -> Iterator[list[str]]:
    for phase in record.phases:
        lr = f"{phase.lr(phase.first):.3g} → {phase.last_lr:.3g}"
        yield [
            record.name,
            phase.name,
            f"{phase.first:,} – {phase.end - 1:,}",
            f"{phase.frames} × {phase.size[0]}×{phase.size[1]}",
            record.stage.tokens_in_words(phase, phase.frames),
            f"{phase.global_batch:,}",
            lr,
        ]


# -- curves ------------------------------------------------------------------------------------------


def _training(run: RunRecord, lines: dict[str, list[curves.Line]]) -> Iterator[Any]:
    if not lines:
        yield Text("No step yet.", remark=True)
    is_main = {name: any(record.stage.has_target_encoder for record in line[0].records) for name, line in lines.items()}
    for columns, main in ((1, True), (2, False)):
        yield Charts([curves.loss_chart(line) for name, line in lines.items() if is_main[name] == main], columns)
    if any(record.metrics.rows > POINTS for record in run.stages):
        yield Text(f"Curves of more than {POINTS:,} rows show the minimum and maximum of {POINTS // 2:,} equal parts.", remark=True)
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
        yield Charts([bars_chart("Where the time goes", list(shares), values, unit="% of the time", caption=caption)])
    yield Charts(curves.speed_charts(lines), 3)
    yield from _lacking(run, "speed")


def _shares(record: StageRecord) -> dict[str, float]:
    """Returns the mean shares of time of a stage; empty without their columns."""
    columns = {"waiting for data": "waiting", "saving": "saving"}
    found = {
        part: float(series.values[~_nan(series.values)].mean())
        for part, name in columns.items()
        if (series := record.metrics.columns.get(name)) is not None and not _nan(series.values).all()
    }
    return {"computing": max(0.0, 1 - sum(found.values())), **found} if found else {}


def _nan(values: Any) -> Any:
    return values != values


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
        planned = {name: sum(phase.mixture.get(name, 0) / sum(phase.mixture.values()) * _clips(phase, step) for phase in phases) for name in clips}  # fmt: skip
        total, expected = max(1, sum(clips.values())), max(1e-9, sum(planned.values()))
        for name, count in clips.items():
            records = manifests[name].records
            rows.append([record.name, name, f"{count:,}", f"{count / total:.1%}", f"{records:,}", f"{drawn[name] / records:.2f}"])
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
        head = ("stage", "data set", "cause", "clips replaced")
        found = [[*where, f"{count:,}"] for where, count in run.substituted.most_common()]
        yield Table(head, found, "Clips that were replaced since they do not decode", numbers=frozenset({3}))
    elif any(record.metrics.rows for record in run.stages):
        yield Text("No clip was replaced: all that were drawn decode.")
    yield from _lacking(run, "data")


def _clips(phase: Any, step: int) -> int:
    return phase.global_batch * min(max(0, step - phase.first), phase.steps)


# -- pictures ----------------------------------------------------------------------------------------


def _masks(run: RunRecord) -> Iterator[Any]:
    yield Text(
        "Clips of the first step of each geometry, cropped as training crops them. Dark: hidden from the encoder. Orange: "
        "to be predicted."
    )
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
            yield Image(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", caption, wide=name == "episode.png")


# -- recipe ------------------------------------------------------------------------------------------


def _recipe(run: RunRecord) -> Iterator[Any]:
    source = run.source
    facts = {
        "launched": f"{source.get('time', '?')} on {source.get('host', '?')} by {source.get('user', '?')}" if source else None,
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
    return f"{source['commit'][:12]} of {source.get('branch') or '?'}" + (", with local changes" if source.get("dirty") else "")


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
    out += ["# weights for this package, or for transformers", f"{command('consolidate')} {folder} --to safetensors --out DIR"]
    out += [f"{command('consolidate')} {folder} --to huggingface --out DIR"]
    return out
