"""Phases: ranges of global steps with one resolved configuration.

Steps are counted from 0; a phase covers ``first <= step < end`` of the global step, which never resets:
a cooldown's phases count from the step of the checkpoint that it continues from.
"""

import math
from dataclasses import dataclass, field

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.stage_sections import RampShape, StageConfig


@dataclass(frozen=True)
class Ramp:
    """A value that changes from ``start`` to ``final``, in closed form: no state, so a resumed run computes the same.

    first: the global step at which it begins
    steps: the horizon, the number of steps to ``final``; training may end earlier; later the value stays at ``final``
    """

    start: float
    final: float
    first: int
    steps: int
    shape: RampShape = "linear"

    def after(self, done: int) -> float:
        """Returns the value after ``done`` steps: start + (final − start)·f(done/steps).

        Linear: f(x) = x; cosine: f(x) = (1 − cos πx)/2.
        """
        if done >= self.steps:  # exact, without the formula's rounding
            return self.final
        if self.shape == "cosine":
            return self.start + (self.final - self.start) * (1 - math.cos(math.pi * done / self.steps)) / 2
        return self.start + (self.final - self.start) * done / self.steps


@dataclass(frozen=True)
class Phase:
    """A range of global steps with one resolved configuration.

    first, steps:  the global steps first … first+steps-1
    frames, size:  T and (H, W) of a clip, in frames and pixels
    mixture:       weight of each data set that is drawn from (all positive)
    own_frames:    T of the data sets whose clips have another length
    mask_group:    number of consecutive slots with one geometry; matters if there are several geometries
    lr_shape, lr_horizon: of the learning rate's ramp from start_lr to final_lr; the horizon in steps, None: ``steps``
    weight_decay_ramp, ema_ramp: schedules that cover the phase; None: the recipe's constants
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
    lr_shape: RampShape = "linear"
    lr_horizon: int | None = None
    weight_decay_ramp: Ramp | None = None
    ema_ramp: Ramp | None = None

    @property
    def end(self) -> int:
        return self.first + self.steps

    @property
    def lr_ramp(self) -> Ramp:
        return Ramp(self.start_lr, self.final_lr, self.first, self.lr_horizon or self.steps, self.lr_shape)

    @property
    def last_lr(self) -> float:
        """The learning rate of its last step, which is the next phase's default start."""
        return self.lr_ramp.after(self.steps)

    def lr(self, step: int) -> float:
        """Returns the learning rate of a global step: the ramp's value after that step, so the last can be final_lr.

        A constant phase has start_lr = final_lr.
        """
        return self.lr_ramp.after(self._checked(step) - self.first + 1)

    def weight_decay(self, step: int) -> float | None:
        """Returns the weight decay of a global step: its ramp's value after that step; None if not scheduled."""
        ramp = self.weight_decay_ramp
        return None if ramp is None else ramp.after(self._checked(step) - ramp.first + 1)

    def ema_momentum(self, step: int) -> float | None:
        """Returns the EMA momentum of a global step: its ramp's value before that step, as published, so the first step
        has exactly ``start``. None if not scheduled.
        """
        ramp = self.ema_ramp
        return None if ramp is None else ramp.after(self._checked(step) - ramp.first)

    def _checked(self, step: int) -> int:
        if not self.first <= step < self.end:
            raise ValueError(f"step {step} is not in phase {self.name} ({self.first} to {self.end - 1})")
        return step

    def frames_of(self, name: str) -> int:
        """Returns T of a data set's clips."""
        return self.own_frames.get(name, self.frames)

    @property
    def geometries(self) -> dict[int, dict[str, float]]:
        """The part of the mixture that has each number of frames; data sets in the mixture's order."""
        parts: dict[int, dict[str, float]] = {}
        for name, weight in self.mixture.items():
            parts.setdefault(self.frames_of(name), {})[name] = weight
        return parts

    def grid(self, *, patch: int, tubelet: int, frames: int | None = None) -> tuple[int, int, int]:
        """Returns the token grid (t, h, w) of a clip of so many frames, by default the phase's."""
        return (self.frames if frames is None else frames) // tubelet, self.size[0] // patch, self.size[1] // patch


def phase_steps(stage: StageConfig) -> list[int]:
    """Returns the steps of each phase. Raises ValueError if they do not add up to the stage's."""
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
    """Returns the micro-batches per rank and step. Raises UserError if the ranks cannot share them equally."""
    micro_batches = phase.global_batch // phase.micro_batch
    if not divides_among(phase, dp_world_size):
        raise UserError(
            f"{phase.global_batch} clips in micro-batches of {phase.micro_batch} are {micro_batches}, "
            f"which {dp_world_size} ranks cannot share equally",
            where=f"{phase.stage}.global_batch",
            fix=f"other launch.nodes × launch.tasks_per_node, or a multiple of micro_batch × ranks = "
            f"{phase.micro_batch * dp_world_size}",
        )
    return micro_batches // dp_world_size


def divides_among(phase: Phase, ranks: int) -> bool:
    """Returns whether so many ranks can share the micro-batches of each step equally."""
    return phase.global_batch // phase.micro_batch % ranks == 0
