"""The transformer block that encoder and predictor share."""

import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_scale.model.attention import Attention
from vjepa_scale.model.rope import RopeTables

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
    """In float32 where tokens and weights have different types, as autocast computes it on a GPU.

    In bfloat16 a network's weights are rounded, but not always its tokens: what it gives, and a predictor's residual
    stream, are float32 (docs/engines.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Tokens keep their type, branches have the weights'."""

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
