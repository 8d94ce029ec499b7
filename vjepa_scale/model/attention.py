"""Self-attention over the tokens that are present, with rotary positions."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vjepa_scale.model.rope import RopeTables, rotate


class Attention(nn.Module):
    """Multi-head self-attention: every token sees every other; queries and keys are rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BKD: Tensor, tables: RopeTables) -> Tensor:
        width = x_BKD.shape[-1]
        # Queries and keys stay one tensor of 2h heads until they are rotated: one pass instead of two.
        qk, v = self.qkv(x_BKD).split((2 * width, width), dim=-1)
        qk_BhKd = rotate(rearrange(qk, "b k (h d) -> b h k d", h=2 * self.heads), tables)
        q_BhKd, k_BhKd = qk_BhKd.chunk(2, dim=1)
        v_BhKd = rearrange(v, "b k (h d) -> b h k d", h=self.heads)
        out_BhKd = F.scaled_dot_product_attention(q_BhKd, k_BhKd, v_BhKd)
        return self.proj(rearrange(out_BhKd, "b h k d -> b k (h d)"))
