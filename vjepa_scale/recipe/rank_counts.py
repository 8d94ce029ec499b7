"""Checks that a stage's ranks can share its batches, and finds the numbers of nodes and clips that can.

A launch with fewer nodes keeps the batch: each rank accumulates over more micro-batches. It is possible if the
micro-batches of every phase divide by the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.phases import Phase, divides_among
from vjepa_scale.recipe.stage import Stage


def refuse_uneven_batches(stages: Sequence[Stage]) -> None:
    """Raises UserError if the ranks of a stage cannot share the micro-batches of one of its phases equally.

    The error names the phases, and the numbers of nodes (with one node: of processes) that work, with the present
    ``micro_batch`` and with smaller ones: for a stage alone, or for all that have their number from the same key.
    """
    failing = next((stage for stage in stages if _uneven(stage)), None)
    if failing is None:
        return
    key = _key(failing)
    together = [stage for stage in stages if _key(stage) == key]
    if len(stages) > 1 and sum(map(bool, map(_uneven, together))) == 1:  # the others may keep their number
        together, key = [failing], f"{failing.name}.launch.{_number(failing)}"
    uneven = [phase for stage in together for phase in _uneven(stage)]
    first = uneven[0]
    others = [f"{phase.stage} ({phase.name})" for phase in uneven[1:]]
    likewise = f"; nor those of {', '.join(others[:4])}{' …' * (len(others) > 4)}" if others else ""
    raise UserError(
        f"{first.global_batch} clips in micro-batches of {first.micro_batch} are "
        f"{first.global_batch // first.micro_batch}, which {failing.world_size} ranks cannot share equally{likewise}",
        where=f"{first.stage}.global_batch",
        fix="; or ".join(_remedies(key, together)),
    )


def _uneven(stage: Stage) -> list[Phase]:
    return [phase for phase in stage.phases if not divides_among(phase, stage.world_size)]


def _key(stage: Stage) -> str:
    """Returns the key of the number that a user changes: of nodes, or with one node of processes."""
    name, own = _number(stage), stage.config.launch
    return f"{stage.name}.launch.{name}" if own is not None and name in own.given() else f"launch.{name}"


def _number(stage: Stage) -> str:
    return "nodes" if stage.launch.nodes > 1 else "tasks_per_node"


def _remedies(key: str, stages: Sequence[Stage]) -> Iterator[str]:
    """Yields values of keys with which the ranks of all these stages share their batches."""

    def per_unit(stage: Stage) -> int:  # ranks
        return stage.launch.tasks_per_node if key.endswith("nodes") else 1

    def evenly(number: int) -> bool:
        return all(_whole_copies(s, number * per_unit(s)) and _shared(s, number * per_unit(s)) for s in stages)

    def with_smaller(number: int) -> bool:
        return all(
            _whole_copies(s, number * per_unit(s)) and _micro_batches(s, number * per_unit(s)) is not None
            for s in stages
        )

    now = stages[0].world_size // per_unit(stages[0])
    most = max(phase.global_batch for stage in stages for phase in stage.phases)
    fewer = _first(range(now - 1, 0, -1), evenly)
    found = [str(number) for number in (fewer, _first(range(now + 1, most + 1), evenly)) if number is not None]
    if found:
        yield f"{key}={' or '.join(found)}"
    # Smaller micro-batches give the same training up to rounding, and may let more of the nodes take part.
    more = _first(range(now, fewer or 0, -1), with_smaller)
    if more is not None:
        changes = [text for s in stages for text in _micro_batches(s, more * per_unit(s)) or ()]
        yield " ".join([f"{key}={more}"] * (more != now) + changes)
    if not found and more is None:
        phase = next(phase for stage in stages for phase in _uneven(stage))
        ranks = stages[0].world_size
        yield f"a global_batch that is a multiple of micro_batch × ranks = {phase.micro_batch * ranks}"


def _first(numbers: range, works: Callable[[int], bool]) -> int | None:
    return next((number for number in numbers if works(number)), None)


def _shared(stage: Stage, ranks: int) -> bool:
    return all(divides_among(phase, ranks) for phase in stage.phases)


def _whole_copies(stage: Stage, ranks: int) -> bool:
    """Returns whether so many ranks divide into ``engine.replicate`` copies."""
    replicate = stage.recipe.engine.replicate
    return isinstance(replicate, str) or ranks % replicate == 0


def _micro_batches(stage: Stage, ranks: int) -> list[str] | None:
    """Returns overrides to the largest micro-batches, none above the present, that so many ranks share; None: none."""
    phases_of: dict[str, list[Phase]] = {}
    for phase in stage.phases:
        phases_of.setdefault(_key_of_micro_batch(stage, phase), []).append(phase)
    found = []
    for key, phases in phases_of.items():
        now = phases[0].micro_batch
        largest = next((clips for clips in range(now, 0, -1) if _fits(phases, clips, ranks)), None)
        if largest is None:
            return None
        found += [f"{key}={largest}"] * (largest != now)
    return found


def _fits(phases: Sequence[Phase], clips: int, ranks: int) -> bool:
    """Returns whether micro-batches of so many clips are whole parts of each mask group and of each rank's share."""
    return all(phase.mask_group % clips == 0 and phase.global_batch % (clips * ranks) == 0 for phase in phases)


def _key_of_micro_batch(stage: Stage, phase: Phase) -> str:
    for index, config in enumerate(stage.config.phases):
        if config.name == phase.name and config.micro_batch is not None:
            return f"{stage.name}.phases.{index}.micro_batch"
    return f"{stage.name}.micro_batch"
