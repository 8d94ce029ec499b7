"""Says what a device's memory held when it ran out, and which keys of the recipe lower it.

RUN/STAGE/profile/oom_rank_R.txt      step, clips, PyTorch's counts of its memory
                  oom_rank_R.pickle   profile.memory: the allocations before it, for pytorch.org/memory_viz
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from vjepa_scale.core.errors import reason_of
from vjepa_scale.core.files import write_atomic
from vjepa_scale.core.installed import command
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.run.progress import Progress
from vjepa_scale.training.profiling import memory_snapshot

# Allocations and frees that PyTorch keeps with their stacks, the newest ones.
_MEMORY_EVENTS = 200_000


@contextmanager
def out_of_memory_explained(stage: Stage, *, rank: int, progress: Progress) -> Iterator[None]:
    """If the device's memory runs out inside, writes the files and raises an error of the same type that names them.

    progress: of this rank. With ``profile.memory`` allocations are recorded inside.
    """
    records = stage.recipe.profile.memory and stage.recipe.engine.device != "cpu" and torch.cuda.is_available()
    if records:
        torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
    try:
        yield
    except torch.OutOfMemoryError as error:
        said, _, _ = str(error).partition("\n")
        phase = next((one for one in stage.phases if one.name == progress.phase), None)
        path = stage.folder / "profile" / f"oom_rank_{rank}.txt"
        report = "\n".join(_report(stage, phase, progress.step, said))
        try:
            write_atomic(path, report)
            written = f"what it held: {path}"
            if records:
                memory_snapshot(path.with_suffix(".pickle"))
        except OSError as unwritten:
            written = f"{path} cannot be written: {reason_of(unwritten)}"
        raise torch.OutOfMemoryError(f"{said} ({written}; {' or '.join(_remedies(stage, phase))})") from error


def _report(stage: Stage, phase: Phase | None, step: int | None, said: str) -> Iterator[str]:
    yield said
    yield ""
    if phase is None:
        yield f"before the first step of {stage.name}"
    else:
        frames = ", ".join(map(str, phase.geometries))
        height, width = phase.size
        yield f"step {step} of {stage.name}, phase {phase.name}"
        yield f"micro-batches of {phase.micro_batch} clips of {frames} frames of {height}×{width} pixels"
    engine = stage.recipe.engine
    yield (
        f"{stage.world_size} processes; engine: {engine.kind}, {engine.precision}, activation_checkpointing "
        f"{engine.activation_checkpointing}, reshard_after_forward {str(engine.reshard_after_forward).lower()}"
    )
    yield f"{command('launch')} RECIPE --dry-run computes the memory of each phase by part"
    yield ""
    yield "What would lower it:"
    yield from (f"  {remedy}" for remedy in _remedies(stage, phase))
    if not stage.recipe.profile.memory:
        yield "profile.memory=true records every allocation, for pytorch.org/memory_viz"
    yield ""
    with suppress(RuntimeError):  # it needs a device that still answers
        yield torch.cuda.memory_summary()


def _remedies(stage: Stage, phase: Phase | None) -> list[str]:
    """Returns what would lower the memory, as settings of the recipe."""
    engine, found = stage.recipe.engine, []
    if phase is not None and phase.micro_batch > 1:
        found.append(f"{stage.name}.micro_batch below {phase.micro_batch}")
    if engine.activation_checkpointing != "full":
        found.append(
            "engine.activation_checkpointing=" + ("selective" if engine.activation_checkpointing == "none" else "full")
        )
    if engine.kind == "fsdp" and engine.reshard_after_forward is not True:
        found.append("engine.reshard_after_forward=true")
    if engine.kind == "deepspeed" and engine.zero_stage < 3:
        found.append(f"engine.zero_stage={engine.zero_stage + 1}")
    return [*found, "more GPUs"]
