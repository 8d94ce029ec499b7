"""What a run has done: the figures at the top of its page, its stages and attempts, its phases."""

from collections.abc import Iterator, Sequence
from typing import Any

from vjepa_scale.monitor.states import ALIVE, UNFINISHED_ENDS, clock, duration
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.report.blocks import Charts, Table, Text, Tile
from vjepa_scale.report.charts import timeline_chart
from vjepa_scale.report.curves import alarms
from vjepa_scale.report.read import RunRecord, StageRecord, smoothed
from vjepa_scale.run.events import Attempt


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
    if found := alarms(run):
        out.append(Tile("collapse?", f"{len(found)} beyond limits", "see below", "bad"))
    if (best := _best(run)) is not None:
        out.append(best)
    hours = sum(record.rank_seconds for record in run.stages) / 3600
    unit = "GPU-hours" if run.recipe.engine.device != "cpu" else "process-hours"
    out.append(Tile(unit, f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}", "all stages and attempts"))
    begun = [record for record in run.stages if record.attempts]
    restarts = sum(len(record.attempts) - 1 for record in begun)
    return [*out, Tile("restarts", str(restarts), f"of {len(begun)} stages" if len(begun) != 1 else "of 1 stage")]


def _state(run: RunRecord) -> Tile:
    """Returns the state of the launched stages: done, or the first one that is not and its state."""
    bad = next((record for record in run.stages if record.status.state in UNFINISHED_ENDS), None)
    active = next((record for record in run.stages if record.status.state in ALIVE), None)
    done = [record for record in run.stages if record.status.state == "done"]
    if (record := bad or active) is None:
        if not done:
            return Tile("state", "not launched")
        return Tile(
            "state",
            "done",
            "all stages" if len(done) == len(run.stages) else f"{len(done)} of {len(run.stages)} stages",
            "good",
        )
    return Tile("state", record.status.state, record.name, "bad" if record is bad else "")


def _best(run: RunRecord) -> Tile | None:
    """Returns the best evaluated checkpoint of the last stage that has one. Stages may have different geometries."""
    found = [(record.name, best) for record in run.stages if (best := record.status.best) is not None]
    if not found:
        return None
    name, best = found[-1]
    return Tile("best checkpoint", f"step {best.step:,}", f"{name}, {best.words}")


def stage_blocks(run: RunRecord) -> Iterator[Any]:
    """Yields the table of stages, the attempts over time, the phases, and what failed."""
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
        yield Charts(
            [
                timeline_chart(
                    "Attempts", bars, caption="Each bar is one attempt at a stage, until its last sign of life."
                )
            ]
        )
    yield phases_table([(record.stage, phase) for record in run.stages for phase in record.phases])
    errors = [
        (record.name, clock(row["time"], 0), f"{row['kind']}: {row['message']}".split("\n")[0][:300])
        for record in run.stages
        for attempt in record.attempts
        if (row := attempt.end) is not None and row["event"] == "failed"
    ]
    if errors:
        yield Table(("stage", "time", "error"), errors, "Failures")


def _stage_row(record: StageRecord) -> list[str]:
    status, work = (
        record.status,
        sum(
            max(0.0, until - attempt.started["time"])
            for attempt, until in zip(record.attempts, record.until, strict=True)
            if attempt.started is not None
        ),
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


def phases_table(phases: Sequence[tuple[Stage, Phase]]) -> Table:
    """Returns a row per phase: steps, clip, tokens, batch, learning rate."""
    head = ("stage", "phase", "steps", "clip", "tokens", "batch", "learning rate")
    return Table(head, list(_phase_rows(phases)), "Phases, as planned", numbers=frozenset({2, 4, 5}))


def _phase_rows(phases: Sequence[tuple[Stage, Phase]]) -> Iterator[list[str]]:
    for stage, phase in phases:
        lr = f"{phase.lr(phase.first):.3g} → {phase.last_lr:.3g}"
        yield [
            stage.name,
            phase.name,
            f"{phase.first:,} – {phase.end - 1:,}",
            f"{phase.frames} × {phase.size[0]}×{phase.size[1]}",
            stage.tokens_in_words(phase, phase.frames),
            f"{phase.global_batch:,}",
            lr,
        ]
