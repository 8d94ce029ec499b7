"""Bytes that networks keep on a GPU from forward to backward, by formula. Beside flops.py: without PyTorch.

Counted on the operations of ``Block`` as they are written: every tensor that autograd or activation checkpointing
keeps, once. LayerNorm statistics are under 1 %. The compiler keeps less, so this is an upper bound under
``engine.compile``.
"""

from dataclasses import dataclass

from vjepa_scale.model import flops
from vjepa_scale.recipe.networks import Network
from vjepa_scale.recipe.schema import CHANNELS, EngineConfig, ModelConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Pass:
    """One pass of a network over one clip.

    tokens:    that its blocks compute
    given:     of these, those embedded from pixels or from the encoder's features
    predicted: of a predictor, those that it gives to the loss, in float32
    trained:   with a backward pass; another pass keeps nothing
    """

    network: Network
    tokens: int
    given: int = 0
    predicted: int = 0
    trained: bool = True


@dataclass(frozen=True)
class ClipWork:
    """What one micro-batch computes and keeps for each of its clips.

    passes: of the networks; all trained ones are kept until the backward pass of the micro-batch
    pixels: values of the clip: channels × frames × height × width
    kept:   bytes of float32 features that the loss holds beside what networks keep
    """

    passes: tuple[Pass, ...]
    pixels: int
    kept: int = 0


def compute_bytes(engine: EngineConfig) -> int:
    """Of a value in the compute type."""
    return 2 if engine.precision == "bfloat16" else FLOAT32


def block_bytes(model: ModelConfig, network: Network, engine: EngineConfig, *, checkpointing: str | None = None) -> int:
    """What one block keeps of one token. checkpointing: in place of the engine's

    none:      inputs of both LayerNorms, their outputs, queries and keys after rotation, what the qkv layer gave, the
               attention's output with a sum per head, both sides of GELU
    selective: the block's input, and the outputs of its four matrix products and of attention
    full:      the block's input
    """
    sizes = getattr(model, network)
    W, H, c = sizes.width, sizes.mlp_hidden, compute_bytes(engine)
    residual = FLOAT32 if network == "predictor" else c  # a predictor's stream is float32 (docs/engines.md)
    how = checkpointing or engine.activation_checkpointing
    if how == "full":
        return residual * W
    sums = FLOAT32 * sizes.heads
    if how == "selective":
        return residual * W + c * (6 * W + H) + sums
    # A LayerNorm of float32 weights, as under autocast, keeps a float32 copy of its input.
    normed = FLOAT32 if engine.kind == "deepspeed" else residual
    rotated = 2 if model.positions == "rope" or network == "action_predictor" else 0
    return 2 * normed * W + c * ((6 + rotated) * W + 2 * H) + sums


def pass_bytes(model: ModelConfig, work: Pass, engine: EngineConfig) -> int:
    """What one trained pass keeps of one clip: its blocks, its ends, and its outputs in float32."""
    if not work.trained:
        return 0
    sizes, c = getattr(model, work.network), compute_bytes(engine)
    D = model.encoder.width
    embedded = CHANNELS * model.tubelet * model.patch**2 if work.network == "encoder" else D
    tables = 2 * FLOAT32 * (sizes.width // sizes.heads) if model.positions == "rope" else 0  # shared by all blocks
    # Beside blocks and tables, the input of the final LayerNorm in float32.
    of_tokens = sizes.depth * block_bytes(model, work.network, engine) + FLOAT32 * sizes.width + tables
    of_predicted = c * sizes.width + FLOAT32 * D  # what the last layer is given, and what it gives
    return work.tokens * of_tokens + work.given * c * embedded + work.predicted * of_predicted


def activation_bytes(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """What one clip of a micro-batch keeps when its backward pass begins, without the clip itself."""
    return sum(pass_bytes(model, each, engine) for each in work.passes) + work.kept


def workspace_bytes(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """What is alive for a moment, of one clip: all that one block computes, in the pass where that is most."""
    return max(
        (each.tokens * block_bytes(model, each.network, engine, checkpointing="none") for each in work.passes),
        default=0,
    )


def clip_bytes(work: ClipWork, engine: EngineConfig) -> int:
    """One clip on the GPU: uint8 as it comes, normalised float32, and in the compute type."""
    return work.pixels * (1 + FLOAT32 + (compute_bytes(engine) if engine.precision != "float32" else 0))


def recomputed_flops(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """What ``activation_checkpointing: full`` computes again of one clip; selective recomputes no matrix product."""
    if engine.activation_checkpointing != "full":
        return 0
    return sum(flops.blocks_forward(model, each.network, each.tokens) for each in work.passes if each.trained)
