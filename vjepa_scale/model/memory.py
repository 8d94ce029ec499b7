"""Bytes that networks keep on a GPU from forward to backward, by formula. Without PyTorch, as flops.py.

Counts, for the operations of ``Block``, each tensor that autograd or activation checkpointing keeps, once. Leaves out
LayerNorm statistics, which are under 1 %. The compiler keeps less, so this is an upper bound under ``engine.compile``.
"""

from dataclasses import dataclass

from vjepa_scale.model import flops
from vjepa_scale.recipe.networks import Network
from vjepa_scale.recipe.schema import CHANNELS, EngineConfig, ModelConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Pass:
    """One pass of a network over one clip.

    tokens:    tokens that its blocks compute
    given:     of these, tokens embedded from pixels or from the encoder's features
    predicted: of a predictor, tokens that it passes to the loss, in float32
    trained:   whether there is a backward pass; other passes keep nothing
    """

    network: Network
    tokens: int
    given: int = 0
    predicted: int = 0
    trained: bool = True


@dataclass(frozen=True)
class ClipWork:
    """Computation and memory of one clip of a micro-batch.

    passes: of the networks; tensors of trained ones are kept until the backward pass of the micro-batch
    pixels: number of values in the clip: channels × frames × height × width
    kept:   bytes of float32 features that the loss keeps in addition to the networks' tensors
    """

    passes: tuple[Pass, ...]
    pixels: int
    kept: int = 0


def compute_bytes(engine: EngineConfig) -> int:
    """Returns the bytes of a value in the compute type."""
    return 2 if engine.precision == "bfloat16" else FLOAT32


def block_bytes(model: ModelConfig, network: Network, engine: EngineConfig, *, checkpointing: str | None = None) -> int:
    """Returns the bytes that one block keeps per token. checkpointing: overrides the engine's

    none:      inputs and outputs of both LayerNorms, queries and keys after rotation, the output of the qkv layer,
               attention's output with a sum per head, input and output of GELU
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
    """Returns the bytes that one trained pass keeps per clip: blocks, first and last layers, outputs in float32."""
    if not work.trained:
        return 0
    sizes, c = getattr(model, work.network), compute_bytes(engine)
    D = model.encoder.width
    embedded = CHANNELS * model.tubelet * model.patch**2 if work.network == "encoder" else D
    tables = 2 * FLOAT32 * (sizes.width // sizes.heads) if model.positions == "rope" else 0  # shared by all blocks
    # In addition to blocks and tables: the input of the final LayerNorm in float32.
    of_tokens = sizes.depth * block_bytes(model, work.network, engine) + FLOAT32 * sizes.width + tables
    of_predicted = c * sizes.width + FLOAT32 * D  # input and output of the last layer
    return work.tokens * of_tokens + work.given * c * embedded + work.predicted * of_predicted


def activation_bytes(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """Returns the bytes that one clip keeps at the start of the backward pass, without the clip itself."""
    return sum(pass_bytes(model, each, engine) for each in work.passes) + work.kept


def workspace_bytes(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """Returns the peak of temporary bytes per clip: all tensors of one block, in the pass where they are largest."""
    return max(
        (each.tokens * block_bytes(model, each.network, engine, checkpointing="none") for each in work.passes),
        default=0,
    )


def clip_bytes(work: ClipWork, engine: EngineConfig) -> int:
    """Returns the bytes of one clip on the GPU: uint8, normalised float32, and in the compute type."""
    return work.pixels * (1 + FLOAT32 + (compute_bytes(engine) if engine.precision != "float32" else 0))


def recomputed_flops(model: ModelConfig, work: ClipWork, engine: EngineConfig) -> int:
    """Returns FLOPs that ``activation_checkpointing: full`` recomputes per clip; selective recomputes no product."""
    if engine.activation_checkpointing != "full":
        return 0
    return sum(flops.blocks_forward(model, each.network, each.tokens) for each in work.passes if each.trained)
