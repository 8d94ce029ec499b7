"""A small consolidated checkpoint whose weights are Hugging Face's VJEPA2Model's: what the tests of this room load."""

from pathlib import Path
from typing import Any

from transformers import VJEPA2Model

from tests.model.published import our_weights, random_published
from vjepa_scale.checkpoint.load import ConsolidatedConfig, write_consolidated
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

MODEL = ModelConfig(
    encoder=EncoderConfig(width=48, depth=3, heads=2),
    predictor=PredictorConfig(width=24, depth=2, heads=2, mlp_hidden=96, mask_tokens=3),
    patch=8,
)
FRAMES, SIZE, FPS = 8, 32, 5.0
GRID = (FRAMES // 2, SIZE // 8, SIZE // 8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def hugging_face() -> VJEPA2Model:
    """For pictures of SIZE × SIZE and up to twice FRAMES."""
    return random_published(MODEL, crop=SIZE, frames=2 * FRAMES, seed=1)


def write_checkpoint(folder: Path, *, moved: float = 0.0, **values: Any) -> Path:
    """moved: added to one bias of the encoder; values: of the configuration, in the place of these"""
    encoder, predictor = our_weights(hugging_face())
    encoder["blocks.1.mlp.fc1.bias"] = encoder["blocks.1.mlp.fc1.bias"] + moved
    weights = {f"encoder.{k}": v for k, v in encoder.items()} | {f"predictor.{k}": v for k, v in predictor.items()}
    config = ConsolidatedConfig(
        model=MODEL,
        weights="target",
        stage="cooldown",
        step=7,
        mean=MEAN,
        std=STD,
        frames=FRAMES,
        size=(SIZE, SIZE),
        fps=FPS,
        recipe={},
    )
    entries = [(name, tuple(value.shape), value.dtype) for name, value in weights.items()]
    write_consolidated(folder, config.model_copy(update=values), entries, weights.__getitem__)
    return folder
