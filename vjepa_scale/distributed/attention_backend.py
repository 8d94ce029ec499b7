"""Chooses the attention kernel of a network by the recipe's ``engine.attention``, and tries it before training."""

import importlib.util
import logging
import math

import torch
from torch import Tensor, nn

from vjepa_scale.core.errors import UserError
from vjepa_scale.model import blocks
from vjepa_scale.model.blocks import Attention

_log = logging.getLogger(__name__)

_NAMES: dict[blocks.Kernel, str] = {
    blocks.sdpa: "PyTorch's scaled_dot_product_attention",
    blocks.torch_flash: "PyTorch's flash kernel",
    blocks.torch_varlen: "PyTorch's variable-length flash kernel",
    blocks.flash_attn: "the flash-attn package",
    blocks.fa3: "FlashAttention-3",
    blocks.fa4: "FlashAttention-4",
}
_BY_NAME = {"varlen": blocks.torch_varlen, "fa3": blocks.fa3, "fa4": blocks.fa4}
# What auto prefers to PyTorch's own choice, if it is installed, by the GPU's compute capability.
# PyTorch's choice is cuDNN on H100. Others measured there, forward, heads of 64, 2k tokens, in TFLOP/s:
# FlashAttention-2 318, cuDNN 395, FlashAttention-3 460.
_FASTER = {8: blocks.flash_attn, 9: blocks.fa3, 10: blocks.fa4}
_PACKAGES: dict[blocks.Kernel, str] = {
    blocks.flash_attn: "flash_attn",
    blocks.fa3: "flash_attn_interface",
    blocks.fa4: "flash_attn.cute.interface",
}
# Largest relative error of a correct kernel (of the largest value). bfloat16 rounding gives 0.01, a wrong kernel 0.5.
_TOLERANCE = 0.05


def set_kernel(network: nn.Module, choice: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Sets the chosen kernel in every attention layer of a network. Returns its name.

    choice: ``engine.attention``. A kernel is tried, forward and backward, for each head size of the network, and its
    results are compared with exact ones. If a kernel that is chosen by name fails, raises UserError: no other one
    replaces it.
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
    kernel, *others = _candidates(choice, device)
    problems = [(size, problem) for size in head_sizes if (problem := _problem(kernel, size, device, dtype))]
    if problems and others:
        head_size, problem = problems[0]
        # An installed kernel that fails costs speed, which the user can repair; a missing one is normal.
        level = logging.WARNING if _is_installed(kernel) else logging.DEBUG
        _log.log(
            level,
            f"{type(network).__name__}: engine.attention auto takes {_NAMES[others[0]]}: {_NAMES[kernel]} fails its "
            f"trial with heads of {head_size} channels: {problem}",
        )
        kernel = others[0]
    elif problems:
        head_size, problem = problems[0]
        raise UserError(
            f"{_NAMES[kernel]} cannot run on {device.type} with {str(dtype).removeprefix('torch.')} and heads of "
            f"{head_size} channels: {problem}",
            where="engine.attention",
            fix="auto, or sdpa, which runs everywhere",
        )
    _log.debug("%s: attention by %s (engine.attention: %s)", type(network).__name__, _NAMES[kernel], choice)
    for layer in layers:
        layer.kernel = kernel
    return _NAMES[kernel]


def _candidates(choice: str, device: torch.device) -> list[blocks.Kernel]:
    """Returns the kernels to try, the best first. The last one of ``auto`` runs everywhere."""
    if choice in _BY_NAME:
        return [_BY_NAME[choice]]
    if choice == "flash":
        package = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        return [blocks.flash_attn if package else blocks.torch_flash]
    if choice == "auto" and device.type == "cuda":
        faster = _FASTER.get(torch.cuda.get_device_capability(device)[0])
        return [faster, blocks.sdpa] if faster is not None else [blocks.sdpa]
    return [blocks.sdpa]


def _is_installed(kernel: blocks.Kernel) -> bool:
    """Returns whether the package of a kernel that is not PyTorch's is installed, working or not."""
    try:
        return importlib.util.find_spec(_PACKAGES[kernel]) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False
    except Exception:  # noqa: BLE001 (installed, but its import fails in some way)
        return True


def _problem(kernel: blocks.Kernel, head_size: int, device: torch.device, dtype: torch.dtype) -> str:
    """Returns why the kernel cannot compute heads of this size; empty if it can."""
    if kernel is blocks.sdpa:
        return ""
    if kernel in (*_BY_NAME.values(), blocks.flash_attn) and device.type != "cuda":
        return "it needs a GPU"
    activated = False
    try:
        activated = blocks.activate(kernel)
        error = _largest_error(kernel, head_size, device, dtype)
        problem = "" if error <= _TOLERANCE else f"its results are wrong by {error:.0%} of the largest value"
    except Exception as error:  # noqa: BLE001 (kernels refuse in many ways: RuntimeError, ImportError, NotImplementedError …)
        problem = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    if problem and activated:
        blocks.deactivate()
    return problem


def _largest_error(kernel: blocks.Kernel, head_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest error of the output and the gradients of q, k and v against float64, relative to the largest
    value of each."""
    given = torch.randn(4, 2, 2, 40, head_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    results: list[list[Tensor]] = []
    for compute, where, kind in ((kernel, device, dtype), (blocks.exact, torch.device("cpu"), torch.float64)):
        *inputs, weight = given.to(where, kind)
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = compute(q, k, v, None)
        gradients = torch.autograd.grad(out, (q, k, v), weight)
        results.append([x.detach().double().cpu() for x in (out, *gradients)])
    errors = [(found - wanted).abs().max() / wanted.abs().max() for found, wanted in zip(*results, strict=True)]
    largest = float(torch.stack(errors).max())
    return largest if math.isfinite(largest) else math.inf
