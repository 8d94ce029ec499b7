"""Prepares a network's blocks before sharding: activation checkpointing, then compilation.

Both replace a block's forward method and do not wrap the module. So parameter names stay canonical, and an engine's
hooks that gather a block's weights run outside the checkpointed part, also when it is recomputed.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa_scale.recipe.schema import EngineConfig

# A block is an entry of a list with one of these names. It is checkpointed, compiled and gathered as a unit.
BLOCK_LISTS = ("blocks", "predictor_blocks")

# Limit of compiled variants of blocks.
_KINDS = 64
# Operations with nearly all of a block's FLOPs. A selective checkpoint keeps their outputs; recomputing the others
# costs only memory traffic. By name, since operations of packages exist only after their import.
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
    """Returns the transformer blocks of a network, in the order of its definition."""
    return [
        block
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LISTS
        for block in module
    ]


def prepare_blocks(network: nn.Module, cfg: EngineConfig, *, trainable: bool) -> list[nn.Module]:
    """Applies the recipe's activation checkpointing and compilation. Returns the blocks."""
    blocks = blocks_of(network)
    for block in blocks:
        if trainable and cfg.activation_checkpointing != "none":
            checkpoint_activations(block, selective=cfg.activation_checkpointing == "selective")
        if cfg.compile:
            compile_block(block)
    return blocks


def checkpoint_activations(block: nn.Module, *, selective: bool = False) -> None:
    """Keeps only a block's input, with ``selective`` also the outputs of matmuls and attention. Recomputes the rest.

    Nothing in a block is random, so the state of generators is not kept.
    """
    kept: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **kept)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_block(block: nn.Module) -> None:
    """Compiles a block's forward for any number of tokens. Blocks of one shape share the compiled code.

    The number of tokens changes from step to step: from its second value on, dynamo treats it as dynamic. Any other
    change (another width or batch size, no gradients) compiles once more.
    """
    # All blocks of all networks are one function to dynamo, whose default limit is eight variants. Two networks, with
    # and without gradients, each for its first number of tokens and for any, and several clip lengths are more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KINDS)
    block.forward = torch.compile(block.forward, dynamic=None)
