"""A stand-in for a checkout of the published code: our networks under its names."""

from pathlib import Path

ENCODER = '''
"""Stands in for the published code: its classes' arguments and calls, over networks of vjepa_scale."""

from vjepa_scale.model import Encoder
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig


def sizes(width, depth, heads, mlp_ratio):
    return {"width": width, "depth": depth, "heads": heads, "mlp_hidden": int(width * mlp_ratio)}


class VisionTransformer(Encoder):
    def __init__(self, *, img_size, patch_size, num_frames, tubelet_size, qkv_bias, norm_layer, uniform_power, use_sdpa,
                 use_rope, use_activation_checkpointing, embed_dim, depth, num_heads, mlp_ratio):
        assert qkv_bias and use_sdpa and use_rope and uniform_power and norm_layer(embed_dim).eps == 1e-6
        encoder = EncoderConfig(**sizes(embed_dim, depth, num_heads, mlp_ratio))
        super().__init__(
            ModelConfig(encoder=encoder, predictor=PredictorConfig(), patch=patch_size, tubelet=tubelet_size)
        )
'''
PREDICTOR = """
from src.models.vision_transformer import sizes
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig


class VisionTransformerPredictor(Predictor):
    def __init__(self, *, img_size, patch_size, num_frames, tubelet_size, qkv_bias, norm_layer, uniform_power, use_sdpa,
                 use_rope, use_activation_checkpointing, embed_dim, predictor_embed_dim, depth, num_heads, mlp_ratio,
                 use_mask_tokens, num_mask_tokens):
        assert use_mask_tokens
        own = sizes(predictor_embed_dim, depth, num_heads, mlp_ratio)
        config = ModelConfig(
            encoder=EncoderConfig(width=embed_dim, depth=1, heads=1),
            predictor=PredictorConfig(**own, mask_tokens=num_mask_tokens),
            patch=patch_size,
            tubelet=tubelet_size,
        )
        super().__init__(config)
        self.grid = num_frames // tubelet_size, img_size[0] // patch_size, img_size[1] // patch_size

    def forward(self, tokens, context, target, mask_index):
        return super().forward(tokens, context, target, self.grid, mask_index) * FACTOR
"""


def write_peer(folder: Path, *, factor: float = 1.0) -> Path:
    """A checkout that computes the same as this package, or other predictions."""
    models = folder / "src" / "models"
    models.mkdir(parents=True)
    (models / "vision_transformer.py").write_text(ENCODER)
    (models / "predictor.py").write_text(PREDICTOR.replace("FACTOR", str(factor)))
    return folder
