"""What a user of trained weights loads: the networks, from weights of any format.

>>> encoder = load_encoder("exported/demo")            # a folder of tools/consolidate.py, a run, Hugging Face's …
>>> encoder = load_encoder("vitg.pt", model="vit_giant")  # a published file does not say its number of heads
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vjepa_scale.checkpoint.formats.native import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE, write_consolidated
from vjepa_scale.checkpoint.formats.open import open_weights
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, Network, WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.action_predictor import ActionPredictor, build_action_predictor
from vjepa_scale.recipe.schema import ModelConfig

__all__ = [
    "CONFIG_FILE",
    "METADATA_KEY",
    "WEIGHTS_FILE",
    "ConsolidatedConfig",
    "load_action_predictor",
    "load_encoder",
    "load_predictor",
    "network_of",
    "read_config",
    "write_consolidated",
]

Built = TypeVar("Built", bound=nn.Module)


def read_config(path: str | Path, *, model: str | ModelConfig | None = None) -> ConsolidatedConfig:
    """What weights of any format are: model, geometry, normalisation, recipe; None for what the source does not say.

    path, model: as for open_weights
    """
    return open_weights(path, model=model).config


def load_encoder(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> Encoder:
    """The trained encoder, float32, in eval mode: the target encoder where there are two.

    path:  a folder written by tools/consolidate.py, or its model.safetensors; a run, stage or checkpoint folder;
           a published ``.pt``; a Hugging Face folder
    model: which model it is, where the path cannot say: for a published file of others, such as ``vit_giant``

    The encoder maps normalised clips [B, 3, T, H, W] to tokens [B, N, D]; ``read_config(path)`` says the
    mean and std, and the clip length, size and frame rate that it was trained on last.
    How many tensors matched is said on stderr. Raises UserError where the path is something else or the tensors
    do not match the model, all of them.
    """
    return network_of(open_weights(path, model=model, networks=("encoder",)), "encoder", Encoder, torch.device(device))


def load_predictor(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> Predictor:
    """The trained predictor, float32, in eval mode. As load_encoder."""
    source = open_weights(path, model=model, networks=("predictor",))
    return network_of(source, "predictor", Predictor, torch.device(device))


def load_action_predictor(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> ActionPredictor:
    """The trained action-conditioned predictor, float32, in eval mode; of a run its action stage's. As load_encoder."""
    source = open_weights(path, model=model, networks=("action_predictor",))
    return network_of(source, "action_predictor", build_action_predictor, torch.device(device))


def network_of(
    source: WeightSource, name: Network, build: Callable[[ModelConfig], Built], device: torch.device
) -> Built:
    """One network of weights that are open already. Raises UserError where they hold none, or do not match."""
    if name not in source.networks():
        raise UserError(f"it holds no {name}", where=source.where, fix="give weights with one")
    source = source.only((name,))
    match = source.match()
    with torch.device("meta"):
        network = build(source.config.model)
    tensors: dict[str, Tensor] = {}
    for key, _, _ in source.entries:
        # A copy: a network that is mapped from a file dies with it.
        tensors[key.removeprefix(f"{name}.")] = source.read(key).to(device, torch.float32, copy=True)
    network.load_state_dict(tensors, assign=True)
    print(f"{source.where}: {name}: {match.sentence()}", file=sys.stderr)
    return network.eval()
