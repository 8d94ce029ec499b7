"""Phases: stretches of the global step with everything about them decided.

Steps are counted from 0; a phase covers ``first <= step < end`` of the global step, which never resets:
a cooldown's phases count from the step of the checkpoint that it continues from.
"""

from dataclasses import dataclass, field

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.stage_sections import StageConfig


@dataclass(frozen=True)
class Phase:
    """One stretch of steps.

    first, steps:  the global steps first … first+steps-1
    frames, size:  T and (H, W) of a clip, in frames and pixels
    mixture:       weight of each data set that is drawn from (all positive)
    own_frames:    T of those data sets whose clips have another length
    mask_group:    consecutive slots of one geometry; matters where there are several
    """

    stage: str
    name: str
    first: int
    steps: int
    start_lr: float
    final_lr: float
    frames: int
    size: tuple[int, int]
    global_batch: int
    micro_batch: int
    mixture: dict[str, float]
    own_frames: dict[str, int] = field(default_factory=dict)
    mask_group: int = 1

    @property
    def end(self) -> int:
        return self.first + self.steps

    def lr(self, step: int) -> float:
        """The learning rate of a global step: a linear ramp whose last step has exactly final_lr.

        lr(s) = start + (final − start)·(s − first + 1)/steps; a constant phase has start = final.
        """
        if not self.first <= step < self.end:
            raise ValueError(f"step {step} is not in phase {self.name} ({self.first} to {self.end - 1})")
        done = step - self.first + 1
        if done == self.steps:  # exactly, whatever the rounding of the formula
            return self.final_lr
        return self.start_lr + (self.final_lr - self.start_lr) * done / self.steps

    def frames_of(self, name: str) -> int:
        """T of a data set's clips."""
        return self.own_frames.get(name, self.frames)

    @property
    def geometries(self) -> dict[int, dict[str, float]]:
        """The part of the mixture that has each number of frames; data sets in the mixture's order."""
        parts: dict[int, dict[str, float]] = {}
        for name, weight in self.mixture.items():
            parts.setdefault(self.frames_of(name), {})[name] = weight
        return parts

    def grid(self, *, patch: int, tubelet: int, frames: int | None = None) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a clip of so many frames, by default the phase's."""
        return (self.frames if frames is None else frames) // tubelet, self.size[0] // patch, self.size[1] // patch


def phase_steps(stage: StageConfig) -> list[int]:
    """Steps of each phase; raises ValueError where they do not add up to the stage's."""
    fixed = [
        None if p.steps is None else p.steps if isinstance(p.steps, int) else round(p.steps * stage.steps)
        for p in stage.phases
    ]
    rest = stage.steps - sum(n for n in fixed if n is not None)
    open_phases = fixed.count(None)
    if open_phases > 1:
        raise ValueError("only one phase may leave out steps")
    if rest < 0 or (open_phases == 0 and rest != 0):
        raise ValueError(f"phases take {stage.steps - rest} steps, the stage has {stage.steps}")
    return [rest if n is None else n for n in fixed]


def accumulation(phase: Phase, *, dp_world_size: int) -> int:
    """Micro-batches per rank and step. Raises UserError where the ranks do not divide them."""
    micro_batches = phase.global_batch // phase.micro_batch
    if micro_batches % dp_world_size:
        raise UserError(
            f"{phase.global_batch} clips in micro-batches of {phase.micro_batch} are {micro_batches}, "
            f"which {dp_world_size} ranks cannot share equally",
            where=f"{phase.stage}.global_batch",
            fix=f"other launch.nodes × launch.tasks_per_node, or a multiple of micro_batch × ranks = "
            f"{phase.micro_batch * dp_world_size}",
        )
    return micro_batches // dp_world_size
