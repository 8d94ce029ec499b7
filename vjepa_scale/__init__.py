"""V-JEPA 2 pretraining at scale: shards, sharded training, cooldown, consolidation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_scale.checkpoint.consolidated import load_encoder
    from vjepa_scale.inference.model import load_model
    from vjepa_scale.inference.surprise import surprise
    from vjepa_scale.planning.world import load_world_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder", "load_model", "load_world_model", "surprise"]


def __getattr__(name: str) -> Any:
    # Lazy, so that tools which only read a recipe or a manifest do not pay for importing torch.
    if name == "load_encoder":
        from vjepa_scale.checkpoint.consolidated import load_encoder

        return load_encoder
    if name == "load_model":
        from vjepa_scale.inference.model import load_model

        return load_model
    if name == "load_world_model":
        from vjepa_scale.planning.world import load_world_model

        return load_world_model
    if name == "surprise":
        from vjepa_scale.inference.surprise import surprise

        return surprise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
