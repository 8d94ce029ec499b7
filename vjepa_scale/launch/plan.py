"""Checks a launch and describes what it will do, before anything starts."""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vjepa_scale.checkpoint.manifest import newest_name, set_aside
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command
from vjepa_scale.data.clips import DUMPED, dump_order, short_videos
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.launch.estimate import estimate_lines
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.launch.record import planned_launch
from vjepa_scale.model import flops
from vjepa_scale.monitor.jobs import SlurmUnavailable, slurm_job
from vjepa_scale.monitor.stage_files import StageFiles
from vjepa_scale.monitor.stage_state import who_runs
from vjepa_scale.recipe import Phase, Recipe, Stage, stages_of
from vjepa_scale.recipe.networks import NETWORKS
from vjepa_scale.recipe.phases import Ramp, accumulation, divides_among
from vjepa_scale.recipe.rank_counts import refuse_uneven_batches
from vjepa_scale.recipe.schema import LaunchConfig
from vjepa_scale.run.lock import refuse_if_training
from vjepa_scale.training.planned_start import planned_first, planned_order
from vjepa_scale.training.preflight import Damage, check_finished, damage_of, is_finished, preflight


def chosen_stages(recipe: Recipe, names: Sequence[str] | None) -> list[Stage]:
    """Returns the stages to run, in the recipe's order. Raises UserError for a name that the recipe does not have."""
    every = stages_of(recipe)
    for name in names or ():
        if name not in every:
            raise UserError(f"no stage {name!r} in the recipe", where="--stages", fix=f"one of {', '.join(every)}")
    return [stage for name, stage in every.items() if not names or name in names]


def chosen_cluster(recipe: Recipe) -> str:
    """Returns "slurm" or "local" by launch.cluster; auto is Slurm if the sbatch command is found."""
    if recipe.launch.cluster != "auto":
        return recipe.launch.cluster
    return "slurm" if shutil.which("sbatch") else "local"


def check(
    stages: Sequence[Stage],
    *,
    source: object,
    cluster: str,
    repair: Callable[[str], object] | None = None,
) -> list[Stage]:
    """Runs the preflight of every stage. Returns the stages that are not finished.

    source: the recipe's file, for errors
    repair: if given, the last checkpoints of finished stages are verified, and a damaged one is set aside, so that its
            stage is trained again from the good one before it; it gets the lines about this. None: not verified
    """
    if (lacking := machine_lacks(stages, source=source, cluster=cluster)) is not None:
        raise lacking
    if cluster == "slurm":
        from vjepa_scale.launch.slurm import check_profile

        with errors_name(source):
            check_profile(stages)
    return _checked(stages, source, repair)


def _checked(stages: Sequence[Stage], source: object, repair: Callable[[str], object] | None) -> list[Stage]:
    recipe = stages[0].recipe
    with errors_name(source):
        refuse_uneven_batches([stage for stage in stages if not is_finished(stage)])
    remaining: list[Stage] = []
    damaged: list[tuple[Stage, Damage]] = []
    for stage in stages:
        with errors_name(source):
            finished = is_finished(stage)
            if finished:
                check_finished(stage)
        if finished:
            if repair is None:
                continue
            refuse_if_at_work(recipe)  # before a verification of minutes
            if (damage := damage_of(stage, say=repair)) is None:
                continue
            damaged.append((stage, damage))
        with errors_name(source):
            preflight(stage, will_have_run={before.name for before in remaining})
        remaining.append(stage)
    refuse_if_at_work(recipe)
    for stage in remaining:
        refuse_if_training(stage.folder)
    for stage, damage in damaged:
        place = set_aside(damage.checkpoint)
        assert repair is not None
        repair(
            f"{stage.name}: {damage.checkpoint} is damaged ({damage.problem}): set aside as {place.name}, "
            f"to be trained again from {damage.good.name} on"
        )
    return remaining


