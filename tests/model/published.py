"""Our parameters under the names of Hugging Face's VJEPA2Model: the tests' own map, not the exporter's."""

import re

import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from vjepa_scale.recipe.schema import ModelConfig

_ENCODER = (
    (r"^encoder\.embeddings\.patch_embeddings\.", "patch_embed."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^encoder\.layernorm\.", "norm."),
)
_PREDICTOR = (
    (r"^predictor\.embeddings\.predictor_embeddings\.", "predictor_embed."),
    (r"^predictor\.layer\.", "predictor_blocks."),
    (r"^predictor\.layernorm\.", "predictor_norm."),
    (r"^predictor\.proj\.", "predictor_proj."),
)


def random_published(config: ModelConfig, *, crop: int, frames: int, seed: int) -> VJEPA2Model:
    """A VJEPA2Model of our sizes whose every weight is random, mask tokens and LayerNorms included."""
    encoder, predictor = config.encoder, config.predictor
    torch.manual_seed(seed)
    model = VJEPA2Model(
        VJEPA2Config(
            patch_size=config.patch,
            tubelet_size=config.tubelet,
            crop_size=crop,
            frames_per_clip=frames,
            hidden_size=encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            mlp_ratio=encoder.mlp_hidden / encoder.width,
            pred_hidden_size=predictor.width,
            pred_num_hidden_layers=predictor.depth,
            pred_num_attention_heads=predictor.heads,
            pred_mlp_ratio=predictor.mlp_hidden / predictor.width,
            pred_num_mask_tokens=predictor.mask_tokens,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.5 / parameter.shape[-1] ** 0.5) + 0.1 * (parameter.ndim == 1)
            )
    return model.eval()


def our_weights(model: VJEPA2Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(encoder's, predictor's) state dicts."""
    state = model.state_dict()
    encoder: dict[str, Tensor] = {}
    predictor: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "predictor.embeddings.mask_tokens":
            predictor |= {f"mask_tokens.{j}": token[None].reshape(1, 1, -1) for j, token in enumerate(value)}
            continue
        ours, rules = (encoder, _ENCODER) if name.startswith("encoder.") else (predictor, _PREDICTOR)
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        new = new.replace(".attention.", ".attn.")
        if ".attn.query." in new:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            ours[new.replace("query", "qkv")] = torch.cat(parts)
        elif ".attn.key." not in new and ".attn.value." not in new:
            ours[new] = value
    return encoder, predictor
