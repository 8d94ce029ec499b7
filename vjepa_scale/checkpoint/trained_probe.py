"""The best probe of a finished probe stage, and that probe as Hugging Face's classifier."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats.huggingface_probe import write_video_classifier
from vjepa_scale.checkpoint.formats.open import open_weights
from vjepa_scale.checkpoint.manifest import kind_of, last_name, name_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.model.probe import AttentiveProbe, probe_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.registry import STAGES, class_of
from vjepa_scale.recipe.schema import ModelConfig
from vjepa_scale.recipe.stage import CHECKPOINTS, EVALUATION, stages_of


@dataclass(frozen=True)
class TrainedProbe:
    """probe: of the setting that evaluation.json calls best, in eval mode; classes: of its logits, in order.

    checkpoint: where it and its encoder lie;  model: of that encoder;  result: evaluation.json's content
    """

    probe: AttentiveProbe
    classes: tuple[str, ...]
    checkpoint: Path
    model: ModelConfig
    result: dict[str, Any]


def is_probe_stage(folder: Path) -> bool:
    """Is this the folder of a probe stage that is finished? Stages of other kinds may have an evaluation too."""
    if not (folder / EVALUATION).is_file():
        return False
    checkpoint = last_name(folder / CHECKPOINTS)
    if checkpoint is None:  # which load_probe refuses
        return True
    kind = kind_of(store.read_manifest(checkpoint), where=checkpoint)
    return bool(class_of(STAGES, kind).trains_probes)


def load_probe(folder: Path) -> TrainedProbe:
    """The best probe of a probe stage's folder. Raises UserError where there is none, or it is damaged."""
    result = _evaluation(folder / EVALUATION)
    checkpoint = folder / CHECKPOINTS / name_of(result["step"])
    store.verify(checkpoint)
    manifest = store.read_manifest(checkpoint)
    recipe = validate_recipe(manifest["recipe"], source=checkpoint / store.MANIFEST)
    classes = tuple(result["class_names"])
    probe = probe_of(recipe.model, stages_of(recipe)[manifest["stage"]].config, classes=len(classes))
    best = result["best"]["probe"]
    tensors = {f"{best}.{name}": tensor for name, tensor in probe.state_dict().items()}
    CheckpointReader(checkpoint).fill(tensors, alone=True)  # into the probe's own
    return TrainedProbe(probe.eval(), classes, checkpoint, recipe.model, result)


def _evaluation(path: Path) -> dict[str, Any]:
    """What a probe stage wrote at its end. Raises UserError where it is damaged."""
    result = read_json(path)
    best = result.get("best") if isinstance(result, dict) else None
    whole = isinstance(best, dict) and isinstance(best.get("probe"), str) and isinstance(result.get("step"), int)
    if not whole or not isinstance(result.get("class_names"), list) or not isinstance(result.get("origin"), dict):
        raise UserError(
            "not the result of a probe stage", where=path, fix="remove it, and launch the run again: it is made anew"
        )
    return result


def export_classifier(folder: Path, out: Path) -> TrainedProbe:
    """Write the best probe of a stage's folder, and the model that it was trained on, as VJEPA2ForVideoClassification.

    The model, with the predictor that theirs holds too, is read from where the stage started. Raises UserError where
    its encoder is not the one beside the probe, to the bit, or where theirs cannot compute the probe.
    """
    trained = load_probe(folder)
    origin = trained.result["origin"].get("path")
    if origin is None:
        raise UserError("its encoder was never trained", where=folder / EVALUATION, fix="a probe of a trained one")
    manifest = store.read_manifest(trained.checkpoint)
    # Of a published file of others the stage's recipe knows what the file does not say.
    foreign = Path(origin).suffix == ".pt" and not Path(f"{origin}.json").exists()
    model = trained.model
    heads = f"heads={model.encoder.heads},predictor_heads={model.predictor.heads}"
    source = open_weights(origin, model=heads if foreign else None)
    config = source.config
    if foreign:
        positions = {key: getattr(model, key) for key in ("positions", "rope", "sincos")}
        config = config.model_copy(update={"model": config.model.model_copy(update=positions)})
    config = config.model_copy(update={"frames": manifest["frames"], "size": tuple(manifest["size"])})
    for name, shape, dtype in source.only(("encoder",)).entries:
        beside: dict[str, Tensor] = {name: torch.empty(shape)}
        CheckpointReader(trained.checkpoint).fill(beside, alone=True)
        if not torch.equal(beside[name].to(dtype), source.read(name)):
            raise UserError(f"{name} is not the one that the probe was trained on", where=origin, fix="restore it")
    write_video_classifier(out, replace(source, config=config), trained.probe, trained.classes)
    return trained
