"""V-JEPA 2 pretraining at scale: shards, sharded training, cooldown, consolidation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_scale.checkpoint.consolidated import load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    # Lazy, so that tools which only read a recipe or a manifest do not pay for importing torch.
    if name == "load_encoder":
        from vjepa_scale.checkpoint.consolidated import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
