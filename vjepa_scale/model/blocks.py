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


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, *, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_hidden)

    def forward(self, x_BKD: Tensor, tables: RopeTables | None, allowed: Tensor | None = None) -> Tensor:
        x_BKD = x_BKD + self.attn(self.norm1(x_BKD), tables, allowed)
        return x_BKD + self.mlp(self.norm2(x_BKD))
