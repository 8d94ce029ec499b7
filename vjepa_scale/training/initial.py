"""The networks that a stage takes from a checkpoint of ours, by ``init_from``: weights only."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.recipe import Recipe
from vjepa_scale.recipe.networks import networks_from
from vjepa_scale.recipe.phases import MASKED


def load_initial(recipe: Recipe, stage_name: str, checkpoint: Path, tensors: dict[str, Tensor]) -> store.LoadReport:
    """Fill the networks that are taken, and leave in ``tensors`` only theirs.

    A stage that has one encoder, a frozen one, takes the target encoder where the checkpoint has two. Raises UserError
    where something of a network is missing, or of another shape. The checkpoint is not verified again here.
    """
    stored = {name.partition(".")[0] for name in CheckpointReader(checkpoint).tensors()}
    sources = _sources(recipe, stage_name, stored)
    for name in [name for name in tensors if name.partition(".")[0] not in sources]:
        del tensors[name]
    wanted = {_renamed(name, sources): tensor for name, tensor in tensors.items()}
    others = tuple(f"{network}." for network in stored - set(sources.values()))
    return store.load(checkpoint, wanted, allow_unexpected=others, check=False)


def _sources(recipe: Recipe, stage_name: str, stored: set[str]) -> dict[str, str]:
    """Our networks -> the checkpoint's."""
    sources: dict[str, str] = {network: network for network in networks_from(recipe, stage_name)}
    if stage_name in MASKED:
        return sources | {"target_encoder": "target_encoder"}
    return sources | ({"encoder": "target_encoder"} if "target_encoder" in stored else {})


def _renamed(name: str, sources: Mapping[str, str]) -> str:
    network, dot, rest = name.partition(".")
    return sources[network] + dot + rest
