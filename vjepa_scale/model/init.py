"""Initial values of all weights: a function of (seed, name) only.

So they do not depend on the order in which modules are built, on the world size, or on sharding: each rank computes the
parameters that it needs.
"""

import math
import re

import torch
from torch import Tensor, nn

from vjepa_scale.core.rng import key64

STD = 0.02

_RESIDUAL_OUTPUT = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")
_QUERY_TOKENS = re.compile(r"(^|\.)query_tokens$")
_MASK_TOKEN = re.compile(r"(^|\.)mask_tokens\.\d+$")


def initial_value(name: str, shape: tuple[int, ...] | torch.Size, *, seed: int) -> Tensor:
    """Returns the initial value of one parameter, float32 on the CPU (method: paper's published code).

    name:  with its network: ``encoder.blocks.3.attn.proj.weight``. ``target_encoder.*`` starts as an exact copy of
           ``encoder.*``.

    Weights are normal with std 0.02 (the published truncation is at ±2, a hundred standard deviations,
    and cuts nothing); biases and mask tokens 0; LayerNorm 1 and 0. In block i, counted from 1, the two
    weights that write to the residual stream are divided by sqrt(2·i).
    """
    name = name.removeprefix("target_")
    if name.endswith(".bias") or _MASK_TOKEN.search(name):
        return torch.zeros(shape)
    assert name.endswith(".weight") or _QUERY_TOKENS.search(name), f"no rule for the start of {name}"
    if len(shape) == 1:  # LayerNorm
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(key64(seed, "init." + name))
    value = torch.empty(shape).normal_(std=STD, generator=generator)
    if residual := _RESIDUAL_OUTPUT.search(name):
        value /= math.sqrt(2 * (int(residual[1]) + 1))
    return value


def probe_initial_value(name: str, shape: tuple[int, ...] | torch.Size, *, seed: int, depth: int, width: int) -> Tensor:
    """Returns the initial value of one parameter of an attentive probe with ``depth`` blocks, as published.

    As ``initial_value``, with two differences. The cross-attention block's MLP has the divisor of the last
    self-attention block, sqrt(2·max(1, depth − 1)), not the next one. ``linear`` starts as PyTorch's Linear: weight and
    bias uniform within ±1/sqrt(width).
    """
    if re.search(r"(^|\.)linear\.(weight|bias)$", name):
        bound = 1 / math.sqrt(width)
        generator = torch.Generator().manual_seed(key64(seed, "init." + name))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    value = initial_value(name, shape, seed=seed)
    if name.endswith("cross_attention_block.mlp.fc2.weight"):
        value /= math.sqrt(2 * max(1, depth - 1))
    return value


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int, prefix: str) -> None:
    """Sets all parameters of a plain (not sharded) module to their initial values. prefix: the network's name"""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(f"{prefix}.{name}", parameter.shape, seed=seed))
