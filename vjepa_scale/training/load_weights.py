"""Loads initial weights: from a checkpoint of ours, or foreign ones: published, Hugging Face's or consolidated.

Foreign weights are checked before a process starts (``check_foreign``). Every rank loads them into its shards tensor by
tensor (``load_foreign``), so no rank ever holds a whole model.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats import open_weights, published
from vjepa_scale.checkpoint.formats.source import Weights, WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.distributed.fsdp import fill_shard
from vjepa_scale.distributed.optim import MOMENTS
from vjepa_scale.recipe import Stage

_log = logging.getLogger(__name__)


def check_foreign(stage: Stage) -> int:
    """Raises UserError naming the stage's key if the weights do not fit. Returns the step that training continues from.

    Reads names and shapes; for ``continue_from`` also the optimiser's step counts.
    """
    word, path = stage.starts_by, str(stage.starts_from)
    if word == "continue_from" and not stage.has_target_encoder:
        raise UserError(
            "it holds no optimiser state of this stage",
            where=f"{stage.name}.continue_from: {path}",
            fix="init_from, which takes its weights",
        )
    try:
        _open(stage, path).match(stage.recipe.model)
        return 0 if word == "init_from" else _steps(_optimizer(stage, path))
    except UserError as error:
        raise UserError(error.what, where=f"{stage.name}.{word}: {error.where}", fix=error.fix) from None


def load_foreign(stage: Stage, path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Loads networks, and for ``continue_from`` the optimiser's moments. Returns a sentence about what matched.

    tensors: by canonical names, as in a checkpoint of ours. A missing target encoder gets the encoder's weights.
    """
    source = _open(stage, str(path))
    report = source.match(stage.recipe.model).sentence()
    moments = _optimizer(stage, str(path)) if stage.config.continue_from is not None else {}
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
    taken = tuple(f"{network}." for network in (*stage.networks_at_start, "target_encoder"))
    assert not any(name.startswith(taken) for name in fresh), "checked by open_weights and match"
    _log.debug("of %s: %d tensors; fresh: %s", path, len(tensors) - len(fresh), ", ".join(fresh) or "none")
    return report + (f"; {len(fresh)} tensors start fresh" if fresh else "")


def _open(stage: Stage, path: str) -> WeightSource:
    """Opens both encoders for a stage that trains one; for other stages the target encoder, if there are two."""
    weights: Weights | None = "both" if stage.has_target_encoder else None
    return open_weights(path, model=stage.recipe.model, weights=weights, networks=stage.networks_at_start)


def _optimizer(stage: Stage, path: str) -> dict[str, dict[str, Tensor]]:
    file = Path(path) / published.WEIGHTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix == ".safetensors":
        raise UserError("it holds no optimiser state", where=path, fix="start from its weights only, with init_from")
    if stage.optimizer.kind != "adamw":
        raise UserError("its optimiser is AdamW", where=path, fix="optimizer.kind: adamw, or init_from")
    return published.published_optimizer(file, model=stage.recipe.model)


def _steps(moments: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Returns the number of completed steps: the largest count, of the parameters that every step trained."""
    assert {*MOMENTS, "step"} <= next(iter(moments.values())).keys()
    return int(torch.stack([state["step"].float() for state in moments.values()]).max())


def load_initial(stage: Stage, checkpoint: Path, tensors: dict[str, Tensor]) -> store.LoadReport:
    """Loads the weights that ``init_from`` takes from a checkpoint of ours. Removes all other tensors from ``tensors``.

    A stage with one, frozen, encoder takes the target encoder if the checkpoint has two. Raises UserError if a tensor
    of a network is missing or has another shape. Does not verify the checkpoint again.
    """
    stored = {name.partition(".")[0] for name in CheckpointReader(checkpoint).tensors()}
    sources = _sources(stage, stored)
    for name in [name for name in tensors if name.partition(".")[0] not in sources]:
        del tensors[name]
    wanted = {_renamed(name, sources): tensor for name, tensor in tensors.items()}
    others = tuple(f"{network}." for network in stored - set(sources.values()))
    _log.debug("of %s: ours are its %s; left out: %s", checkpoint, sources, ", ".join(others) or "none")
    return store.load(checkpoint, wanted, allow_unexpected=others, check=False)


def _sources(stage: Stage, stored: set[str]) -> dict[str, str]:
    """Returns the stage's networks -> the checkpoint's."""
    sources: dict[str, str] = {network: network for network in stage.networks_at_start}
    if stage.has_target_encoder:
        return sources | {"target_encoder": "target_encoder"}
    return sources | ({"encoder": "target_encoder"} if "target_encoder" in stored else {})


def _renamed(name: str, sources: Mapping[str, str]) -> str:
    network, dot, rest = name.partition(".")
    return sources[network] + dot + rest
