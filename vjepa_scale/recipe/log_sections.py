"""What of a run is logged, and where its metrics are sent to."""

from typing import Literal

from pydantic import Field

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
        10, description="steps between measurements of the effective rank of the target features"
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
