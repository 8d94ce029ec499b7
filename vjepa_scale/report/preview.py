"""The sections of a recipe's page, before anything is trained: plan, schedules, mixture, clips with masks."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.launch import plan
from vjepa_scale.launch.estimate import GPUS, estimate, fits
from vjepa_scale.recipe import Phase, Recipe, Stage, recipe_yaml
from vjepa_scale.report.blocks import Charts, Code, Section, Table, Text
from vjepa_scale.report.charts import Band, Chart, Curve, Panel, bars_chart, curves_chart
from vjepa_scale.report.pictures import mask_pictures
from vjepa_scale.report.read import Series, lineages
from vjepa_scale.report.run_page import MASKS
from vjepa_scale.report.stages import phases_table
from vjepa_scale.training.planned_start import planned_first, planned_order

# Points of a ramp.
_SAMPLES = 120

Planned = list[tuple[Stage, list[Phase]]]


def preview_sections(recipe: Recipe, *, source: object) -> list[Section]:
    """Returns the sections about a recipe. source: its file, for messages

    Raises UserError for a recipe that cannot be planned. Data that are not there are reported on the page.
    """
    stages = plan.chosen_stages(recipe, None)
    with plan.errors_name(source):
        planned = [(stage, stage.phases_from(planned_first(stage))) for stage in stages]
        description = "\n".join(plan.describe(stages, where=plan.site(recipe)))
    cluster = plan.chosen_cluster(recipe)
    objections = list(plan.objections(stages, source=source, cluster=cluster))
    return [
        Section("plan", "Plan", list(_plan(planned, description, objections))),
        Section("schedules", "Schedules", [Charts(list(_schedules(planned)))]),
        Section("mixture", "Mixture", list(_mixture(recipe, planned))),
        Section("masks", "Clips and masks", [Text(MASKS), *mask_pictures(stages)]),
        Section("recipe", "Recipe", [Code("The resolved recipe", recipe_yaml(recipe), folded=True)]),
    ]


def _plan(planned: Planned, description: str, objections: Sequence[str]) -> Iterator[Any]:
    for problem in objections:
        yield Text(f"**Refused now**: {problem}")
    phases = [(stage, phase) for stage, of_stage in planned for phase in of_stage]
    yield phases_table(phases)
    if planned[0][0].recipe.engine.device != "cpu" and (rows := list(_estimates(phases))):
        head = ("stage", "phase", "memory per GPU", "seconds a step", "GPU-hours", "days")
        yield Table(head, rows, "Computed, not measured", numbers=frozenset({2, 3, 4, 5}))
    yield Code("As a dry run prints it", description)


def _estimates(phases: Sequence[tuple[Stage, Phase]]) -> Iterator[list[str]]:
    for stage, phase in phases:
        try:
            found = estimate(stage, phase)
        except UserError:  # the plan names it
            continue
        if found is None:
            continue
        name = stage.recipe.launch.gpu
        room = f"{found.total / 1e9:.1f} GB of {name}'s {GPUS[name].memory / 1e9:.0f}"
        time = ["–"] * 3
        if found.step_s is not None and found.gpu_hours is not None and found.days is not None:
            time = [f"{found.step_s:.3g}", f"{found.gpu_hours:,.0f}", f"{found.days:.2g}"]
        yield [stage.name, phase.name, room + ("" if fits(found, stage.recipe) else ", more than fits"), *time]


def _schedules(planned: Planned) -> Iterator[Chart]:
    phases_of = {stage.name: phases for stage, phases in planned}
    for line in lineages([stage for stage, _ in planned]):
        phases = [phase for stage in line for phase in phases_of[stage.name]]
        bands = [
            Band(phase.name, phase.first, phase.end, opens=phase.stage if phase.first and not number else "")
            for stage in line
            for number, phase in enumerate(phases_of[stage.name])
        ]
        panels = [
            _sampled("learning rate", phases, Phase.lr, height=120),
            _sampled("weight decay", phases, Phase.weight_decay),
            _sampled("EMA momentum", phases, Phase.ema_momentum),
            _sampled("height of frames, pixels", phases, lambda phase, _: phase.size[0], from_zero=True),
            _sampled("frames of a clip", phases, lambda phase, _: phase.frames, from_zero=True),
            _sampled("clips of a batch", phases, lambda phase, _: phase.global_batch, from_zero=True),
        ]
        yield curves_chart(" → ".join(stage.name for stage in line), panels, bands)


def _sampled(
    title: str,
    phases: Sequence[Phase],
    of: Callable[[Phase, int], float | None],
    *,
    height: int = 60,
    from_zero: bool = False,
) -> Panel:
    """Returns the values of a schedule at some steps of each phase; no curve where a phase has no value."""
    steps = [
        int(step)
        for phase in phases
        for step in np.unique(np.linspace(phase.first, phase.end - 1, _SAMPLES).astype(int))
    ]
    by_step = {step: phase for phase in phases for step in steps if phase.first <= step < phase.end}
    values = [of(by_step[step], step) for step in steps]
    series = Series(np.array(steps, float), np.array([np.nan if value is None else value for value in values]))
    return Panel(title, [Curve(title, series)], height=height, from_zero=from_zero)


def _mixture(recipe: Recipe, planned: Planned) -> Iterator[Any]:
    yield Table(
        ("data set", "folder", "records", "frames per second", "frames"),
        [list(_data_set(recipe, name)) for name in recipe.data.sets],
        numbers=frozenset({2, 3, 4}),
    )
    rows, charts = [], []
    for stage, phases in planned:
        share = {
            f"{phase.name}": {n: w / sum(phase.mixture.values()) for n, w in phase.mixture.items()} for phase in phases
        }
        names = list(dict.fromkeys(name for phase in phases for name in phase.mixture))
        if len(names) > 1:
            values = {phase: [100 * of_phase.get(name, 0.0) for name in names] for phase, of_phase in share.items()}
            charts.append(bars_chart(f"{stage.name}: mixture", names, values, unit="% of the clips"))
        try:
            _, order, manifests = planned_order(stage)
        except (UserError, OSError) as error:
            yield Text(f"How often {stage.name} draws each record is not known: {error}", remark=True)
            continue
        base, drawn = order.drawn(phases[0].first), order.drawn(phases[-1].end)
        rows += [
            [stage.name, name, f"{drawn[name] - base[name]:,}", f"{drawn[name] / manifests[name].records:.2f}"]
            for name in names
        ]
    if rows:
        yield Table(
            ("stage", "data set", "clips", "passes"), rows, "Clips that will be drawn", numbers=frozenset({2, 3})
        )
    yield Charts(charts, 2)


def _data_set(recipe: Recipe, name: str) -> Iterator[str]:
    data_set = recipe.data.sets[name]
    yield name
    yield data_set.path
    try:
        found = (Path(data_set.path) / MANIFEST).exists()
        yield f"{Manifest.open(data_set.path).records:,}" if found else "not there"
    except UserError:
        yield "damaged"
    yield f"{recipe.data.fps_of(name):g}"
    yield str(data_set.frames or "as the phase")
