"""Which attention kernel computes a network: the recipe's ``engine.attention``, tried before training."""

import importlib.util

import torch
from torch import nn

from vjepa_scale.core.errors import UserError
from vjepa_scale.model import kernels
from vjepa_scale.model.attention import Attention

_NAMES: dict[kernels.Kernel, str] = {
    kernels.sdpa: "PyTorch's scaled_dot_product_attention",
    kernels.torch_flash: "PyTorch's flash kernel",
    kernels.torch_varlen: "PyTorch's variable-length flash kernel",
    kernels.flash_attn: "the flash-attn package",
    kernels.fa3: "FlashAttention-3",
    kernels.fa4: "FlashAttention-4",
}
_BY_NAME = {"varlen": kernels.torch_varlen, "fa3": kernels.fa3, "fa4": kernels.fa4}


def set_kernel(network: nn.Module, choice: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Give every attention layer of a network the chosen kernel; returns its name.

    choice: ``engine.attention``. A kernel is run once, forward and backward, for each head size of the network;
    one that was asked for by name and cannot run is a UserError, never replaced.
    """
    if getattr(network, "masked_attention", False):
        if choice in ("flash", *_BY_NAME):
            raise UserError(
                f"{choice} kernels take no attention mask, and {type(network).__name__} needs one",
                where="engine.attention",
                fix="auto or sdpa",
            )
        choice = "sdpa"
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    head_sizes = sorted({layer.qkv.in_features // layer.heads for layer in layers})
    kernel = _chosen(choice, device)
    for head_size in head_sizes:
        problem = _problem(kernel, head_size, device, dtype)
        if problem and choice == "auto":
            kernel = kernels.sdpa
        elif problem:
            raise UserError(
                f"{_NAMES[kernel]} cannot run on {device.type} with {str(dtype).removeprefix('torch.')} and heads of "
                f"{head_size} channels: {problem}",
                where="engine.attention",
                fix="auto, or sdpa, which runs everywhere",
            )
    for layer in layers:
        layer.kernel = kernel
    return _NAMES[kernel]


def _chosen(choice: str, device: torch.device) -> kernels.Kernel:
    package = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if choice in _BY_NAME:
        return _BY_NAME[choice]
    if choice == "flash":
        return kernels.flash_attn if package else kernels.torch_flash
    return kernels.flash_attn if choice == "auto" and package else kernels.sdpa


def _problem(kernel: kernels.Kernel, head_size: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel cannot compute such heads; empty if it can."""
    if kernel is kernels.sdpa:
        return ""
    if kernel in (*_BY_NAME.values(), kernels.flash_attn) and device.type != "cuda":
        return "it needs a GPU"
    try:
        kernels.activate(kernel)
        q, k, v = torch.zeros(3, 1, 1, 16, head_size, device=device, dtype=dtype, requires_grad=True)
        kernel(q, k, v, None).sum().backward()
    except Exception as error:  # noqa: BLE001 (kernels refuse in many ways: RuntimeError, ImportError, NotImplementedError …)
        return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ""
