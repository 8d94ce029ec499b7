"""The transformer block that all networks use: its MLP, its attention, and the kernels that compute attention.

A kernel computes softmax(q·kᵀ/√d)·v. It takes queries, keys and values [B, h, K, d] of one type and, where tokens may
not see all others, ``allowed``: bool [K, K], True where the row's token may attend to the column's. It returns
[B, h, K, d]. ``distributed/attention_backend.py`` selects the kernel of a network.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vjepa_scale.model.positions import RopeTables, rotate

LAYER_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Two Linears around an exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BKD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BKD)))


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in float32 where tokens and weights have different types, as autocast does on a GPU.

    In bfloat16 a network's weights are rounded, but not all its tokens: its output and a predictor's residual stream
    are float32 (docs/engines.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Tokens keep their type, branches use the weights'."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, *, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_hidden)

    def forward(self, x_BKD: Tensor, tables: RopeTables | None, allowed: Tensor | None = None) -> Tensor:
        computed = self.attn.qkv.weight.dtype
        x_BKD = x_BKD + self.attn(self.norm1(x_BKD).to(computed), tables, allowed)
        return x_BKD + self.mlp(self.norm2(x_BKD).to(computed))


# -- attention -------------------------------------------------------------------------------------


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are rotated where ``tables`` are given.

    kernel: computes attention; callers may replace it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.kernel: Kernel = sdpa

    def forward(self, x_BKD: Tensor, tables: RopeTables | None, allowed: Tensor | None = None) -> Tensor:
        """[B, K, D] → [B, K, D]. allowed: bool [K, K], True where a row's token may attend to a column's; None: all."""
        width = x_BKD.shape[-1]
        # Queries and keys stay one tensor of 2h heads until after rotation: one pass instead of two.
        qk, v = self.qkv(x_BKD).split((2 * width, width), dim=-1)
        qk_BhKd = rearrange(qk, "b k (h d) -> b h k d", h=2 * self.heads)
        if tables is not None:
            qk_BhKd = rotate(qk_BhKd, tables)
        q_BhKd, k_BhKd = qk_BhKd.chunk(2, dim=1)
        v_BhKd = rearrange(v, "b k (h d) -> b h k d", h=self.heads)
        out_BhKd = self.kernel(q_BhKd, k_BhKd, v_BhKd, allowed)
        return self.proj(rearrange(out_BhKd, "b h k d -> b k (h d)"))


# -- kernels ---------------------------------------------------------------------------------------


def sdpa(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """PyTorch's default kernel: runs everywhere, and accepts a mask."""
    return F.scaled_dot_product_attention(q_BhKd, k_BhKd, v_BhKd, attn_mask=allowed)


def exact(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """The formula in the type of its inputs: the reference that kernels are compared with."""
    scores_BhKK = q_BhKd @ k_BhKd.transpose(-1, -2) / q_BhKd.shape[-1] ** 0.5
    if allowed is not None:
        scores_BhKK = scores_BhKK.masked_fill(~allowed, -torch.inf)
    return scores_BhKK.softmax(-1) @ v_BhKd


def torch_flash(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """PyTorch's flash kernel only: raises an error where it cannot run."""
    _refuse_mask(allowed)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q_BhKd, k_BhKd, v_BhKd)


def fa3(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """FlashAttention-3, which replaces PyTorch's flash kernel after ``activate``."""
    return torch_flash(q_BhKd, k_BhKd, v_BhKd, allowed)


def fa4(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """FlashAttention-4, which replaces PyTorch's flash kernel after ``activate``."""
    return torch_flash(q_BhKd, k_BhKd, v_BhKd, allowed)


def activate(kernel: Kernel) -> bool:
    """Replaces PyTorch's flash kernel by another package's, in the whole process. Does nothing for other kernels.

    Returns whether anything has changed.

    Raises ImportError where the package or PyTorch's registry is missing, RuntimeError where the GPU is not supported.
    """
    if kernel in (fa3, fa4):
        from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

        name = "FA3" if kernel is fa3 else "FA4"
        if current_flash_attention_impl() != name:
            activate_flash_attention_impl(name)
            return True
    return False


def deactivate() -> None:
    """Undo ``activate``."""
    from torch.nn.attention import restore_flash_attention_impl

    restore_flash_attention_impl()


def torch_varlen(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """PyTorch's variable-length flash kernel, on concatenated clips."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, and slow to import

    _refuse_mask(allowed)
    B, _, K, _ = q_BhKd.shape
    ends = torch.arange(0, (B + 1) * K, K, dtype=torch.int32, device=q_BhKd.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BhKd, k_BhKd, v_BhKd))
    out: Any = varlen_attn(q, k, v, ends, ends, K, K)
    return out.unflatten(0, (B, K)).transpose(1, 2)


def flash_attn(q_BhKd: Tensor, k_BhKd: Tensor, v_BhKd: Tensor, allowed: Tensor | None) -> Tensor:
    """The flash-attn package, whose tensors are [B, K, h, d]."""
    from flash_attn import flash_attn_func

    _refuse_mask(allowed)
    # By default its backward pass accumulates with atomics. PyTorch's own kernels follow the same switch.
    deterministic = torch.are_deterministic_algorithms_enabled()
    out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q_BhKd, k_BhKd, v_BhKd)), deterministic=deterministic)
    return out.transpose(1, 2)


def _refuse_mask(allowed: Tensor | None) -> None:
    # Kernel selection checks this first. A dropped mask would silently leak the future.
    assert allowed is None, "flash kernels take no mask"
