"""The schema of a recipe. Unknown keys are errors; defaults are the V-JEPA 2 paper's (arXiv 2506.09985).

Batches are global and counted in clips; lengths are in steps; sizes in pixels; times in seconds.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from vjepa_scale.recipe import limits
from vjepa_scale.recipe.evaluate_section import EvaluateConfig
from vjepa_scale.recipe.guard_sections import GuardsConfig
from vjepa_scale.recipe.log_sections import LogConfig, ProfileConfig
from vjepa_scale.recipe.mask_sections import MasksConfig
from vjepa_scale.recipe.registry import DEFAULT_KINDS, STAGES, class_of
from vjepa_scale.recipe.sections import (
    Blocks,
    Channels,
    Hidden,
    Positive,
    PositiveInt,
    PositiveRange,
    Section,
    ShareRange,
    Side,
    Size,
)
from vjepa_scale.recipe.stage_sections import ActionStageConfig, OptimizerConfig, ProbeStageConfig, StageConfig

# -- run, launch, engine ---------------------------------------------------------------------------


class RunConfig(Section):
    """The run folder and the seed."""

    dir: str = Field(description="the run folder; everything the run writes is inside it")
    seed: int = Field(0, description="seed of weights, masks and augmentation")


class LaunchConfig(Section):
    """Where the stages run, and as how many processes."""

    cluster: Literal["auto", "local", "slurm"] = Field(
        "auto", description="auto: Slurm if the sbatch command is found, else this machine"
    )
    profile: str | None = Field(
        None, description="the site's Slurm options: a path, a name in slurm/profiles/ here, or a shipped profile"
    )
    nodes: PositiveInt = Field(1, description="machines per stage")
    tasks_per_node: PositiveInt = Field(1, description="processes per node: one per GPU, or any number on CPU")
    cpus_per_task: PositiveInt = Field(1, description="CPU cores per process, for loader workers and threads")
    timeout_min: PositiveInt = Field(
        24 * 60, description="time limit of one job, in minutes; a stage that needs longer saves and is queued again"
    )
    gpu: Literal["A100", "H100", "H200", "RTX4090"] = Field(
        "H100",
        description="the GPU for which --dry-run computes memory and time, with 80, 80, 141 and 24 GB; nothing else "
        "depends on it",
    )
    max_restarts: Annotated[int, Field(ge=0, strict=True)] = Field(
        3, description="restarts in a row that bring no new checkpoint before a stage gives up; 0: none after a failure"
    )


class EngineConfig(Section):
    """How networks are sharded and computed. The method does not depend on these keys."""

    kind: Literal["fsdp", "deepspeed"] = Field(
        "fsdp", description="how networks are sharded: by PyTorch's FSDP2, or by DeepSpeed's ZeRO"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="of DeepSpeed: what it shards. 1: optimiser state; 2: gradients too; 3: weights too"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU per process, or CPU without GPUs")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="compute type; master weights, optimiser, EMA and reduction stay float32"
    )
    replicate: PositiveInt | Literal["auto", "all"] = Field(
        1,
        description="hybrid sharding: number of groups that each hold a full sharded copy; auto: one per node, so that "
        "weights are gathered only inside nodes; all: one per process, so that nothing is sharded",
    )
    reshard_after_forward: bool | Literal["auto"] = Field(
        True,
        description="false keeps gathered weights from forward to backward: more memory, fewer all-gathers; auto: "
        "false if there are several sharded copies (replicate)",
    )
    shard_blocks: bool = Field(
        True,
        description="false gathers and reduces a network as a whole: for small networks, where a collective per block "
        "costs more than it saves",
    )
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="full: keep only each block's input and recompute the rest in the backward pass; selective: keep "
        "the outputs of matrix products and attention too, and recompute only cheap operations",
    )
    compile: bool = Field(
        False, description="compile each block (torch.compile), for any number of tokens; the first steps take minutes"
    )
    prefetch: Annotated[int, Field(ge=0, strict=True)] = Field(
        1,
        description="of FSDP2: number of blocks whose weights are gathered in advance, also across networks",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: only kernels that give the same bits each time, and are slower; on CPU it is always so",
    )
    attention: Literal["auto", "sdpa", "flash", "varlen", "fa3", "fa4"] = Field(
        "auto",
        description="sdpa: PyTorch's choice; flash: the flash-attn package, or else PyTorch's flash kernel; varlen: "
        "PyTorch's variable-length kernel; fa3, fa4: FlashAttention-3 and -4 instead of PyTorch's flash kernel; auto: "
        "the fastest that is installed and passes a trial (docs/model.md), else sdpa",
    )
    threads: PositiveInt = Field(1, description="CPU threads per process; the bits of a run depend on it")
    timeout_s: PositiveInt = Field(600, description="seconds after which a waiting collective is an error")

    @model_validator(mode="after")
    def _what_zero_can(self) -> "EngineConfig":
        if self.kind == "deepspeed":
            if self.replicate not in (1, "auto"):
                raise ValueError("replicate is FSDP2's hybrid sharding; DeepSpeed shards over all processes")
            if not self.reshard_after_forward:
                raise ValueError(
                    "reshard_after_forward is FSDP2's; for weights that stay gathered use zero_stage 1 or 2"
                )
            if not self.shard_blocks:
                raise ValueError("shard_blocks is FSDP2's; DeepSpeed shards over a whole network")
            if self.compile and self.zero_stage == 3:
                raise ValueError(
                    "compile does not go with zero_stage 3, which gathers weights inside a block: use 1, 2 or fsdp"
                )
        return self


# -- data ------------------------------------------------------------------------------------------


class DataSetConfig(Section):
    """One folder of shards."""

    path: str = Field(description="a folder with manifest.json, written by tools/make_shards.py")
    weight: Annotated[float, Field(ge=0)] = Field(1.0, description="share of the mixture, relative to the others")
    fps: Positive | None = Field(None, description="frames per second of its clips; default: data.fps")
    frames: PositiveInt | None = Field(
        None,
        description="frames of its clips in every phase, a multiple of model.tubelet; for images, model.tubelet costs "
        "least; default: the phase's clip.frames",
    )


class AugmentConfig(Section):
    """One draw per clip (method: paper section 2.3 and the published configs)."""

    area: ShareRange = Field((0.3, 1.0), description="area of the crop as a fraction of the picture's")
    aspect: PositiveRange = Field((0.75, 1.35), description="width over height of the crop")
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    rate: PositiveRange = Field(
        (1.0, 1.0), description="temporal jitter: a factor for a clip's frames per second, drawn from this range"
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of RGB in [0, 1]: ImageNet's")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="of RGB in [0, 1]: ImageNet's")


class FaultsConfig(Section):
    """Clips that do not decode in training (docs/loader.md)."""

    max_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.001,
        description="fraction of the clips of a window that may be replaced because they do not decode; above it the "
        "run stops; 0: the first one stops it",
    )
    window: PositiveInt = Field(100, description="number of steps over which max_rate is computed")
    decode_timeout_s: Positive = Field(
        30.0,
        description="a clip whose decoding takes longer is replaced and its worker killed (not with data.workers 0); "
        "must be less than engine.timeout_s",
    )
    item_timeout_s: Positive | None = Field(
        None,
        description="a loader worker whose batch is awaited and that reads no further clip for so long is killed, and "
        "the attempt ends with its name and file (docs/loader.md); null: midway between decode_timeout_s and "
        "guards.step_limit_s, 255 s by default",
    )


class DataConfig(Section):
    sets: dict[str, DataSetConfig] = Field(min_length=1)
    seed: int = Field(0, description="seed of the order of the data and of clip windows")
    fps: Annotated[float, Field(gt=0)] = Field(4.0, description="frames per second of a clip, in physical time")
    sampling: Literal["time", "stride"] = Field(
        "time",
        description="time: the picture that is displayed at each time of a clip; stride: every n-th frame, with n = "
        "⌈source fps⌉ // fps, as in the published code",
    )
    decoder: Literal["pyav", "torchcodec"] = Field(
        "pyav", description="of training clips; torchcodec (where installed) for MP4, MOV, Matroska and WebM"
    )
    lanes: PositiveInt = Field(128, description="number of shards that an epoch reads in parallel")
    workers: Annotated[int, Field(ge=0, strict=True)] = Field(
        4, description="loader processes per rank; 0: in the rank"
    )
    prefetch: PositiveInt = Field(2, description="micro-batches that each worker prepares in advance")
    augment: AugmentConfig = AugmentConfig()
    faults: FaultsConfig = FaultsConfig()

    def fps_of(self, name: str) -> float:
        """Returns the frames per second of a data set's clips, without jitter."""
        own = self.sets[name].fps
        return self.fps if own is None else own


