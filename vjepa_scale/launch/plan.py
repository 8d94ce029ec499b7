"""What a launch will do, in words, before it does it."""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vjepa_scale.checkpoint.manifest import set_aside
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.clips import DUMPED, dump_order
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.data.short_videos import short_videos
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.launch.record import planned_launch
from vjepa_scale.model import flops
from vjepa_scale.monitor.jobs import SlurmUnavailable, slurm_job
from vjepa_scale.monitor.stage_files import StageFiles
from vjepa_scale.monitor.stage_state import who_runs
from vjepa_scale.objective.cost import step_flops
from vjepa_scale.recipe import Phase, Recipe, resolve_phases
from vjepa_scale.recipe.folders import stage_folder
from vjepa_scale.recipe.phases import MASKED, accumulation, stage_sets
from vjepa_scale.run.lock import refuse_if_training
from vjepa_scale.training.preflight import (
    Damage,
    check_finished,
    damage_of,
    is_finished,
    planned_first,
    planned_order,
    preflight,
)


def chosen_stages(recipe: Recipe, names: Sequence[str] | None) -> list[str]:
    """The stages to run, in the recipe's order. Raises UserError for a name the recipe does not have."""
    every = list(recipe.stages())
    for name in names or ():
        if name not in every:
            raise UserError(f"no stage {name!r} in the recipe", where="--stages", fix=f"one of {', '.join(every)}")
    return [name for name in every if not names or name in names]


def chosen_cluster(recipe: Recipe) -> str:
    """ "slurm" or "local": what launch.cluster says, where auto is Slurm if its sbatch command is there."""
    if recipe.launch.cluster != "auto":
        return recipe.launch.cluster
    return "slurm" if shutil.which("sbatch") else "local"


def check(
    recipe: Recipe,
    stages: Sequence[str],
    *,
    source: object,
    cluster: str,
    repair: Callable[[str], object] | None = None,
) -> list[str]:
    """Preflight of every stage; returns the names of those that are not finished.

    source: the recipe's file, which errors name
    repair: gets the lines about it where the last checkpoints of finished stages are to be read, and a damaged one set
            aside, so that its stage is trained again from the good one before it; None: files are not read
    """
    with errors_name(source):
        if cluster == "local":
            _fits_this_machine(recipe)
    world_size = recipe.launch.nodes * recipe.launch.tasks_per_node
    remaining: list[str] = []
    damaged: dict[str, Damage] = {}
    for name in stages:
        with errors_name(source):
            finished = is_finished(recipe, name)
            if finished:
                check_finished(recipe, name)
        if finished:
            if repair is None:
                continue
            refuse_if_at_work(recipe)  # before minutes of reading
            if (damage := damage_of(recipe, name, say=repair)) is None:
                continue
            damaged[name] = damage
        with errors_name(source):
            preflight(recipe, name, world_size=world_size, will_have_run=set(remaining))
        remaining.append(name)
    refuse_if_at_work(recipe)
    for name in remaining:
        refuse_if_training(stage_folder(recipe, name))
    for name, damage in damaged.items():
        place = set_aside(damage.checkpoint)
        assert repair is not None
        repair(
            f"{name}: {damage.checkpoint} is damaged ({damage.problem}): set aside as {place.name}, "
            f"to be trained again from {damage.good.name} on"
        )
    return remaining


def objections(recipe: Recipe, stages: Sequence[str], *, source: object, cluster: str) -> Iterator[str]:
    """What a launch would be refused for now, as a dry run says it: nothing is written or submitted."""
    try:
        check(recipe, stages, source=source, cluster=cluster)
    except UserError as error:
        yield str(error)
    if cluster == "slurm":
        from vjepa_scale.launch.slurm import test_submission

        try:
            with errors_name(source):
                said = test_submission(recipe, stages[0], planned_launch(recipe))
        except UserError as error:
            yield str(error)
        else:
            if said:
                yield f"Slurm would refuse the job of {stages[0]!r}: {said}"


