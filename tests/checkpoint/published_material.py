"""Files of the published format for its tests: with any content, and one of ViT-g."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADS = "heads=3,predictor_heads=2"


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def vit_g_file() -> dict[str, Any]:
    """The published dict of ViT-g, by the sizes of docs/method.md, with tensors that take no room."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(1).expand(shape)

    def block(prefix: str, width: int, hidden: int) -> dict[str, Tensor]:
        out = {}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            out |= {f"{prefix}.{name}.weight": tensor(rows, columns), f"{prefix}.{name}.bias": tensor(rows)}
        for name in ("norm1", "norm2"):
            out |= {f"{prefix}.{name}.weight": tensor(width), f"{prefix}.{name}.bias": tensor(width)}
        return out

    encoder = {"pos_embed": tensor(1, 2048, 1408), "patch_embed.proj.weight": tensor(1408, 3, 2, 16, 16)}
    encoder |= {"patch_embed.proj.bias": tensor(1408), "norm.weight": tensor(1408), "norm.bias": tensor(1408)}
    for i in range(40):
        encoder |= block(f"blocks.{i}", 1408, 6144)
    predictor = {"predictor_pos_embed": tensor(1, 2048, 384), "predictor_embed.weight": tensor(384, 1408)}
    predictor |= {"predictor_embed.bias": tensor(384), "predictor_norm.weight": tensor(384)}
    predictor |= {"predictor_norm.bias": tensor(384), "predictor_proj.weight": tensor(1408, 384)}
    predictor |= {"predictor_proj.bias": tensor(1408)} | {f"mask_tokens.{j}": tensor(1, 1, 384) for j in range(10)}
    for i in range(12):
        predictor |= block(f"predictor_blocks.{i}", 384, 1536)

    def behind(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.backbone.{name}": value for name, value in state.items()}

    opt = {"state": {}, "param_groups": [{"params": list(range(9)), "lr": 1e-4} for _ in range(4)]}
    networks = {"encoder": behind(encoder), "predictor": behind(predictor), "target_encoder": behind(encoder)}
    return networks | {
        "opt": opt,
        "scaler": None,
        "epoch": 1,
        "loss": 0.4,
        "batch_size": 24,
        "world_size": 1,
        "lr": 1e-4,
    }
