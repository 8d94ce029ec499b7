"""A small action-conditioned model with random weights, and what goes into it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoint.action_material import ACTION, action_tensors
from tests.checkpoint.formats_material import model
from vjepa_scale.checkpoint.load import ConsolidatedConfig, write_consolidated

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# Not square: 4×5 tokens of 8 pixels, on which positions are rescaled to 4×4.
SIZE, GRID, PLACES, WIDTH = (32, 40), (4, 5), 20, 48
BATCH, STEPS = 2, 4


def write_world(folder: Path, *, extrinsics: bool = False, action: dict[str, Any] | None = None) -> Path:
    """A consolidated folder with random weights. action: the recipe's section."""
    config = model(ACTION | {"action_predictor": ACTION["action_predictor"] | {"extrinsics": extrinsics}})
    weights = action_tensors(config, 5)
    told = ConsolidatedConfig(
        model=config,
        weights="target",
        networks=("encoder", "action_predictor"),
        stage="action",
        step=7,
        mean=MEAN,
        std=STD,
        frames=8,
        size=SIZE,
        fps=4.0,
        recipe={"action": {"crop_aspect": [1.25, 1.25]} if action is None else action},
    )
    write_consolidated(folder, told, [(k, tuple(v.shape), v.dtype) for k, v in weights.items()], weights.__getitem__)
    return folder


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames_of(seed: int = 0, steps: int = STEPS) -> Tensor:
    return F.layer_norm(drawn(BATCH, steps, PLACES, WIDTH, seed=seed), (WIDTH,))


def poses(steps: int = STEPS, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Actions [B, K, 7] and states [B, K, 7]."""
    return drawn(BATCH, steps, 7, seed=seed, scale=0.5), drawn(BATCH, steps, 7, seed=seed + 1, scale=0.5)


def bits_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
