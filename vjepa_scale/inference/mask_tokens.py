"""Which learned mask token stands for the unknown, as far as a checkpoint tells.

A recipe's mask generator j trains token j (modulo how many there are), unless ``jepa.mask_token`` says that all train
the first.
"""

from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig
from vjepa_scale.masking.generator import generator_class
from vjepa_scale.recipe.registry import MASK_GENERATORS


def trained_mask_token(config: ConsolidatedConfig) -> int:
    """The mask token that predictions of large areas were trained with."""
    if config.recipe is None:
        # Released weights trained the first; transformers, whose folders may come from anywhere, predicts with 1.
        return 0 if config.origin is not None and Path(config.origin).is_file() else 1
    several = len(config.recipe.get("masks", {}).get("generators", (0, 0))) > 1
    return int(several and config.recipe.get("jepa", {}).get("mask_token") != "first")


def future_mask_token(config: ConsolidatedConfig) -> int:
    """The mask token that predictions of the future were trained with: that of the first mask generator whose context
    is the past alone. Where there was none, ``trained_mask_token``."""
    recipe = config.recipe or {}
    if recipe.get("jepa", {}).get("mask_token") != "first":
        for number, generator in enumerate(recipe.get("masks", {}).get("generators", ())):
            if _hides_the_future(generator):
                return number
    return trained_mask_token(config)


def _hides_the_future(generator: dict[str, Any]) -> bool:
    kind = generator.get("kind", "blocks")
    return kind in MASK_GENERATORS and generator_class(kind).hides_future(generator)
