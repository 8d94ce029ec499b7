"""Self-attention over the tokens that are present, with or without rotary positions."""

from einops import rearrange
from torch import Tensor, nn

from vjepa_scale.model import kernels
from vjepa_scale.model.rope import RopeTables, rotate


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are rotated where there are tables.

    kernel: who computes it; may be replaced from outside.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.kernel: kernels.Kernel = kernels.sdpa

    def forward(self, x_BKD: Tensor, tables: RopeTables | None, allowed: Tensor | None = None) -> Tensor:
        """[B, K, D] → [B, K, D]. allowed: bool [K, K], True where a row's token may attend to a column's; None: all."""
        width = x_BKD.shape[-1]
        # Queries and keys stay one tensor of 2h heads until they are rotated: one pass instead of two.
        qk, v = self.qkv(x_BKD).split((2 * width, width), dim=-1)
        qk_BhKd = rearrange(qk, "b k (h d) -> b h k d", h=2 * self.heads)
        if tables is not None:
            qk_BhKd = rotate(qk_BhKd, tables)
        q_BhKd, k_BhKd = qk_BhKd.chunk(2, dim=1)
        v_BhKd = rearrange(v, "b k (h d) -> b h k d", h=self.heads)
        out_BhKd = self.kernel(q_BhKd, k_BhKd, v_BhKd, allowed)
        return self.proj(rearrange(out_BhKd, "b h k d -> b k (h d)"))
