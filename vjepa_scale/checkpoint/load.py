"""Loads trained networks from weights of any format, and the best probe of a stage.

>>> encoder = load_encoder("exported/demo")            # a folder of tools/consolidate.py, a run, Hugging Face's …
>>> encoder = load_encoder("vitg.pt", model="vit_giant")  # a published file does not contain its number of heads
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.formats.native import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE, write_consolidated
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, Network, WeightSource
from vjepa_scale.checkpoint.manifest import last_name, name_of, trained_kind
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.predictor import ActionPredictor, build_action_predictor
from vjepa_scale.model.probe import AttentiveProbe, probe_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.registry import STAGES, class_of
from vjepa_scale.recipe.schema import ModelConfig
from vjepa_scale.recipe.stage import CHECKPOINTS, EVALUATION, stages_of

_log = logging.getLogger(__name__)

__all__ = [
    "CONFIG_FILE",
    "METADATA_KEY",
    "WEIGHTS_FILE",
    "ConsolidatedConfig",
    "load_action_predictor",
    "load_encoder",
    "load_predictor",
    "load_probe",
    "network_of",
    "read_config",
    "write_consolidated",
]

Built = TypeVar("Built", bound=nn.Module)


def read_config(path: str | Path, *, model: str | ModelConfig | None = None) -> ConsolidatedConfig:
    """Returns model, geometry, normalisation and recipe of weights of any format; None for what the source lacks.

    path, model: as for open_weights
    """
    return open_weights(path, model=model).config


def load_encoder(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> Encoder:
    """Loads the trained encoder, float32, in eval mode: the target encoder where there are two.

    path:  a folder written by tools/consolidate.py, or its model.safetensors; a run, stage or checkpoint folder;
           a published ``.pt``; a Hugging Face folder
    model: the model, where the path does not contain it: for a published file of others, such as ``vit_giant``

    The encoder maps normalised clips [B, 3, T, H, W] to tokens [B, N, D]. ``read_config(path)`` has the mean and std,
    and the clip length, size and frame rate of the last training.
    Logs the number of matched tensors (info: on stderr). Raises UserError where the path is something else, or where
    any tensor does not match the model.
    """
    return network_of(open_weights(path, model=model, networks=("encoder",)), "encoder", Encoder, torch.device(device))


def load_predictor(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> Predictor:
    """Loads the trained predictor, float32, in eval mode. Arguments and errors as for load_encoder."""
    source = open_weights(path, model=model, networks=("predictor",))
    return network_of(source, "predictor", Predictor, torch.device(device))


def load_action_predictor(
    path: str | Path, device: str | torch.device = "cpu", *, model: str | ModelConfig | None = None
) -> ActionPredictor:
    """Loads the trained action-conditioned predictor; of a run, the action stage's. Otherwise as load_encoder."""
    source = open_weights(path, model=model, networks=("action_predictor",))
    return network_of(source, "action_predictor", build_action_predictor, torch.device(device))


def network_of(
    source: WeightSource, name: Network, build: Callable[[ModelConfig], Built], device: torch.device
) -> Built:
    """Builds one network from opened weights. Raises UserError where they lack it, or do not match."""
    if name not in source.networks():
        raise UserError(f"it holds no {name}", where=source.where, fix="give weights with one")
    source = source.only((name,))
    match = source.match()
    with torch.device("meta"):
        network = build(source.config.model)
    tensors: dict[str, Tensor] = {}
    for key, _, _ in source.entries:
        # A copy, because tensors mapped from a file become invalid with the file.
        tensors[key.removeprefix(f"{name}.")] = source.read(key).to(device, torch.float32, copy=True)
    network.load_state_dict(tensors, assign=True)
    _log.info(f"{source.where}: {name}: {match.sentence()}")
    return network.eval()


# -- the best probe of a finished probe stage ------------------------------------------------------


@dataclass(frozen=True)
class TrainedProbe:
    """The best probe of a finished probe stage.

    probe:      the probe that evaluation.json calls best, in eval mode
    classes:    of its logits, in order
    checkpoint: folder of the probe and its encoder
    model:      of that encoder
    result:     content of evaluation.json
    """

    probe: AttentiveProbe
    classes: tuple[str, ...]
    checkpoint: Path
    model: ModelConfig
    result: dict[str, Any]


def is_probe_stage(folder: Path) -> bool:
    """Returns whether this is the folder of a finished probe stage. Other kinds of stages may be evaluated too."""
    if not (folder / EVALUATION).is_file():
        return False
    checkpoint = last_name(folder / CHECKPOINTS)
    if checkpoint is None:  # load_probe raises the error for this
        return True
    kind = trained_kind(store.read_manifest(checkpoint), where=checkpoint)
    return bool(class_of(STAGES, kind).trains_probes)


def load_probe(folder: Path) -> TrainedProbe:
    """Loads the best probe of a probe stage's folder. Raises UserError where there is none, or it is damaged."""
    result = _evaluation(folder / EVALUATION)
    checkpoint = folder / CHECKPOINTS / name_of(result["step"])
    store.verify(checkpoint)
    manifest = store.read_manifest(checkpoint)
    recipe = validate_recipe(manifest["recipe"], source=checkpoint / store.MANIFEST)
    classes = tuple(result["class_names"])
    probe = probe_of(recipe.model, stages_of(recipe)[manifest["stage"]].config, classes=len(classes))
    best = result["best"]["probe"]
    tensors = {f"{best}.{name}": tensor for name, tensor in probe.state_dict().items()}
    CheckpointReader(checkpoint).fill(tensors, alone=True)  # in place
    return TrainedProbe(probe.eval(), classes, checkpoint, recipe.model, result)


def _evaluation(path: Path) -> dict[str, Any]:
    """Reads the evaluation that a probe stage wrote at its end. Raises UserError where it is damaged."""
    result = read_json(path)
    best = result.get("best") if isinstance(result, dict) else None
    whole = isinstance(best, dict) and isinstance(best.get("probe"), str) and isinstance(result.get("step"), int)
    if not whole or not isinstance(result.get("class_names"), list) or not isinstance(result.get("origin"), dict):
        raise UserError(
            "not the result of a probe stage", where=path, fix="remove it, and launch the run again: it is made anew"
        )
    return result
