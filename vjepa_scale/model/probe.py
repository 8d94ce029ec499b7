"""The attentive probe: classes from the tokens of a frozen encoder (V-JEPA 2 paper, section 5; docs/method.md 10)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vjepa_scale.model.blocks import Block, Mlp
from vjepa_scale.recipe.schema import ModelConfig
from vjepa_scale.recipe.stage_sections import PROBE_EPS, ProbeStageConfig


class CrossAttention(nn.Module):
    """Attention of a few queries over all tokens, without an output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, query_BQD: Tensor, x_BND: Tensor) -> Tensor:
        q_BhQd = rearrange(self.q(query_BQD), "b q (h d) -> b h q d", h=self.heads)
        k_BhNd, v_BhNd = rearrange(self.kv(x_BND), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        out_BhQd = F.scaled_dot_product_attention(q_BhQd, k_BhNd, v_BhNd)
        return rearrange(out_BhQd, "b h q d -> b q (h d)")


class CrossAttentionBlock(nn.Module):
    """query + attention(query, norm(x)), then + mlp(norm(…)): the query itself is not normalised."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.xattn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_hidden)

    def forward(self, query_BQD: Tensor, x_BND: Tensor) -> Tensor:
        query_BQD = query_BQD + self.xattn(query_BQD, self.norm1(x_BND))
        return query_BQD + self.mlp(self.norm2(query_BQD))


class AttentivePooler(nn.Module):
    """All tokens of a clip become one: self-attention blocks, then one learned query."""

    def __init__(self, *, width: int, heads: int, depth: int, eps: float, mlp_hidden: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.cross_attention_block = CrossAttentionBlock(width, heads, mlp_hidden, eps)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_hidden, eps=eps) for _ in range(depth - 1))

    def forward(self, x_BND: Tensor) -> Tensor:
        for block in self.blocks:
            x_BND = block(x_BND, None)
        query_BQD = self.query_tokens.expand(len(x_BND), -1, -1)
        return self.cross_attention_block(query_BQD, x_BND).squeeze(1)


class AttentiveProbe(nn.Module):
    """Tokens of a frozen encoder to logits; parameter names are the published probe's.

    width:       the encoder's D
    heads:       16 in the published probes. Hugging Face's VJEPA2ForVideoClassification requires the encoder's number
                 and ``eps=1e-6``.
    depth:       number of blocks: ``depth − 1`` of self-attention, then one of cross-attention
    mlp_hidden:  None: 4·width, independent of the encoder's
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        classes: int,
        depth: int = 4,
        eps: float = PROBE_EPS,
        mlp_hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(
            width=width, heads=heads, depth=depth, eps=eps, mlp_hidden=mlp_hidden or 4 * width
        )
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Returns logits [B, classes] of encoder tokens in any number and order; adds no positions."""
        return self.linear(self.pooler(tokens_BND))


def probe_of(model: ModelConfig, config: ProbeStageConfig, *, classes: int) -> AttentiveProbe:
    """Builds the network that a probe stage trains on this model's encoder."""
    eps = config.layer_norm_eps(model.encoder.heads)
    return AttentiveProbe(width=model.encoder.width, heads=config.heads, classes=classes, depth=config.depth, eps=eps)