def _fits_this_machine(recipe: Recipe) -> None:
    if recipe.launch.nodes > 1:
        raise UserError(
            f"{recipe.launch.nodes} nodes, but this is one machine",
            where="launch.nodes",
            fix="run it where sbatch is, or launch.nodes=1",
        )
    if recipe.engine.device != "cuda":
        return
    import torch  # to ask for GPUs

    if recipe.launch.tasks_per_node > torch.cuda.device_count():
        raise UserError(
            f"{recipe.launch.tasks_per_node} processes, but {torch.cuda.device_count()} GPUs here",
            where="engine.device",
            fix="cpu, or fewer launch.tasks_per_node",
        )


def refuse_if_at_work(recipe: Recipe) -> None:
    """Raise UserError if a job of the run is waiting or running, or if Slurm does not say whether one is."""
    for stage in recipe.stages():
        files = StageFiles(recipe, stage)
        if not files.rows or files.finished:
            continue
        try:
            owner, job = who_runs(files, slurm_job)
        except SlurmUnavailable as error:
            raise UserError(
                f"Slurm does not say whether the job of {stage!r} has ended: {error}",
                where=files.folder,
                fix="try later",
            ) from None
        if owner == "alive":
            who = f"Slurm job {job.job_id}" if job else f"process {files.submitted['pid'] if files.submitted else '?'}"
            raise UserError(
                f"{who} of {stage!r} is {job.state.lower() if job else 'at work'}",
                where=files.folder,
                fix=f"python tools/launch.py status {recipe.run.dir}, or cancel instead of status",
            )


@contextmanager
def errors_name(source: object) -> Iterator[None]:
    """Errors about a key inside begin with the recipe's file."""
    try:
        yield
    except UserError as error:
        where = source if error.where is None else f"{source}:{error.where}"
        raise UserError(error.what, where=where, fix=error.fix) from None


def describe(recipe: Recipe, stages: Sequence[str], *, where: str) -> Iterator[str]:
    """The plan as lines: ranks, then every phase with its steps, rate, geometry and batch.

    where: ``site``'s words
    """
    launch, model = recipe.launch, recipe.model
    world_size = launch.nodes * launch.tasks_per_node
    encoder = model.encoder
    yield f"run     {recipe.run.dir}"
    yield f"ranks   {launch.nodes} nodes × {launch.tasks_per_node} = {world_size}, {recipe.engine.kind}, " + (
        f"{recipe.engine.precision}, on {recipe.engine.device}"
    )
    yield f"cluster {where}, jobs of at most {launch.timeout_min} minutes"
    sizes = {"encoder": flops.encoder_parameters(model)}
    if any(name in MASKED for name in stages):
        sizes["predictor"] = flops.predictor_parameters(model)
    if "action" in stages:
        sizes["action predictor"] = flops.action_predictor_parameters(model)
    yield f"encoder width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}, MLP {encoder.mlp_hidden}; " + (
        "parameters: " + ", ".join(f"{name} {size / 1e6:,.1f} M" for name, size in sizes.items())
    )
    manifests = dict[str, Manifest]()
    used = {name for stage in stages for name in stage_sets(recipe, stage)}
    for name, data_set in recipe.data.sets.items():
        if name not in used:
            continue
        held, problem = "", "  (no manifest there yet)"
        if (Path(data_set.path) / MANIFEST).exists():
            try:
                manifest = manifests[name] = Manifest.open(data_set.path)
                held, problem = f", {manifest.records} records in {len(manifest.shards)} shards", ""
            except UserError as error:  # a plan shows what is wrong; a launch refuses it
                problem = f"  (error: {error})"
        own = (f", {data_set.frames} frames" if data_set.frames else "") + (
            f", {data_set.fps:g} frames per second" if data_set.fps else ""
        )
        yield f"data    {name}: {data_set.path}{held}, weight {data_set.weight:g}{own}{problem}"
    for name in stages:
        stage = recipe.stages()[name]
        origin = (
            f"continues from {stage.continue_from}"
            if stage.continue_from
            else (f"starts from the weights of {stage.init_from}" if stage.init_from else "starts fresh")
        )
        yield f"{name}: {stage.steps} steps, {origin}"
        for phase in resolve_phases(recipe, name, first=planned_first(recipe, name)):
            yield "  " + _phase_line(recipe, phase, world_size)
            short, share = short_videos(recipe, phase, manifests)
            if short:
                counts = ", ".join(
                    f"{s.records} of {s.of} of {set_name} (shorter than {s.frames} frames at {s.fps:g} a second)"
                    for set_name, s in short.items()
                )
                yield f"    repeat their last picture: {counts}: {share:.1%} of the clips"