def objections(stages: Sequence[Stage], *, source: object, cluster: str) -> Iterator[str]:
    """Yields the reasons for which a launch would be refused now, for a dry run. Writes and submits nothing.

    ``machine_lacks`` has what this machine lacks.
    """
    try:
        _checked(stages, source, None)
    except UserError as error:
        yield str(error)
    if cluster == "slurm":
        from vjepa_scale.launch.slurm import check_profile, test_submission

        try:
            with errors_name(source):
                check_profile(stages)
                said = test_submission(stages[0], planned_launch(stages[0].recipe))
        except UserError as error:
            yield str(error)
        else:
            if said:
                yield f"Slurm would refuse the job of {stages[0].name!r}: {said}"


def machine_lacks(stages: Sequence[Stage], *, source: object, cluster: str) -> UserError | None:
    """Returns the error of a local run that needs more nodes or GPUs than this machine has; None: it has enough."""
    try:
        with errors_name(source):
            for stage in stages if cluster == "local" else ():
                _fits_this_machine(stage)
    except UserError as error:
        return error
    return None


def _fits_this_machine(stage: Stage) -> None:
    if stage.launch.nodes > 1:
        raise UserError(
            f"{stage.launch.nodes} nodes, but this is one machine",
            where="launch.nodes",
            fix="run it where sbatch is, or launch.nodes=1",
        )
    if stage.recipe.engine.device != "cuda":
        return
    import torch  # only to count GPUs

    processes, gpus = stage.launch.tasks_per_node, torch.cuda.device_count()
    if gpus == 0:
        raise UserError(
            f"{processes} processes, but PyTorch finds no GPU here",
            where="engine.device",
            fix="engine.device=cpu trains on CPU",
        )
    if processes > gpus:
        raise UserError(
            f"{processes} processes, but {gpus} GPUs here",
            where="launch.tasks_per_node",
            fix=f"launch.tasks_per_node of at most {gpus}",
        )


def refuse_if_at_work(recipe: Recipe) -> None:
    """Raises UserError if a job of the run is pending or running, or if Slurm does not answer."""
    for stage in stages_of(recipe).values():
        files = StageFiles(stage)
        if not files.rows or files.finished:
            continue
        try:
            owner, job = who_runs(files, slurm_job)
        except SlurmUnavailable as error:
            raise UserError(
                f"Slurm does not say whether the job of {stage.name!r} has ended: {error}",
                where=files.folder,
                fix="try later",
            ) from None
        if owner == "alive":
            who = f"Slurm job {job.job_id}" if job else f"process {files.submitted['pid'] if files.submitted else '?'}"
            raise UserError(
                f"{who} of {stage.name!r} is {job.state.lower() if job else 'at work'}",
                where=files.folder,
                fix=f"{command('launch')} status {recipe.run.dir}, or cancel instead of status",
            )


@contextmanager
def errors_name(source: object) -> Iterator[None]:
    """Adds the recipe's file to errors that name only a key."""
    try:
        yield
    except UserError as error:
        where = source if error.where is None else f"{source}:{error.where}"
        raise UserError(error.what, where=where, fix=error.fix) from None


