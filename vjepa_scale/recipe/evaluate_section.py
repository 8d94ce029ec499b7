"""The section ``evaluate``: which checkpoints are evaluated on a fixed held-out set, where, and by which settings."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.sections import Positive, PositiveInt, Section, Size

if TYPE_CHECKING:
    from vjepa_scale.recipe.stage import Stage


class EvaluateLaunchConfig(Section):
    """The Slurm job of ``where: own``; its other options are those of the profile."""

    profile: str | None = Field(None, description="site profile; default: the stage's launch.profile")
    partition: str | None = Field(None, description="default: the profile's")
    gpus: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="GPUs of the job; default: 1 if the recipe trains on GPUs, else 0"
    )
    cpus_per_task: PositiveInt = Field(8, description="CPU cores")
    timeout_min: PositiveInt = Field(
        120, description="time limit in minutes; what is not evaluated then is left to the next job"
    )


class EvaluateConfig(Section):
    """Evaluates checkpoints on held-out clips (docs/watching.md). Either ``train`` and ``val``, or ``data``."""

    train: str | None = Field(
        None, description="the labelled data set, one of data.sets, whose clips are the k-NN's and the probe's examples"
    )
    val: str | None = Field(None, description="the labelled data set that is classified; must share no clip with train")
    data: str | None = Field(
        None,
        description="instead of train and val: a data set without labels, for held-out loss and effective rank only",
    )
    every: PositiveInt | None = Field(
        None,
        description="steps, a multiple of checkpoint.every: checkpoints of these steps and of ends of phases are "
        "evaluated; default: checkpoint.every",
    )
    stages: tuple[str, ...] | None = Field(
        None, description="stages whose checkpoints are evaluated; default: all that train an encoder"
    )
    clips: PositiveInt = Field(1000, description="records of val, or of data, at most; a fixed draw")
    labels_per_class: PositiveInt | Literal["all"] = Field(
        10, description="examples of each class of train; a fixed draw; all: every record"
    )
    neighbours: PositiveInt = Field(5, description="k of the k-NN")
    frames: PositiveInt | None = Field(None, description="frames of a clip; default: those of the stage's first phase")
    size: Size | None = Field(None, description="pixels of a clip; default: those of the stage's first phase")
    fps: Positive | None = Field(None, description="frames per second of a clip; default: the data set's")
    batch: PositiveInt = Field(8, description="clips per forward pass")
    workers: Annotated[int, Field(ge=0, strict=True)] = Field(1, description="decoding processes; 0: in the evaluation")
    where: Literal["own", "job", "off"] = Field(
        "own",
        description="own: a Slurm job of its own for what is due, or on this machine a process of its own; job: a "
        "process on the node of the stage's rank 0; off: only by tools/evaluate.py",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: CPU beside a training, in a job of its own a GPU if there is one; cuda beside a training "
        "needs GPU memory that the training leaves free",
    )
    finish_s: Annotated[float, Field(ge=0)] = Field(
        60.0,
        description="seconds that a stage that is done waits, at most, for evaluations on its own node; the rest is "
        "left to tools/evaluate.py",
    )
    launch: EvaluateLaunchConfig = EvaluateLaunchConfig()

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> "EvaluateConfig":
        if self.data is not None and (self.train or self.val):
            raise ValueError("data is for a set without labels: give either data, or train and val")
        if self.data is None and not (self.train and self.val):
            raise ValueError("give train and val, two labelled data sets, or data, one without labels")
        if self.train is not None and self.train == self.val:
            raise ValueError("train and val are the same data set: its clips would be their own nearest neighbours")
        return self

    @property
    def held_out(self) -> str:
        """The data set that is evaluated on."""
        name = self.data or self.val
        assert name is not None
        return name

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(name for name in (self.train, self.val, self.data) if name is not None)


def evaluation_of(stage: "Stage") -> EvaluateConfig | None:
    """Returns the section if it applies to a stage, else None."""
    config: EvaluateConfig | None = stage.recipe.evaluate
    if (
        config is None
        or not stage.has_target_encoder
        or (config.stages is not None and stage.name not in config.stages)
    ):
        return None
    return config


def settings_of(stage: "Stage", config: EvaluateConfig) -> dict[str, Any]:
    """Returns what a result depends on besides checkpoint and clips, as JSON: only results with equal settings compare.

    recipe: of the masks, the loss and the normalisation of pixels, a hash
    """
    first, recipe = stage.phases[0], stage.recipe
    also = recipe.masks.model_dump(mode="json"), recipe.jepa.loss_exponent, recipe.data.augment.mean
    hashed = hashlib.sha256(json.dumps([*also, recipe.data.augment.std]).encode()).hexdigest()[:8]
    size = config.size or first.size
    labelled = config.data is None
    return {
        **{key: name for key in ("train", "val", "data") if (name := getattr(config, key)) is not None},
        "clips": config.clips,
        "frames": config.frames or first.frames,
        "size": list(size),
        "fps": config.fps or stage.data.fps_of(config.held_out),
        "recipe": hashed,
        **({"labels_per_class": config.labels_per_class, "neighbours": config.neighbours} if labelled else {}),
    }


def check_evaluate(stages: Mapping[str, "Stage"], config: EvaluateConfig, source: object) -> None:
    """Checks the section against the recipe's stages and data. Raises UserError naming ``source:evaluate.key``."""
    key, recipe = f"{source}:evaluate", next(iter(stages.values())).recipe
    for word in ("train", "val", "data"):
        if (name := getattr(config, word)) is not None and name not in recipe.data.sets:
            raise UserError(
                f"{name!r} is not in data.sets", where=f"{key}.{word}", fix=f"known: {', '.join(recipe.data.sets)}"
            )
    able = [name for name, stage in stages.items() if stage.has_target_encoder]
    if not able:
        raise UserError("no stage of the recipe trains an encoder", where=key, fix="leave the section out")
    for name in config.stages or ():
        if name not in able:
            what = f"the stage {name!r} trains no encoder" if name in stages else f"no stage {name!r} in the recipe"
            raise UserError(what, where=f"{key}.stages", fix=f"known: {', '.join(able)}")
    if config.every is not None and config.every % recipe.checkpoint.every:
        raise UserError(
            f"evaluations read saved checkpoints, and {config.every} is no multiple of checkpoint.every "
            f"({recipe.checkpoint.every})",
            where=f"{key}.every",
            fix=f"a multiple of {recipe.checkpoint.every}, or another checkpoint.every",
        )
    for stage in stages.values():
        if evaluation_of(stage) is not None:
            _check_geometry(stage, config, key)


def _check_geometry(stage: "Stage", config: EvaluateConfig, key: str) -> None:
    recipe, settings = stage.recipe, settings_of(stage, config)
    if settings["frames"] % recipe.model.tubelet:
        raise UserError(
            f"{settings['frames']} frames do not divide into tubelets of {recipe.model.tubelet}",
            where=f"{key}.frames",
            fix=f"a multiple of model.tubelet ({recipe.model.tubelet})",
        )
    height, width = settings["size"]
    if height % recipe.model.patch or width % recipe.model.patch:
        raise UserError(
            f"{height}×{width} pixels do not divide into patches of {recipe.model.patch}", where=f"{key}.size"
        )
