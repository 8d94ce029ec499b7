"""Small models and weights for the tests of formats. Names of the published file are spelled here, not imported."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.recipe.schema import ModelConfig, Recipe

SMALL = {
    "encoder": {"width": 48, "depth": 2, "heads": 3, "mlp_hidden": 112},
    "predictor": {"width": 24, "depth": 3, "heads": 2, "mlp_hidden": 60, "mask_tokens": 3},
    "patch": 8,
}
OTHER = {
    "encoder": {"width": 64, "depth": 3, "heads": 2},
    "predictor": {"width": 48, "depth": 1, "heads": 4, "mlp_hidden": 192, "mask_tokens": 1},
    "patch": 16,
    "tubelet": 4,
}


# width, heads, MLP | predictor width, heads | crop, frames. Heads of 32, 48, 64, 88; ViT-g's width with both.
WIDE = {
    "192 of 32": (192, 6, 768, 96, 3, 48, 6),
    "768 of 48": (768, 16, 3072, 192, 4, 64, 4),
    "1024 of 64": (1024, 16, 4096, 384, 12, 96, 4),
    "1408 of 88": (1408, 16, 6144, 384, 12, 64, 8),
    "1408 of 64": (1408, 22, 6144, 384, 12, 80, 4),
}


def wide(name: str) -> tuple[dict[str, Any], int, int]:
    """(model, crop, frames) of one of WIDE, one block deep."""
    width, heads, hidden, predictor, predictor_heads, crop, frames = WIDE[name]
    tree = {
        "encoder": {"width": width, "depth": 1, "heads": heads, "mlp_hidden": hidden},
        "predictor": {"width": predictor, "depth": 1, "heads": predictor_heads, "mask_tokens": 10},
    }
    return tree, crop, frames


def model(tree: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(tree)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """encoder.*, target_encoder.*, predictor.*, all different, mask tokens and LayerNorms too."""
    generator = torch.Generator().manual_seed(seed)
    encoder, predictor = Encoder(config).state_dict(), Predictor(config).state_dict()
    networks = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
    shapes = {f"{network}.{name}": value.shape for network, state in networks.items() for name, value in state.items()}
    return {
        name: torch.randn(shape, generator=generator) * 0.5 / shape[-1] ** 0.5 + 0.1 * (len(shape) == 1)
        for name, shape in shapes.items()
    }


def run_of(
    folder: Path,
    tree: dict[str, Any],
    *,
    seed: int = 0,
    size: tuple[int, int] = (32, 32),
    frames: int = 8,
    masks: dict[str, Any] | None = None,
    jepa: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """A run folder with one checkpoint; returns its tensors."""
    recipe = Recipe.model_validate(
        {
            "run": {"dir": str(folder)},
            "data": {"sets": {"a": {"path": "data/a"}}, "augment": {"mean": [0.1, 0.2, 0.3]}},
            "model": tree,
            "masks": {"group": 4, **(masks or {})},
            "jepa": jepa or {},
            "pretrain": {
                "steps": 4,
                "global_batch": 4,
                "micro_batch": 4,
                "phases": [{"name": "all", "start_lr": 1e-3}],
            },
        }
    )
    tensors = random_tensors(recipe.model, seed)
    manifest = {
        "stage": "pretrain",
        "phase": "all",
        "frames": frames,
        "size": list(size),
        "fps": 4.0,
        "drawn": {"a": 16},
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
    }
    store.save(folder / "pretrain/checkpoints", 4, tensors, manifest)
    return tensors


def one_encoder(tensors: dict[str, Tensor], which: str = "target_encoder") -> dict[str, Tensor]:
    """encoder.* and predictor.* as a consolidated file holds them."""
    out = {name: value for name, value in tensors.items() if name.startswith("predictor.")}
    prefix = which + "."
    return out | {
        "encoder." + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    }


def network_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def published_dict(tensors: dict[str, Tensor], prefix: str = "module.backbone.") -> dict[str, Any]:
    """What the published training saves: three networks, tables that RoPE makes useless, plain values."""

    def behind_prefix(name: str) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in network_of(tensors, name).items()}

    encoder = {prefix + "pos_embed": torch.ones(1, 4, 2)} | behind_prefix("encoder")
    target = {prefix + "pos_embed": torch.ones(1, 4, 2)} | behind_prefix("target_encoder")
    predictor = {prefix + "predictor_pos_embed": torch.ones(1, 4, 2)} | behind_prefix("predictor")
    return {
        "encoder": encoder,
        "predictor": predictor,
        "opt": None,
        "scaler": None,
        "target_encoder": target,
        "epoch": 3,
        "loss": 0.5,
        "batch_size": 24,
        "world_size": 2,
        "lr": 5e-4,
    }