# -- model -----------------------------------------------------------------------------------------

# width, depth, heads, MLP hidden (docs/method.md 2)
ENCODERS = {
    "vit_tiny": (192, 12, 3, 768),
    "vit_small": (384, 12, 6, 1536),
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
    "vit_giant": (1408, 40, 22, 6144),
    "vit_gigantic": (1664, 48, 26, 8192),
}


def _named_encoder(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in ENCODERS:
        raise ValueError(f"no encoder named {value!r}; there are {', '.join(ENCODERS)}, or give width, depth, heads")
    return dict(zip(("width", "depth", "heads", "mlp_hidden"), ENCODERS[value], strict=True))


class _Transformer(Section):
    width: Channels = Field(description="channels of a token")
    depth: Blocks = Field(description="blocks")
    heads: Channels = Field(description="attention heads; the published sizes have head size 64")
    mlp_hidden: Annotated[int, Field(ge=0, le=2**22, strict=True)] = Field(
        0, description="hidden channels of the MLP; 0: 4 × width"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_hidden(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("mlp_hidden") and isinstance(value.get("width"), int):
            value = {**value, "mlp_hidden": 4 * value["width"]}
        return value

    @model_validator(mode="after")
    def _head_size(self) -> "_Transformer":
        if self.width % self.heads or (self.width // self.heads) % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: the head size must be an even whole number of at least 6"
            )
        return self


class EncoderConfig(_Transformer):
    """A ViT, by explicit sizes (or by a name, see ENCODERS)."""


class PredictorConfig(_Transformer):
    """The pretraining predictor (docs/method.md 5)."""

    width: Channels = Field(384, description="channels of a token")
    depth: Blocks = Field(12, description="blocks")
    heads: Channels = Field(12, description="attention heads")
    mlp_hidden: Hidden = Field(1536, description="hidden channels of the MLP; if width is given: 4 × width")
    mask_tokens: Blocks = Field(
        2, description="learned mask tokens; mask generator j uses token j mod this (see jepa.mask_token)"
    )


class ActionPredictorConfig(_Transformer):
    """The action-conditioned predictor (docs/method.md 8)."""

    width: Channels = Field(1024, description="channels of a token")
    depth: Blocks = Field(24, description="blocks")
    heads: Channels = Field(16, description="attention heads")
    mlp_hidden: Hidden = Field(4096, description="hidden channels of the MLP; if width is given: 4 × width")
    extrinsics: bool = Field(False, description="a third condition token per step: the camera's pose")
    grid: Size = Field(
        (16, 16), description="h and w of the pretraining grid: patch positions on another grid are rescaled to it"
    )
    layout: Literal["tiled", "interleaved"] = Field("tiled", description="as model.rope.layout")


class RopeConfig(Section):
    layout: Literal["tiled", "interleaved"] = Field(
        "tiled", description="order of the angles over a head's channels (docs/method.md 3); tiled is V-JEPA 2's"
    )
    grid: Size | None = Field(
        None,
        description="height and width in tokens of the pretraining grid, to which positions on other grids are "
        "rescaled (V-JEPA 2.1: 16); default: positions are never rescaled",
    )


class SincosConfig(Section):
    """Fixed positions, added to the tokens (docs/method.md 13)."""

    frames: PositiveInt = Field(16, description="frames of the clips of the table; 1: a table for images")
    size: Size = Field((224, 224), description="height and width of its clips in pixels; others: interpolated")
    uniform_power: bool = Field(
        True, description="true: time, height, width get a third of the channels each; false: a half and two quarters"
    )


CHANNELS = 3  # of a picture


class ModelConfig(Section):
    encoder: Annotated[EncoderConfig, BeforeValidator(_named_encoder)]
    predictor: PredictorConfig = PredictorConfig()
    action_predictor: ActionPredictorConfig = ActionPredictorConfig()
    patch: Side = Field(16, description="pixels per token side")
    tubelet: Side = Field(2, description="frames per token")
    positions: Literal["rope", "sincos"] = Field(
        "rope",
        description="rope: rotated queries and keys; sincos: a fixed table added to the tokens (V-JEPA 1, I-JEPA)",
    )
    rope: RopeConfig = RopeConfig()
    sincos: SincosConfig = SincosConfig()

    @model_validator(mode="after")
    def _table_divides(self) -> "ModelConfig":
        if self.positions == "sincos":
            frames, (height, width) = self.sincos.frames, self.sincos.size
            if (frames % self.tubelet and frames != 1) or height % self.patch or width % self.patch:
                raise ValueError(
                    f"sincos: {frames} frames of {height}×{width} pixels do not divide into tubelets of "
                    f"{self.tubelet}×{self.patch}×{self.patch}"
                )
            for name, network in (("encoder", self.encoder), ("predictor", self.predictor)):
                if network.width % 8:
                    raise ValueError(f"sincos: {name}.width {network.width} is not a multiple of 8")
        return self


# -- loss, checkpoints, log ------------------------------------------------------------------------


class JepaConfig(Section):
    ema_momentum: Annotated[float, Field(ge=0, le=1)] = Field(
        0.99925, description="m of the target encoder: θ̄ ← m·θ̄ + (1−m)·θ after every step"
    )
    mask_token: Literal["per_generator", "first"] = Field(
        "per_generator",
        description="per_generator: mask generator j uses mask token j; first: all use token 0, as in the published "
        "code if all clips have one length",
    )
    loss_exponent: Annotated[float, Field(gt=0)] = Field(1.0, description="p of mean |difference|^p / p; 1: L1")


class CheckpointConfig(Section):
    every: PositiveInt = Field(1000, description="steps between checkpoints; the end of a phase always has one")
    keep: PositiveInt = Field(3, description="recent checkpoints to keep; those at ends of phases always stay")
    keep_best: bool = Field(
        True, description="keep the best checkpoint by the results of evaluate, too; no effect without evaluate"
    )
    background: bool = Field(
        True, description="write during training, from a copy in CPU memory; false: training waits"
    )


def _of_its_kind(value: Any) -> Any:
    """Parses a stage as the section of its kind, which may be any registered one."""
    if isinstance(value, StageConfig):
        return value
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in STAGES:
        raise ValueError(f"no kind of stage {kind!r}; there are {', '.join(STAGES)}")
    return class_of(STAGES, kind).section.model_validate(value)


class Recipe(Section):
    """A whole run. ``NAME: {kind: …}`` next to the sections below is also a stage; it runs after the four."""

    run: RunConfig
    launch: LaunchConfig = LaunchConfig()
    engine: EngineConfig = EngineConfig()
    data: DataConfig
    model: ModelConfig
    masks: MasksConfig = Field(default_factory=MasksConfig)
    jepa: JepaConfig = JepaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guards: GuardsConfig = GuardsConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluate: EvaluateConfig | None = None
    pretrain: StageConfig | None = None
    cooldown: StageConfig | None = None
    action: ActionStageConfig | None = None
    probe: ProbeStageConfig | None = None
    # Stages with other names. In a file they are next to the four.
    others: dict[str, Annotated[SerializeAsAny[StageConfig], BeforeValidator(_of_its_kind)]] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _gather_others(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or "others" in tree:
            return tree
        others = {
            name: value
            for name, value in tree.items()
            if name not in cls.model_fields and isinstance(value, dict) and "kind" in value
        }
        return {name: value for name, value in tree.items() if name not in others} | {"others": others}

    @model_serializer(mode="wrap")
    def _others_beside_the_four(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        return tree | tree.pop("others", {})

    @model_validator(mode="after")
    def _kinds_of_the_four(self) -> "Recipe":
        for name, kind in DEFAULT_KINDS.items():
            stage: StageConfig | None = getattr(self, name)
            if stage is not None and stage.kind not in (None, kind):
                raise ValueError(f"{name} is of kind {kind}, not {stage.kind!r}: give that stage another name")
        return self

    @model_validator(mode="after")
    def _peers_can_wait(self) -> "Recipe":
        limits.check(self)
        return self

    def stages(self) -> dict[str, StageConfig]:
        """Returns the stages of this recipe, in the order in which they run."""
        four = {name: getattr(self, name) for name in DEFAULT_KINDS}
        return {name: stage for name, stage in four.items() if stage is not None} | self.others
