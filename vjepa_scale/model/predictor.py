"""The predictors: pretraining's (context tokens → target tokens) and V-JEPA 2-AC's (frames and actions → next frame).

V-JEPA 2 paper, sections 2.1 and 3.1. Further letters in tensor names: K time steps, c condition tokens of a step.
"""

import torch
from torch import Tensor, nn

from vjepa_scale.core.errors import UserError
from vjepa_scale.model.blocks import LAYER_NORM_EPS, Block, LayerNorm
from vjepa_scale.model.positions import Grid, Positions, RopeTables, rope_tables, time_tables
from vjepa_scale.recipe.schema import ActionPredictorConfig, ModelConfig


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
        """Returns predicted encoder tokens at the target places, [B, M, D].

        context_BKD:            the encoder's tokens, at the places context_BK
        context_BK, target_BM:  int64 token numbers in the grid (t, h, w)
        mask_token:             index of the mask token, modulo the number of mask tokens
        """
        # The residual stream is float32: under autocast the published code's float32 mask tokens make it so.
        context = self.predictor_embed(context_BKD.to(self.predictor_embed.weight.dtype)).float()
        mask = self.mask_tokens[mask_token % len(self.mask_tokens)].float()
        # The published code also sorts all tokens by place and unsorts them. Attention depends on places only through
        # position encodings, so the order changes only the rounding, and this saves two gathers.
        x = torch.cat([context, mask.expand(*target_BM.shape, -1)], dim=1)
        places = torch.cat([context_BK, target_BM], dim=1)
        x = self.positions.add(x, places, grid)
        tables = self.positions.rotation(places, grid, x.device)
        for block in self.predictor_blocks:
            x = block(x, tables)
        predicted_BMP = x[:, context_BK.shape[1] :]
        return self.predictor_proj(self.predictor_norm(predicted_BMP).to(self.predictor_proj.weight.dtype))


# -- the action-conditioned predictor --------------------------------------------------------------


POSE = 7  # end-effector position (3), Euler angles (3), gripper (1); an action is a difference of these
CAMERA = 6  # camera position (3), Euler angles (3)


class ActionPredictor(nn.Module):
    """A ViT over [action, state, (extrinsics), h·w patches] of every step, causal from step to step.

    All tokens of a step see each other and all earlier steps. Patch tokens are rotated by step and by place,
    rescaled to the pretraining grid (y·g/h, x·g/w); condition tokens by step only.
    """

    masked_attention = True

    def __init__(self, config: ActionPredictorConfig, *, encoder_width: int) -> None:
        super().__init__()
        self.extrinsics, self.grid = config.extrinsics, config.grid
        self.head_dim = config.width // config.heads
        self.rope_layout = config.layout
        self.predictor_embed = nn.Linear(encoder_width, config.width)
        self.action_encoder = nn.Linear(POSE, config.width)
        self.state_encoder = nn.Linear(POSE, config.width)
        # Exists even where unused, as in the published weights, which are loaded and written name by name.
        self.extrinsics_encoder = nn.Linear(CAMERA, config.width)
        # It has no gradient, so weight decay must not shrink it either.
        self.extrinsics_encoder.requires_grad_(config.extrinsics)
        self.predictor_blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth)
        )
        self.predictor_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(config.width, encoder_width)

    def forward(
        self,
        tokens_BND: Tensor,
        actions_BK7: Tensor,
        states_BK7: Tensor,
        extrinsics_BK6: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns predicted encoder tokens of the frame after each step, [B, K·h·w, D].

        tokens_BND:      encoder tokens of K frames, N = K·h·w
        actions_BK7:     from each frame to the next: change of position (metres), Euler angles (radians), gripper
        states_BK7:      the arm's pose at each frame: the same numbers, absolute
        extrinsics_BK6:  the camera's pose; required exactly where the config has ``extrinsics``
        grid:            (h, w) of a frame in tokens; None: the pretraining grid

        The published code then normalises this result without parameters; here the objective does so.
        Raises UserError where the arguments' shapes do not match.
        """
        height, width = grid or self.grid
        steps = actions_BK7.shape[1]
        if tokens_BND.shape[1] != steps * height * width:
            raise UserError(
                f"{tokens_BND.shape[1]} tokens are not {steps} steps of {height}×{width}",
                where="action predictor",
                fix="one action per frame, and grid=(h, w) where it is not the pretraining grid",
            )
        conditions = [self.action_encoder(actions_BK7), self.state_encoder(states_BK7)]
        if (extrinsics_BK6 is not None) != self.extrinsics:
            raise UserError(
                f"extrinsics {'given' if extrinsics_BK6 is not None else 'missing'}",
                where="action predictor",
                fix=f"this one has extrinsics: {str(self.extrinsics).lower()}",
            )
        if extrinsics_BK6 is not None:
            conditions.append(self.extrinsics_encoder(extrinsics_BK6))

        tokens_BND = tokens_BND.to(self.predictor_embed.weight.dtype)  # an encoder's are float32
        patches = self.predictor_embed(tokens_BND).unflatten(1, (steps, height * width))
        x = torch.cat([torch.stack(conditions, dim=2), patches], dim=2).flatten(1, 2)
        tables = self._tables(steps, height, width, conditions=len(conditions), device=x.device)
        step_of_token = torch.arange(steps, device=x.device).repeat_interleave(x.shape[1] // steps)
        allowed_KK = step_of_token[:, None] >= step_of_token
        for block in self.predictor_blocks:
            x = block(x, tables, allowed_KK)
        patches = x.unflatten(1, (steps, -1))[:, :, len(conditions) :].flatten(1, 2)
        return self.predictor_proj(self.predictor_norm(patches))

    def _tables(self, steps: int, height: int, width: int, *, conditions: int, device: torch.device) -> RopeTables:
        """Returns the tables of the whole sequence: for each step, its condition tokens, then its patches."""
        of_patches = rope_tables(
            None,
            grid=(steps, height, width),
            head_dim=self.head_dim,
            layout=self.rope_layout,
            device=device,
            scale=(1.0, self.grid[0] / height, self.grid[1] / width),
        )
        of_conditions = time_tables(
            steps, tokens=conditions, head_dim=self.head_dim, layout=self.rope_layout, device=device
        )
        return RopeTables(
            _per_step(steps, of_conditions.cos, of_patches.cos),
            _per_step(steps, of_conditions.signed_sin, of_patches.signed_sin),
        )


def build_action_predictor(config: ModelConfig) -> ActionPredictor:
    """Builds the action-conditioned predictor of a model, for its encoder's tokens."""
    return ActionPredictor(config.action_predictor, encoder_width=config.encoder.width)


def _per_step(steps: int, first: Tensor, then: Tensor) -> Tensor:
    """Interleaves two sequences step by step: for each step, its tokens of the first, then of the second."""
    return torch.cat([first.unflatten(0, (steps, -1)), then.unflatten(0, (steps, -1))], dim=1).flatten(0, 1)