def describe(stages: Sequence[Stage], *, where: str) -> Iterator[str]:
    """Yields the lines of the plan: ranks, then every phase with its steps, rate, geometry and batch.

    where: the text of ``site``
    Raises UserError if the ranks of a stage that is not finished cannot share its batches.
    """
    refuse_uneven_batches([stage for stage in stages if not is_finished(stage)])
    recipe = stages[0].recipe
    model, encoder = recipe.model, recipe.model.encoder
    yield f"run     {recipe.run.dir}"
    yield f"ranks   {_ranks(recipe.launch)}, {recipe.engine.kind}, {recipe.engine.precision}, on {recipe.engine.device}"
    yield f"cluster {where}, jobs of at most {recipe.launch.timeout_min} minutes"
    sizes = {name: flops.PARAMETERS[name](model) for name in NETWORKS if any(name in s.networks for s in stages)}
    yield f"encoder width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}, MLP {encoder.mlp_hidden}; " + (
        "parameters: " + ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.1f} M" for name, size in sizes.items())
    )
    manifests = dict[str, Manifest]()
    used = {name for stage in stages for name in stage.data_sets}
    for name, data_set in recipe.data.sets.items():
        if name not in used:
            continue
        held, problem = "", "  (no manifest there yet)"
        if (Path(data_set.path) / MANIFEST).exists():
            try:
                manifest = manifests[name] = Manifest.open(data_set.path)
                held, problem = f", {manifest.records} records in {len(manifest.shards)} shards", ""
            except UserError as error:  # a plan shows the error; a launch raises it
                problem = f"  (error: {error})"
        own = (f", {data_set.frames} frames" if data_set.frames else "") + (
            f", {data_set.fps:g} frames per second" if data_set.fps else ""
        )
        yield f"data    {name}: {data_set.path}{held}, weight {data_set.weight:g}{own}{problem}"
    for stage in stages:
        config = stage.config
        own = f", on {_ranks(stage.launch)} ranks" if stage.launch != recipe.launch else ""
        yield f"{stage.name}: {config.steps} steps, {_origin(stage)}{own}"
        yield from (f"  warning: {text}" for text in stage.warnings())
        if chosen_cluster(recipe) == "slurm":
            from vjepa_scale.launch.slurm import idle_gpus

            if idle := idle_gpus(stage):
                yield f"  warning: {idle}"
        for phase in stage.phases_from(planned_first(stage)):
            yield "  " + _phase_line(stage, phase)
            if recipe.engine.device != "cpu" and divides_among(phase, stage.world_size):
                yield from (f"    {line}" for line in estimate_lines(stage, phase))
            short, share = short_videos(stage.data, phase, manifests)
            if short:
                counts = ", ".join(
                    f"{s.records} of {s.of} of {set_name} (shorter than {s.frames} frames at {s.fps:g} a second)"
                    for set_name, s in short.items()
                )
                yield f"    repeat their last picture: {counts}: {share:.1%} of the clips"
    yield from _profile_lines(stages)


def _profile_lines(stages: Sequence[Stage]) -> Iterator[str]:
    """Yields which stage has the steps of ``profile.steps``, or a warning that none has them; nothing without them."""
    profile = stages[0].recipe.profile
    if profile.steps is None:
        return
    first, end = profile.steps
    ranks = ", ".join(map(str, profile.ranks))
    there = {}
    for stage in stages:
        phases = stage.phases_from(planned_first(stage))
        there[stage.name] = range(phases[0].first, phases[-1].end)
    having = [name for name, steps in there.items() if max(first, steps.start) < min(end, steps.stop)]
    if having:
        yield f"profile steps {first} to {end - 1}, of {' and '.join(having)}, on ranks {ranks}"
    else:
        steps = ", ".join(f"{name} has steps {s.start} to {s.stop - 1}" for name, s in there.items())
        yield f"  warning: profile.steps [{first}, {end}]: no stage trains these steps: {steps}"


def _origin(stage: Stage) -> str:
    """Returns in words from which weights a launch would go on: the stage's own checkpoint, or what it starts from."""
    if (newest := newest_name(stage.checkpoints)) is not None:
        return "complete" if is_finished(stage) else f"resumes from {newest.name}"
    if stage.config.continue_from:
        return f"continues from {stage.config.continue_from}"
    return f"starts from the weights of {stage.config.init_from}" if stage.config.init_from else "starts fresh"


def _ranks(launch: LaunchConfig) -> str:
    return f"{launch.nodes} nodes × {launch.tasks_per_node} = {launch.nodes * launch.tasks_per_node}"


def site(recipe: Recipe) -> str:
    """Returns cluster and profile as text. Reads the profile, so that a dry run shows errors in it."""
    cluster = chosen_cluster(recipe)
    if recipe.launch.profile is None:
        return cluster
    profile = load_profile(recipe.launch.profile)
    named = [f"{key} {value}" for key in ("partition", "account", "qos") if (value := getattr(profile, key))]
    return f"{cluster}, profile {recipe.launch.profile}" + (f" ({', '.join(named)})" if named else "")


def _phase_line(stage: Stage, phase: Phase) -> str:
    shared = ""  # of a finished stage that had other ranks
    if divides_among(phase, stage.world_size):
        per_rank = accumulation(phase, dp_world_size=stage.world_size)
        shared = f" = {stage.world_size} ranks × {per_rank} × {phase.micro_batch}"
    return (
        f"{phase.name}: steps {phase.first} to {phase.end - 1}, {_schedules(phase)}, "
        f"{_geometries(stage, phase)}, "
        f"batch {phase.global_batch}{shared}, "
        f"{_count(stage.step_flops(phase))}FLOPs a step"
    )


