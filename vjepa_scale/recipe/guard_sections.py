"""What warns, or ends a run, when training goes wrong."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vjepa_scale.recipe.sections import Positive, PositiveInt, Section

SETTLES_STEPS = 100
Above1 = Annotated[float, Field(gt=1)]


@dataclass(frozen=True)
class Limit:
    """A limit of a column of metrics.jsonl: beyond it, its value is a sign of a collapse.

    value:   default; ``guards.limits`` has others
    above:   values above it are beyond it; else those below
    settles: the share of a stage's steps, but SETTLES_STEPS at least, after which it holds: what has to be learned
             first is judged later. 0: from the start
    """

    value: float
    above: bool = False
    settles: float = 0.0

    def holds(self, done: int, steps: int) -> bool:
        """Returns whether it holds after ``done`` of a stage's steps."""
        return not self.settles or done >= max(self.settles * steps, SETTLES_STEPS)

    def is_passed(self, value: float, limit: float) -> bool:
        """Returns whether a value is beyond ``limit``, of this side. NaN is."""
        return not (value <= limit if self.above else value >= limit)


# Chosen with seeds 1 to 3 of benchmarks/collapse.py and tested with 11 to 13: benchmarks/results/collapse.json.
LIMITS = {
    "effective_rank": Limit(5.0),
    "collapse/context_rank": Limit(5.0),
    "collapse/target_std": Limit(0.25),
    "collapse/context_std": Limit(0.25),
    "collapse/distance": Limit(1e-8),
    "collapse/over_time": Limit(0.01),
    "collapse/to_mean": Limit(1.05, above=True, settles=0.3),
    "collapse/to_copy": Limit(0.99, above=True, settles=0.7),
}


class SpikesConfig(Section):
    """What happens at a step whose loss or gradient norm is not finite, or far above the level of the steps before."""

    action: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="skip: the step changes nothing; rollback: training goes on from the last good checkpoint, without "
        "the clips since then; stop: the run ends (docs/watching.md)",
    )
    deviations: Positive | None = Field(
        10.0,
        description="robust standard deviations (1.4826 · MAD, of logarithms) above the median of the steps before, at "
        "which a value is a spike; null: only values that are not finite are",
    )
    window: PositiveInt = Field(
        128,
        description="steps whose median and deviation are the level; and steps after a spike in which a checkpoint is "
        "not good yet",
    )
    loss_factor: Above1 = Field(1.5, description="a loss below this multiple of the median is no spike")
    grad_norm_factor: Above1 = Field(10.0, description="a gradient norm below this multiple of the median is no spike")
    in_a_row: PositiveInt = Field(5, description="skipped steps in a row that are allowed; one more ends the run")
    per_1000: PositiveInt = Field(20, description="skipped steps that are allowed in 1000; one more ends the run")
    rollbacks: PositiveInt = Field(3, description="rollbacks that are allowed in 1000 steps; one more ends the run")


class DeviceCheckConfig(Section):
    """Every rank computes the same small products, whose exact results are known; each is compared, and timed."""

    every: PositiveInt | None = Field(
        1000,
        description="steps between checks of every rank's device, the first of them before the first step; a rank that "
        "computes wrong ends the job; null: never (docs/watching.md)",
    )
    slow_factor: Above1 | None = Field(
        1.3,
        description="a GPU that takes more than this multiple of the other ranks' median time is slow; null: none is",
    )
    window: PositiveInt = Field(3, description="consecutive checks in which a GPU is slow until it is named")


class GuardsConfig(Section):
    spikes: SpikesConfig = SpikesConfig()
    check_devices: DeviceCheckConfig = DeviceCheckConfig()
    collapse: Literal["off", "warn", "stop"] = Field(
        "warn", description="what happens when a figure stays beyond its limit (docs/watching.md)"
    )
    patience: PositiveInt = Field(3, description="consecutive measurements beyond a limit until it counts")
    step_limit_s: Positive | None = Field(
        None,
        description="a step that takes longer ends the attempt, and the ranks that did not arrive are named "
        "(docs/slurm.md); must be less than engine.timeout_s, and more than data.faults' limits; null: four fifths of "
        "engine.timeout_s, 480 s by default, and none for a single rank. Set-up, a phase's first step, saves and "
        "evaluations may take 4 × engine.timeout_s",
    )
    limits: dict[str, float | None] = Field(
        {}, description="other limits, by column; null: none, as `collapse/over_time` for videos in which nothing moves"
    )

    @field_validator("limits")
    @classmethod
    def _are_of_columns(cls, limits: dict[str, float | None]) -> dict[str, float | None]:
        for name in limits:
            if name not in LIMITS:
                raise ValueError(f"{name!r} has no limit; {', '.join(LIMITS)} have one")
        return limits
