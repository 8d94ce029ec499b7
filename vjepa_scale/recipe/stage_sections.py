"""The sections of a recipe for stages, their phases and clips."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vjepa_scale.recipe.sections import Fraction, Positive, PositiveInt, PositiveRange, Section, Size

Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="sgd has no momentum: for tests and comparisons")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="of AdamW")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.04, description="not applied to biases and 1-D parameters")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="the published code does not clip")


RampShape = Literal["linear", "cosine"]


def _as_horizon(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"must be steps (a whole number) or a multiple of what it covers (1.25), not {value!r}")
    return value


# In steps, or as a multiple of what the ramp covers: 112500, 1.25.
Horizon = Annotated[PositiveInt | Positive, BeforeValidator(_as_horizon)]


class RampConfig(Section):
    """A value that changes with the step; docs/recipes.md, Schedules."""

    start: float | None = None
    final: float
    shape: RampShape = Field("linear", description="linear, or cosine: half a period, flat at both ends")
    horizon: Horizon | None = Field(
        None,
        description="steps from start to final: an integer, or a multiple of the steps of the stage or phase (1.25); "
        "default: 1.0. A longer horizon is cut at the end of training; after a shorter one the value stays at final",
    )


class WeightDecayConfig(RampConfig):
    start: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="default: the last value of the phase or stage before, else optimizer.weight_decay. A number "
        "instead of the section is a constant. Not for probes, which have weight_decays",
    )
    final: Annotated[float, Field(ge=0)] = Field(description="weight decay after the horizon")


class MomentumConfig(RampConfig):
    start: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="default: the last value of the phase or stage before, else jepa.ema_momentum. A number instead "
        "of the section is a constant. Only for stages with a target encoder",
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(description="momentum after the horizon")


def _as_ramp(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"start": value, "final": value}
    if not isinstance(value, (dict, RampConfig)):
        raise ValueError(f"must be a number, or a section of start, final, shape and horizon, not {value!r}")
    return value


WeightDecay = Annotated[WeightDecayConfig, BeforeValidator(_as_ramp)]
EmaMomentum = Annotated[MomentumConfig, BeforeValidator(_as_ramp)]


class ClipConfig(Section):
    frames: PositiveInt = Field(16, description="frames of a clip, at data.fps")
    size: Size = Field((256, 256), description="height and width in pixels; one number for a square")


class PhaseClipConfig(Section):
    frames: PositiveInt | None = Field(None, description="default: the stage's")
    size: Size | None = Field(None, description="default: the stage's")


class PhaseConfig(Section):
    """A range of steps with one learning-rate ramp, one geometry, one batch, one mixture.

    Keys that a phase leaves out are its stage's.
    """

    name: str = Field(description="the phase's name in metrics and checkpoints")
    steps: PositiveInt | Fraction | None = Field(
        None, description="a whole number of steps, a fraction of the stage's, or (in one phase) all that remain"
    )
    start_lr: Annotated[float, Field(ge=0)] | None = Field(
        None, description="default: the last rate of the phase before"
    )
    final_lr: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the rate of the last step, unless lr_horizon is longer than the phase; default: start_lr"
    )
    lr_shape: RampShape = Field("linear", description="shape from start_lr to final_lr; cosine: half a period")
    lr_horizon: Horizon | None = Field(
        None,
        description="steps from start_lr to final_lr: an integer, or a multiple of the phase's steps (1.25); default: "
        "1.0. A longer horizon is cut at the phase's end; after a shorter one the rate stays at final_lr",
    )
    weight_decay: WeightDecay | None = Field(
        None, description="a schedule over the phase; default: the stage's, else the last value of the phase before"
    )
    ema_momentum: EmaMomentum | None = Field(
        None, description="a schedule over the phase; default: the stage's, else the last value of the phase before"
    )
    clip: PhaseClipConfig | None = None
    global_batch: PositiveInt | None = Field(None, description="default: the stage's")
    micro_batch: PositiveInt | None = Field(None, description="default: the stage's")
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = Field(None, description="default: the stage's")

    @model_validator(mode="after")
    def _a_rate_that_changes(self) -> "PhaseConfig":
        if self.final_lr is None and (self.lr_shape != "linear" or self.lr_horizon is not None):
            raise ValueError("lr_shape and lr_horizon need final_lr, which is not given")
        return self


class StageLaunchConfig(Section):
    """Keys of ``launch`` that a stage overrides."""

    nodes: PositiveInt | None = Field(None, description="default: launch.nodes")
    tasks_per_node: PositiveInt | None = Field(None, description="default: launch.tasks_per_node")
    cpus_per_task: PositiveInt | None = Field(None, description="default: launch.cpus_per_task")
    timeout_min: PositiveInt | None = Field(None, description="default: launch.timeout_min")

    def given(self) -> dict[str, int]:
        return self.model_dump(exclude_none=True)


class StageConfig(Section):
    """One stage, which runs as one job."""

    kind: str | None = Field(
        None,
        description="required for a stage with another name than pretrain, cooldown, action or probe: jepa (as "
        "pretrain and cooldown), action, probe, or another kind of recipe/registry.py",
    )
    launch: StageLaunchConfig | None = None
    steps: PositiveInt = Field(description="optimiser steps of the stage")
    clip: ClipConfig = ClipConfig()
    global_batch: PositiveInt = Field(3072, description="clips per optimiser step, over all ranks")
    micro_batch: PositiveInt = Field(
        24, description="clips per forward pass; for pretrain and cooldown a divisor of masks.group"
    )
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="weights of data.sets in this stage; a set that is not listed has 0; default: their weight"
    )
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    optimizer: OptimizerConfig | None = Field(None, description="replaces the whole section of that name")
    weight_decay: WeightDecay | None = None
    ema_momentum: EmaMomentum | None = None
    continue_from: str | None = Field(
        None,
        description="a stage of this recipe, a checkpoint or a published .pt: weights, EMA, optimiser and step "
        "continue from it",
    )
    init_from: str | None = Field(
        None,
        description="weights only, step 0: from a stage of this recipe, a checkpoint, a published .pt, a Hugging Face "
        "or a consolidated folder. Required for action and probe, which take its target encoder; probe: or `untrained`",
    )
    init_without: tuple[Literal["predictor", "action_predictor"], ...] = Field(
        (), description="networks that init_from does not load; all others must be in the source"
    )

    @model_validator(mode="after")
    def _one_start(self) -> "StageConfig":
        if self.continue_from and self.init_from:
            raise ValueError("continue_from (all state) and init_from (weights only) exclude each other")
        if "init_without" in self.model_fields_set and self.init_without and not self.init_from:
            raise ValueError("init_without needs init_from, which is not given")
        return self


class ActionStageConfig(StageConfig):
    """Action-conditioned post-training on robots' trajectories, with a frozen encoder (docs/method.md 8)."""

    clip: ClipConfig = ClipConfig(frames=8)
    global_batch: PositiveInt = Field(256, description="clips per optimiser step, over all ranks")
    micro_batch: PositiveInt = Field(8, description="clips per forward pass")
    init_without: tuple[Literal["predictor", "action_predictor"], ...] = Field(
        ("action_predictor",),
        description="networks that init_from does not load; []: loads an action checkpoint's predictor",
    )
    rollout_steps: PositiveInt = Field(
        2, description="steps that the predictor predicts from its own predictions, in the second part of the loss"
    )
    crop_aspect: PositiveRange = Field(
        (0.75, 1.35),
        description="width over height of the crop, which is squashed to clip.size: the whole picture if it is within "
        "this range, else the largest centred part",
    )
    loss_exponent: Positive = Field(1.0, description="p of mean |difference|^p / p; 1: L1")

    @model_validator(mode="after")
    def _something_to_freeze(self) -> "ActionStageConfig":
        if not (self.init_from or self.continue_from):
            raise ValueError("init_from: the stage or the weights whose encoder is frozen")
        return self


