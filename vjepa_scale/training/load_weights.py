"""Starting from weights that are not a training checkpoint of ours: published, Hugging Face's or consolidated.

Everything is said before a process starts (``check_foreign``) and filled into the sharded networks tensor by tensor,
by every rank for itself (``load_foreign``): no rank ever holds a whole model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats import published
from vjepa_scale.checkpoint.formats.open import open_weights
from vjepa_scale.checkpoint.formats.source import Weights, WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.distributed.fsdp import fill_shard
from vjepa_scale.distributed.optim import MOMENTS
from vjepa_scale.recipe.networks import networks_from
from vjepa_scale.recipe.phases import MASKED
from vjepa_scale.recipe.schema import Recipe


def check_foreign(recipe: Recipe, stage_name: str) -> int:
    """Raise UserError, naming the stage's key, unless the weights fit; returns the step that training goes on from.

    Reads names and shapes; of ``continue_from`` the optimiser's step counts too.
    """
    stage = recipe.stages()[stage_name]
    word = "continue_from" if stage.continue_from is not None else "init_from"
    path = str(stage.continue_from or stage.init_from)
    if word == "continue_from" and stage_name not in MASKED:
        raise UserError(
            "it holds no optimiser's state of this stage",
            where=f"{stage_name}.continue_from: {path}",
            fix="init_from, which takes its weights",
        )
    try:
        _open(recipe, stage_name, path).match(recipe.model)
        return 0 if word == "init_from" else _steps(_optimizer(recipe, stage_name, path))
    except UserError as error:
        raise UserError(error.what, where=f"{stage_name}.{word}: {error.where}", fix=error.fix) from None


def load_foreign(recipe: Recipe, stage_name: str, path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Fill networks, and for ``continue_from`` the optimiser's moments; returns what matched, in a sentence.

    tensors: by canonical names, as a checkpoint of ours holds them. A target encoder that is not there is the encoder.
    """
    stage = recipe.stages()[stage_name]
    source = _open(recipe, stage_name, str(path))
    report = source.match(recipe.model).sentence()
    moments = _optimizer(recipe, stage_name, str(path)) if stage.continue_from is not None else {}
    stored = {name for name, _, _ in source.entries}
    fresh = []
    for name, tensor in tensors.items():
        alias = name if name in stored else name.removeprefix("target_")
        if name.startswith("optimizer."):
            _, moment, parameter = name.split(".", 2)
            fill_shard(tensor, moments[parameter][moment].float())
        elif alias in stored:
            fill_shard(tensor, source.read(alias).float())
        else:
            fresh.append(name)
    taken = tuple(f"{network}." for network in (*networks_from(recipe, stage_name), "target_encoder"))
    assert not any(name.startswith(taken) for name in fresh), "open and match said that all of these are there"
    return report + (f"; {len(fresh)} tensors start fresh" if fresh else "")


def _open(recipe: Recipe, stage_name: str, path: str) -> WeightSource:
    """A stage that trains an encoder takes both; another freezes the target encoder where there are two."""
    weights: Weights | None = "both" if stage_name in MASKED else None
    return open_weights(path, model=recipe.model, weights=weights, networks=networks_from(recipe, stage_name))


def _optimizer(recipe: Recipe, stage_name: str, path: str) -> dict[str, dict[str, Tensor]]:
    file = Path(path) / published.WEIGHTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix == ".safetensors":
        raise UserError("it holds no optimiser state", where=path, fix="start from its weights only, with init_from")
    if recipe.optimizer_of(stage_name).kind != "adamw":
        raise UserError("its optimiser is AdamW", where=path, fix="optimizer.kind: adamw, or init_from")
    return published.published_optimizer(file, model=recipe.model)


def _steps(moments: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Completed steps: the count of the parameters that were trained in all of them."""
    assert {*MOMENTS, "step"} <= next(iter(moments.values())).keys()
    return int(torch.stack([state["step"].float() for state in moments.values()]).max())
