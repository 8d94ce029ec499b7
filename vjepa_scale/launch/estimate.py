"""Estimates memory per GPU and time of a phase from a recipe, before anything runs. Nothing here was measured on a GPU.

Memory is the sum of: what the engine shards (weights, EMA target, gradients, AdamW moments), temporarily gathered
weights, what networks keep for the backward pass (model/memory.py), and the batch. Time is FLOPs divided by the GPU's
peak times ``UTILISATION``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vjepa_scale.core.gpus import GPUS
from vjepa_scale.core.ranks import count_replicas
from vjepa_scale.model import flops
from vjepa_scale.model.memory import (
    FLOAT32,
    ClipWork,
    activation_bytes,
    clip_bytes,
    compute_bytes,
    recomputed_flops,
    workspace_bytes,
)
from vjepa_scale.recipe import Phase, Recipe, Stage, load_recipe, stages_of
from vjepa_scale.recipe.phases import accumulation

# Assumed fraction of the peak over all computed FLOPs. A model of ViT-g's step on an H100, kernel by kernel,
# gave 0.24 for the published code and 0.38 for this package, compiled and without recomputation.
UTILISATION = 0.3
# Fraction of a GPU's memory that an estimate may fill. The rest is for CUDA's context, libraries and fragmentation.
FILLED = 0.9
# DeepSpeed's default size of a reduction bucket, in values.
ZERO_BUCKET = 500_000_000


@dataclass(frozen=True)
class Estimate:
    """The estimate of one phase.

    memory:    bytes per GPU by part
    flops:     of one optimiser step over all ranks, with the recomputation of activation checkpointing
    step_s:    seconds of one step; None if the compute type is not bfloat16, for which the peaks are
    gpu_hours: of the phase, over all GPUs; None likewise
    """

    memory: dict[str, float]
    flops: float
    step_s: float | None
    gpu_hours: float | None
    days: float | None

    @property
    def total(self) -> float:
        """Bytes per GPU."""
        return sum(self.memory.values())


def estimate(stage: Stage, phase: Phase) -> Estimate | None:
    """Estimates a phase on the GPU of ``launch.gpu``. Returns None for a kind of stage without ``clip_work``.

    Raises UserError if the ranks do not divide the batch, or do not divide into replicas.
    """
    recipe, engine, ranks = stage.recipe, stage.recipe.engine, stage.world_size
    works: dict[int, ClipWork] = {}
    for frames in phase.geometries:
        work = stage.clip_work(phase, frames)
        if work is None:
            return None
        works[frames] = work
    largest = max(works.values(), key=lambda work: activation_bytes(recipe.model, work, engine))
    clips = phase.micro_batch
    memory = state_bytes(stage, accumulated=accumulation(phase, dp_world_size=ranks)) | {
        "activations": clips * activation_bytes(recipe.model, largest, engine),
        "workspace": clips * workspace_bytes(recipe.model, largest, engine),
        # The loader's next micro-batch is copied while this one computes.
        "batch": clips * (clip_bytes(largest, engine) + largest.pixels),
    }
    share = {frames: sum(part.values()) / sum(phase.mixture.values()) for frames, part in phase.geometries.items()}
    again = sum(recomputed_flops(recipe.model, work, engine) * share[frames] for frames, work in works.items())
    computed = stage.step_flops(phase) + phase.global_batch * again
    if engine.precision != "bfloat16":
        return Estimate(memory, computed, None, None, None)
    step_s = computed / (ranks * GPUS[recipe.launch.gpu].peak * UTILISATION)
    seconds = step_s * phase.steps
    return Estimate(memory, computed, step_s, seconds * ranks / 3600, seconds / 86400)


def state_bytes(stage: Stage, *, accumulated: int) -> dict[str, float]:
    """What a rank holds of weights and their state, and gathers of them, by part.

    accumulated: micro-batches per rank and step
    """
    recipe = stage.recipe
    sizes = {name: flops.PARAMETERS[name](recipe.model) for name in stage.networks}
    # A stage with a target encoder trains all of its networks; the others keep their encoder frozen.
    trained = {name: n for name, n in sizes.items() if stage.has_target_encoder or name != "encoder"}
    frozen = sizes["encoder"]
    blocks = {name: flops.block_parameters(recipe.model, name) for name in sizes}
    P, moments = sum(trained.values()), 2 if stage.optimizer.kind == "adamw" else 0
    kept = _zero_bytes if recipe.engine.kind == "deepspeed" else _fsdp_bytes
    return kept(stage, P=P, frozen=frozen, moments=moments, block=max(blocks.values()), accumulated=accumulated)


def _fsdp_bytes(stage: Stage, *, P: int, frozen: int, moments: int, block: int, accumulated: int) -> dict[str, float]:
    engine, ranks = stage.recipe.engine, stage.world_size
    replicas = count_replicas(engine.replicate, world_size=ranks, per_node=stage.launch.tasks_per_node)
    shards = ranks // replicas
    keeps = replicas > 1 if engine.reshard_after_forward == "auto" else not engine.reshard_after_forward
    if keeps or not engine.shard_blocks:
        gathered = P + (frozen if not engine.shard_blocks else block * (1 + engine.prefetch))
    else:
        gathered = block * (1 + engine.prefetch)
    return {
        "weights": FLOAT32 * P / shards,
        "target or frozen encoder": FLOAT32 * frozen / shards,
        # Between the micro-batches of a step each rank holds its own unsharded sum.
        "gradients": FLOAT32 * (P if accumulated > 1 else P / shards),
        "optimiser": FLOAT32 * moments * P / shards,
        # Gathered weights, and the gradient of the current block before and after its cast to float32.
        "gathered": compute_bytes(engine) * gathered + (compute_bytes(engine) + FLOAT32) * block,
    }


def _zero_bytes(stage: Stage, *, P: int, frozen: int, moments: int, block: int, accumulated: int) -> dict[str, float]:
    engine, ranks = stage.recipe.engine, stage.world_size
    level = engine.zero_stage
    held = P / ranks if level == 3 else P
    rounded = compute_bytes(engine) if engine.precision != "float32" else 0  # autocast keeps a copy of all weights
    return {
        "weights": FLOAT32 * (held + P / ranks),  # the weights that compute, and the masters' partition
        "target or frozen encoder": FLOAT32 * (frozen / ranks if level == 3 else frozen),
        "gradients": FLOAT32 * (P if level == 1 else P / ranks + min(P, ZERO_BUCKET)),
        "optimiser": FLOAT32 * moments * P / ranks,
        "gathered": rounded * P + (FLOAT32 * 2 * block if level == 3 else 0),
    }


def summary(recipe: Recipe) -> tuple[float, float] | None:
    """Returns the largest bytes per GPU of a recipe's phases, and the days of all stages in sequence.

    None if a stage runs on CPU or has no estimate.
    """
    found = [estimate(stage, phase) for stage in stages_of(recipe).values() for phase in stage.phases]
    if recipe.engine.device == "cpu" or not all(found):
        return None
    known = [one for one in found if one is not None]
    days = [one.days for one in known if one.days is not None]
    return (max(one.total for one in known), sum(days)) if len(days) == len(found) else None


def in_words(recipe: Recipe) -> str:
    """Returns the summary in the form of recipes' headers: ``17 GB of an RTX4090's 24, 2.6 days``."""
    found, name = summary(recipe), recipe.launch.gpu
    if found is None:
        return "no estimate"
    return f"{found[0] / 1e9:.0f} GB of an {name}'s {GPUS[name].memory / 1e9:.0f}, {found[1]:.1f} days"


def recipes_table(folder: Path) -> str:
    """Returns a Markdown table with a row per recipe of a folder. Its purpose is the first clause of the file."""
    rows = ["| recipe | what for | GPUs | memory per GPU | days |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(path)
        purpose = re.split(r"[:,.;](?:\s|$)", path.read_text().splitlines()[0].removeprefix("# "))[0]
        sizes = list(dict.fromkeys(stage.world_size for stage in stages_of(recipe).values()))
        gpus = " and ".join(map(str, sizes)) + f" × {recipe.launch.gpu}"
        found = summary(recipe)
        memory, days = (f"{found[0] / 1e9:.0f} GB", f"{found[1]:.1f}") if found else ("", "")
        row = (f"`{path.name}`", purpose, "CPU" if recipe.engine.device == "cpu" else gpus, memory, days)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def fits(found: Estimate, recipe: Recipe) -> bool:
    """Returns whether the estimate is below the fraction ``FILLED`` of the memory of ``launch.gpu``."""
    return found.total <= FILLED * GPUS[recipe.launch.gpu].memory


def estimate_lines(stage: Stage, phase: Phase) -> Iterator[str]:
    """Yields two lines of a dry run: memory per GPU, and time. One line if the kind of stage has no estimate."""
    name = stage.recipe.launch.gpu
    gpu, found = GPUS[name], estimate(stage, phase)
    if found is None:
        yield f"memory: no estimate for stages of kind {stage.kind}"
        return
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in found.memory.items())
    room = "" if fits(found, stage.recipe) else f", MORE THAN FITS: {FILLED:.0%} of {gpu.memory / 1e9:.0f} GB"
    total = f"{found.total / 1e9:.1f} GB of {name}'s {gpu.memory / 1e9:.0f}"
    yield f"memory: {total}{room} ({parts}; computed, not measured)"
    if found.step_s is None or found.days is None:
        yield f"time: no estimate in {stage.recipe.engine.precision}"
        return
    yield (
        f"time: {found.step_s:.3g} s a step, {found.gpu_hours:,.0f} GPU-hours, {found.days:.2g} days at "
        f"{UTILISATION:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s, if the CPU decodes "
        f"{phase.global_batch / found.step_s:,.0f} clips a second (computed, not measured)"
    )


if __name__ == "__main__":
    print(recipes_table(Path("recipes")))