def site(recipe: Recipe) -> str:
    """Cluster and profile, which is read so that a mistake in it shows in a dry run."""
    cluster = chosen_cluster(recipe)
    if recipe.launch.profile is None:
        return cluster
    profile = load_profile(recipe.launch.profile)
    named = [f"{key} {value}" for key in ("partition", "account", "qos") if (value := getattr(profile, key))]
    return f"{cluster}, profile {recipe.launch.profile}" + (f" ({', '.join(named)})" if named else "")


def _phase_line(recipe: Recipe, phase: Phase, world_size: int) -> str:
    per_rank = accumulation(phase, dp_world_size=world_size)
    return (
        f"{phase.name}: steps {phase.first} to {phase.end - 1}, lr {phase.start_lr:g} → {phase.final_lr:g}, "
        f"{_geometries(recipe, phase)}, "
        f"batch {phase.global_batch} = {world_size} ranks × {per_rank} × {phase.micro_batch}, "
        f"{_count(step_flops(recipe, phase))}FLOPs a step"
    )


def _geometries(recipe: Recipe, phase: Phase) -> str:
    """``16 × 256×256 px = 2048 tokens``; of several, each with its share of the clips."""
    said = []
    for frames, part in phase.geometries.items():
        t, h, w = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=frames)
        share = f" ({sum(part.values()) / sum(phase.mixture.values()):.3g} of the clips: {', '.join(part)})"
        several = len(phase.geometries) > 1
        tokens = f"{frames} × {h * w}" if phase.kind == "action" else str(t * h * w)
        said.append(f"{frames} × {phase.size[0]}×{phase.size[1]} px = {tokens} tokens" + several * share)
    return " and ".join(said)


def _count(value: float) -> str:
    """1.234e15 → ``1.23 P``."""
    thousands = min(int(math.log10(value)) // 3, 6)
    return f"{value / 1000**thousands:.3g} {' kMGTPE'[thousands].strip()}"


def order_lines(recipe: Recipe, stages: Sequence[str], text: str) -> Iterator[str]:
    """``--dump-order FIRST:LAST``: a line per clip of the global steps FIRST … LAST−1, without training.

    The first line, ``# step…``, names the columns, separated by tabs. Raises UserError before it for a range that
    holds no step of the stages.
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
    planned = {name: planned_order(recipe, name) for name in stages}
    steps = {name: range(phases[0].first, phases[-1].end) for name, (phases, *_) in planned.items()}
    if not any(max(wanted.start, there.start) < min(wanted.stop, there.stop) for there in steps.values()):
        there = ", ".join(f"{name} has steps {s.start} to {s.stop - 1}" for name, s in steps.items())
        raise UserError(f"no step of the stages is in {text}", where="--dump-order", fix=there)
    yield "# " + "\t".join(DUMPED)
    for phases, order, manifests in planned.values():
        for phase in phases:
            for step in range(max(wanted.start, phase.first), min(wanted.stop, phase.end)):
                yield from dump_order(recipe, phase, order, manifests, step)
