"""What is done to a network's blocks before they are sharded: activations checkpointed, then the rest compiled.

In both, a block's forward method is replaced and the module is not wrapped: parameter names stay canonical, and the
hooks by which engines gather a block's weights stay outside, so they are there when it is computed again.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa_scale.recipe.schema import EngineConfig

# A block is what is checkpointed, compiled and gathered as one: an entry of a list of one of these names.
BLOCK_LISTS = ("blocks", "predictor_blocks")

# Kinds of blocks that may be compiled.
_KINDS = 64
# Nearly all of a block's FLOPs. What is computed again in a selective checkpoint costs memory traffic alone.
# By name: those of packages exist only where these are installed and imported.
_KEPT = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten.bmm.default",
        "aten.linear.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._flash_attention_forward.default",
        "aten._efficient_attention_forward.default",
        "torch_attn._varlen_attn.default",
        "flash_attn._flash_attn_forward.default",  # from version 2.7 on; before it was no operation that PyTorch sees
    }
)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, in the order of its definition."""
    return [
        block
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LISTS
        for block in module
    ]


def prepare_blocks(network: nn.Module, cfg: EngineConfig, *, trainable: bool) -> list[nn.Module]:
    """Checkpoint activations and compile, as the recipe asks; returns the blocks."""
    blocks = blocks_of(network)
    for block in blocks:
        if trainable and cfg.activation_checkpointing != "none":
            checkpoint_activations(block, selective=cfg.activation_checkpointing == "selective")
        if cfg.compile:
            compile_block(block)
    return blocks


def checkpoint_activations(block: nn.Module, *, selective: bool = False) -> None:
    """Keep only a block's input, and where ``selective`` its matmuls' and attention's outputs; compute the rest again.

    Nothing in a block is random, so no state of a generator is kept.
    """
    kept: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **kept)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_block(block: nn.Module) -> None:
    """Compile a block's forward, for any number of tokens; blocks of one shape share what was compiled.

    The number of tokens changes from step to step: after the first, dynamo takes it for a variable. A change in
    kind (another width, a batch of another size, without gradient) compiles once more.
    """
    # All blocks of all networks are one function to dynamo, which by itself gives up after eight kinds: two networks,
    # with and without gradients, each for its first number of tokens and for any, and several clip lengths are more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KINDS)
    block.forward = torch.compile(block.forward, dynamic=None)
