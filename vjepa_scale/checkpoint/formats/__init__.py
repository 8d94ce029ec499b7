"""Formats of weights: ours, the published code's and Hugging Face's, read into and written from one neutral thing.

    open_weights(path)  →  WeightSource  →  safetensors | huggingface | published

``source`` is the neutral thing; ``opening`` tells formats apart; ``native``, ``published`` (with
``published_model``) and ``huggingface`` know one format each. docs/formats.md is for users.
"""

from vjepa_scale.checkpoint.formats.open import open_weights
from vjepa_scale.checkpoint.formats.published import published_optimizer
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, Match, WeightSource

__all__ = ["ConsolidatedConfig", "Match", "WeightSource", "open_weights", "published_optimizer"]
