"""What of a run is logged and measured, and where its metrics are sent to."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vjepa_scale.recipe.sections import Positive, PositiveInt, Section


class WandbConfig(Section):
    """One Weights & Biases run per stage. A ``WANDB_…`` variable of the environment wins over the key."""

    project: str = Field("vjepa_scale", description="project (WANDB_PROJECT)")
    entity: str | None = Field(None, description="user or team (WANDB_ENTITY); default: the account's own")
    group: str | None = Field(
        None, description="group of the stages' runs (WANDB_RUN_GROUP); default: the run folder's name"
    )
    name: str | None = Field(None, description="name before the stage's: NAME-STAGE (WANDB_NAME); default: as group")
    tags: list[str] = Field([], description="tags (WANDB_TAGS)")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="offline: files below RUN/STAGE/wandb, for wandb sync; auto: online where there is an API key and "
        "the server answers, else offline (WANDB_MODE)",
    )


class LogConfig(Section):
    every: PositiveInt = Field(10, description="steps between console lines; metrics.jsonl has every step")
    effective_rank_every: PositiveInt = Field(
        10,
        description="steps between measurements of the effective rank and of all other figures that cost something: "
        "of a collapse, losses of data sets, size of updates, memory (docs/watching.md)",
    )
    wandb: WandbConfig | None = None
    tensorboard: bool = Field(False, description="write event files below RUN/STAGE/tensorboard (docs/watching.md)")
    sink_timeout_s: Positive = Field(
        10.0, description="seconds that the end of a stage waits, at most, until W&B and TensorBoard have all rows"
    )

    @property
    def sinks(self) -> list[str]:
        """Where the metrics are sent to beside metrics.jsonl."""
        return ["wandb"] * (self.wandb is not None) + ["tensorboard"] * self.tensorboard


# A step of a large network has 100,000 events; a profiler keeps all of them in memory.
MOST_PROFILED = 20

_Count = Annotated[int, Field(ge=0, strict=True)]


class ProfileConfig(Section):
    """What is measured of single steps (docs/watching.md). Results do not depend on it."""

    steps: tuple[_Count, _Count] | None = Field(
        None,
        description="[a, b]: a trace of the global steps a to b−1 and a table of where their time went, below "
        f"RUN/STAGE/profile; at most {MOST_PROFILED} steps; null: none",
    )
    ranks: list[_Count] = Field([0], description="ranks that write a trace and a table")
    memory: bool = Field(
        False,
        description="of CUDA: record allocations from the start on, and write a snapshot for pytorch.org/memory_viz at "
        "the end of profile.steps and when memory runs out",
    )
    slow_factor: Annotated[float, Field(gt=1)] | None = Field(
        10.0,
        description="a step that takes so many times the median of its phase, and at least 10 s, writes the stacks of "
        "every rank and its loader workers into RUN/STAGE/stacks; null: off",
    )

    @model_validator(mode="after")
    def _is_a_short_range(self) -> "ProfileConfig":
        if self.steps is not None and not 0 < self.steps[1] - self.steps[0] <= MOST_PROFILED:
            first, end = self.steps
            raise ValueError(
                f"steps [{first}, {end}] is not a range of 1 to {MOST_PROFILED} steps: the second number is the first "
                f"step that is not profiled, for example [{first}, {first + 3}]"
            )
        return self
