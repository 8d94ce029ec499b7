"""The pretraining predictor: from context tokens to the tokens at other places (V-JEPA 2 paper, section 2.1)."""

import torch
from torch import Tensor, nn

from vjepa_scale.model.blocks import LAYER_NORM_EPS, Block, LayerNorm
from vjepa_scale.model.positions import Positions
from vjepa_scale.model.rope import Grid
from vjepa_scale.recipe.schema import ModelConfig


class Predictor(nn.Module):
    """A narrow ViT over the context's tokens and one learned mask token per place to predict."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        predictor = config.predictor
        self.positions = Positions(config, width=predictor.width, heads=predictor.heads)
        self.predictor_embed = nn.Linear(config.encoder.width, predictor.width)
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, predictor.width)) for _ in range(predictor.mask_tokens)
        )
        self.predictor_blocks = nn.ModuleList(
            Block(predictor.width, predictor.heads, predictor.mlp_hidden) for _ in range(predictor.depth)
        )
        self.predictor_norm = LayerNorm(predictor.width, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(predictor.width, config.encoder.width)

    def forward(
        self, context_BKD: Tensor, context_BK: Tensor, target_BM: Tensor, grid: Grid, mask_token: int = 0
    ) -> Tensor:
        """Predicted encoder tokens at the target places, [B, M, D].

        context_BKD:            the encoder's tokens, at the places context_BK
        context_BK, target_BM:  int64 token numbers in the grid (t, h, w)
        mask_token:             which mask token stands for a target, modulo how many there are
        """
        # The residual stream is float32, as the published code's is under autocast, by its mask tokens.
        context = self.predictor_embed(context_BKD.to(self.predictor_embed.weight.dtype)).float()
        mask = self.mask_tokens[mask_token % len(self.mask_tokens)].float()
        # The published code also sorts all tokens by place and unsorts them. Attention sees places only
        # through their positions, so the order changes nothing but the rounding, and the two gathers are saved.
        x = torch.cat([context, mask.expand(*target_BM.shape, -1)], dim=1)
        places = torch.cat([context_BK, target_BM], dim=1)
        x = self.positions.add(x, places, grid)
        tables = self.positions.rotation(places, grid, x.device)
        for block in self.predictor_blocks:
            x = block(x, tables)
        predicted_BMP = x[:, context_BK.shape[1] :]
        return self.predictor_proj(self.predictor_norm(predicted_BMP).to(self.predictor_proj.weight.dtype))