class ViewsConfig(Section):
    """Evaluation averages over several views of a video."""

    segments: PositiveInt = Field(1, description="clips of a video, evenly spaced")
    crops: Literal[1, 3] = Field(1, description="crops of a clip. 1: the centre; 3: both ends of the longer side too")


# PyTorch's default, with which the published probes were trained; Hugging Face's classifier has another one.
PROBE_EPS, EXPORTED_PROBE_EPS = 1e-5, 1e-6


class ProbeStageConfig(StageConfig):
    """Attentive probes on a frozen encoder, several settings trained at once (docs/method.md 10)."""

    global_batch: PositiveInt = Field(256, description="clips per optimiser step, over all ranks")
    micro_batch: PositiveInt = Field(8, description="clips per forward pass")
    evaluate_on: str = Field(description="the data set, one of data.sets, on which the probes are evaluated at the end")
    lr_scales: tuple[Positive, ...] = Field(
        (1.0, 0.6, 0.2, 0.06, 0.02), min_length=1, description="a probe for each: the phase's learning rate times this"
    )
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.01, 0.1, 0.4, 0.8), min_length=1, description="and for each of these"
    )
    depth: PositiveInt = Field(4, description="blocks of a probe: one of cross-attention after the others")
    heads: PositiveInt = Field(16, description="attention heads of a probe; a divisor of the encoder's width")
    eps: Positive | None = Field(
        None,
        description="of a probe's LayerNorms; default: 1e-6, as in Hugging Face's classifier, if heads equals the "
        "encoder's, so that the probe can be exported; else 1e-5, as published; a started run keeps its value",
    )
    labels_per_class: PositiveInt | None = Field(
        None, description="train on this many records of each class, drawn by data.seed; default: on all"
    )
    label_draws: PositiveInt = Field(
        1,
        description="disjoint draws of labels_per_class records, each with its own probes: results with few labels "
        "depend on the draw, so accuracies are means with a spread",
    )
    choose_per_class: PositiveInt | None = Field(
        None,
        description="choose the best setting on this many further records of each class of the training set, which "
        "are not trained on; default: on evaluate_on itself, as published",
    )
    keep_tokens: bool = Field(
        False,
        description="for few labels: a training clip is taken as in the evaluation (the video's middle, the centre), "
        "encoded once, and its tokens are kept in memory, so that a step computes only the probes; false: another "
        "window and crop each time, by data.augment",
    )
    views: ViewsConfig = ViewsConfig()
    neighbours: PositiveInt = Field(5, description="k of the k-NN accuracy that is reported with the probes'")

    @model_validator(mode="after")
    def _something_to_freeze(self) -> "ProbeStageConfig":
        if not (self.init_from or self.continue_from):
            raise ValueError("init_from: the stage or the weights whose encoder is frozen; or untrained")
        if self.label_draws > 1 and self.labels_per_class is None:
            raise ValueError("label_draws: several draws need labels_per_class")
        return self

    def layer_norm_eps(self, encoder_heads: int) -> float:
        """Returns ``eps``, or its default for an encoder of so many heads."""
        if self.eps is not None:
            return self.eps
        return EXPORTED_PROBE_EPS if self.heads == encoder_heads else PROBE_EPS