def _schedules(phase: Phase) -> str:
    """Returns ``lr 0.1 → 0.2``, and weight decay and EMA momentum where they have ramps."""
    # The EMA momentum of a step is its ramp's value before that step, the others' the value after it.
    ramps = (
        ("lr", phase.lr_ramp, phase.end),
        ("weight decay", phase.weight_decay_ramp, phase.end),
        ("EMA momentum", phase.ema_ramp, phase.end - 1),
    )
    return ", ".join(_ramp_in_words(name, ramp, phase, until) for name, ramp, until in ramps if ramp is not None)


def _ramp_in_words(name: str, ramp: Ramp, phase: Phase, until: int) -> str:
    """Returns a ramp's values in a phase up to the step ``until``, and its whole range if that is not the phase's."""
    start, end = (ramp.after(step - ramp.first) for step in (phase.first, until))
    if ramp.start == ramp.final:
        return f"{name} {start:g} → {end:g}" if name == "lr" else f"{name} {start:g}"
    shape = "" if ramp.shape == "linear" else f" {ramp.shape}"
    whole = (ramp.first, ramp.steps) == (phase.first, phase.steps)
    rest = "" if whole else f" (of {ramp.start:g} → {ramp.final:g} in {ramp.steps} steps)"
    return f"{name} {start:g} → {end:g}{shape}{rest}"


def _geometries(stage: Stage, phase: Phase) -> str:
    """Returns ``16 × 256×256 px = 2048 tokens``; for several geometries each with its fraction of the clips."""
    said = []
    for frames, part in phase.geometries.items():
        share = f" ({sum(part.values()) / sum(phase.mixture.values()):.3g} of the clips: {', '.join(part)})"
        tokens = stage.tokens_in_words(phase, frames)
        several = len(phase.geometries) > 1
        said.append(f"{frames} × {phase.size[0]}×{phase.size[1]} px = {tokens} tokens" + several * share)
    return " and ".join(said)


def _count(value: float) -> str:
    """Formats a number: 1.234e15 → ``1.23 P``."""
    thousands = min(int(math.log10(max(value, 1))) // 3, 6)
    return f"{value / 1000**thousands:.3g} {' kMGTPE'[thousands].strip()}"


def order_lines(stages: Sequence[Stage], text: str) -> Iterator[str]:
    """Yields the lines of ``--dump-order FIRST:LAST``: one per clip of the global steps FIRST … LAST−1.

    The first line, ``# step…``, names the columns, which are separated by tabs. Raises UserError before it for a range
    without a step of the stages.
    """
    first_text, colon, last_text = text.partition(":")
    if not (colon and all(re.fullmatch(r"\d{1,18}", part) for part in (first_text, last_text))):
        raise UserError(f"{text!r} is not a range of steps", where="--dump-order", fix="FIRST:LAST, for example 0:20")
    wanted = range(int(first_text), int(last_text))
    if not wanted:
        raise UserError(
            f"{text} holds no step: it stops before step {wanted.stop}",
            where="--dump-order",
            fix=f"FIRST:LAST with FIRST < LAST, for example {wanted.start}:{wanted.start + 1}",
        )
    planned = {stage.name: (stage, *planned_order(stage)) for stage in stages}
    steps = {name: range(phases[0].first, phases[-1].end) for name, (_, phases, *_) in planned.items()}
    if not any(max(wanted.start, there.start) < min(wanted.stop, there.stop) for there in steps.values()):
        there = ", ".join(f"{name} has steps {s.start} to {s.stop - 1}" for name, s in steps.items())
        raise UserError(f"no step of the stages is in {text}", where="--dump-order", fix=there)
    yield "# " + "\t".join(DUMPED)
    for stage, phases, order, manifests in planned.values():
        for phase in phases:
            for step in range(max(wanted.start, phase.first), min(wanted.stop, phase.end)):
                yield from dump_order(stage.data, phase, order, manifests, step)
