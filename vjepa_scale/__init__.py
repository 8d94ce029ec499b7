"""V-JEPA 2 pretraining at scale: shards, sharded training, cooldown, consolidation."""

from typing import TYPE_CHECKING

from vjepa_scale.core import lazy_names

if TYPE_CHECKING:
    from vjepa_scale.checkpoint.load import load_encoder
    from vjepa_scale.inference.model import load_model
    from vjepa_scale.inference.surprise import surprise
    from vjepa_scale.planning.world import load_world_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder", "load_model", "load_world_model", "surprise"]


__getattr__ = lazy_names(
    __name__,
    {
        "load_encoder": "vjepa_scale.checkpoint.load",
        "load_model": "vjepa_scale.inference.model",
        "load_world_model": "vjepa_scale.planning.world",
        "surprise": "vjepa_scale.inference.surprise",
    },
)
