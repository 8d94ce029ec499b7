"""What warns, or ends a run, when training goes wrong."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from vjepa_scale.recipe.sections import PositiveInt, Section

SETTLES_STEPS = 100


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


class GuardsConfig(Section):
    collapse: Literal["off", "warn", "stop"] = Field(
        "warn", description="what happens when a figure stays beyond its limit (docs/watching.md)"
    )
    patience: PositiveInt = Field(3, description="consecutive measurements beyond a limit until it counts")
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
