"""The model of a published ``.pt``: sizes from its tensors, everything else from its JSON or the caller.

The predictor of such a file is the pretraining one or the action-conditioned one: ``predictor`` in both.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from vjepa_scale.checkpoint.formats.source import (
    NETWORKS,
    ConsolidatedConfig,
    depths,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.networks import Network, refuse_other_model
from vjepa_scale.recipe.schema import ENCODERS, ModelConfig

# Facts of all released V-JEPA 2 weights: ImageNet's mean and std, 4 frames per second; predictors of width
# 384 have 12 heads, action-conditioned ones of 1024 have 16 (docs/method.md 5, 7 and 8).
MEAN, STD, FPS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 4.0
PREDICTOR_HEADS: dict[Network, dict[int, int]] = {"predictor": {384: 12}, "action_predictor": {1024: 16}}
# Clip of most released weights; a file does not contain it, and one file is for 384 pixels.
FRAMES, SIZE = 64, (256, 256)

_HEADS = "--model vit_giant (or another name), or --model heads=22 with the number of heads"


def is_action_predictor(state: dict[str, Tensor]) -> bool:
    """Returns whether a predictor's state, under plain names, is of an action-conditioned predictor."""
    return "action_encoder.weight" in state


def published_config(
    stored: ConsolidatedConfig | None,
    taken: dict[str, dict[str, Tensor]],
    states: dict[str, dict[str, Tensor]],
    model: str | ModelConfig | None,
    path: Path,
) -> ConsolidatedConfig:
    """Returns the configuration of the networks to read. Raises UserError where it is unknown or ``model`` differs.

    stored: content of FILE.json; None where there is none
    taken:  our network → its tensors under plain names
    states: everything in the file
    model:  as for open_published
    """
    networks = [network for network in NETWORKS if network in taken]
    if stored is not None:
        if isinstance(model, ModelConfig):
            refuse_other_model(stored.model, model, where=path, networks=networks)
        elif isinstance(model, str) and "=" not in model:
            refuse_other_model(stored.model, named_model(model), where=path, by=model, networks=["encoder"])
        elif isinstance(model, str):
            refuse_other_heads(stored, model, where=path)
        return stored
    sizes: dict[str, Any] = _encoder_sizes(taken.get("encoder") or next(iter(states.values())), path)
    sizes |= {network: _predictor_sizes(taken[network], path) for network in networks if network != "encoder"}
    if model is None:
        width, depth = sizes["encoder"]["width"], sizes["encoder"]["depth"]
        raise UserError(
            f"its encoder is {depth} deep and {width} wide; the number of heads is not in such a file",
            where=path,
            fix=f"give {_HEADS}",
        )
    return ConsolidatedConfig(
        model=_with_heads(sizes, model, networks, path),
        origin=str(path.resolve()),
        mean=MEAN,
        std=STD,
        frames=FRAMES,
        size=SIZE,
        fps=FPS,
        assumed=("frames", "size"),
    )


def _encoder_sizes(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    kernel = state.get("patch_embed.proj.weight")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or hidden is None:
        raise UserError("no encoder of this family: no patch_embed.proj.weight, blocks.0.mlp.fc1.weight", where=path)
    if kernel.ndim != 5 or kernel.shape[-1] != kernel.shape[-2]:
        raise UserError(
            f"its patch embedding is {list(kernel.shape)}, of pictures", where=path, fix="give an encoder of videos"
        )
    return {
        "encoder": {"width": kernel.shape[0], "depth": depths(state)[""], "mlp_hidden": hidden.shape[0]},
        "patch": kernel.shape[-1],
        "tubelet": kernel.shape[2],
    }


def _predictor_sizes(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    embed, hidden = state.get("predictor_embed.weight"), state.get("predictor_blocks.0.mlp.fc1.weight")
    if embed is None or hidden is None:
        raise UserError("its predictor is of another family", where=path, fix="take the encoder only (--encoder-only)")
    sizes = {"width": embed.shape[0], "depth": depths(state)[""], "mlp_hidden": hidden.shape[0]}
    if is_action_predictor(state):
        return sizes
    return sizes | {"mask_tokens": sum(name.startswith("mask_tokens.") for name in state)}


def _with_heads(sizes: dict[str, Any], model: str | ModelConfig, networks: list[Network], path: Path) -> ModelConfig:
    """Returns the model, from sizes in the file and the caller's ``model``."""
    predictor = next((network for network in networks if network != "encoder"), None)
    heads: dict[str, int]
    if isinstance(model, ModelConfig):
        heads, by = {network: getattr(model, network).heads for network in NETWORKS}, "the recipe"
    elif "=" in model:
        given, by = _parse_heads(model), model
        heads = {key if key == "encoder" or predictor is None else predictor: value for key, value in given.items()}
    else:
        heads, by = {"encoder": named_model(model).encoder.heads}, model
    if "encoder" not in heads:
        raise UserError(f"no heads in {model!r}", where="--model", fix=f"give {_HEADS}")
    wanted = model if isinstance(model, ModelConfig) else None if "=" in model else named_model(model)
    if wanted is not None and wanted.encoder.depth != sizes["encoder"]["depth"]:
        here, there = sizes["encoder"]["depth"], wanted.encoder.depth
        raise UserError(
            f"{here} blocks in the file, {there} in {by}", where=path, fix="give the model that these weights are of"
        )
    sizes["encoder"]["heads"] = heads["encoder"]
    if predictor is not None:
        width, known = sizes[predictor]["width"], PREDICTOR_HEADS[predictor]
        if predictor not in heads and width not in known:
            raise UserError(
                f"its predictor is {width} wide, and its number of heads is not in such a file",
                where=path,
                fix=f"give --model heads={heads['encoder']},predictor_heads=…",
            )
        sizes[predictor]["heads"] = heads.get(predictor) or known[width]
    if predictor == "action_predictor":
        # As in training: the whole grid of its own pictures. A file does not contain the use of extrinsics, either.
        sizes[predictor]["grid"] = tuple(side // sizes["patch"] for side in SIZE)
    if isinstance(model, ModelConfig):  # takes its positions; a layout other than the released one is refused below
        sizes |= {key: getattr(model, key).model_dump() for key in ("rope", "sincos")}
        sizes |= {"positions": model.positions, "rope": sizes["rope"] | {"layout": "tiled"}}
        if predictor == "action_predictor":
            sizes[predictor] |= {key: getattr(model.action_predictor, key) for key in ("extrinsics", "grid")}
    try:
        found = ModelConfig.model_validate(sizes)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"], where=path, fix=f"give {_HEADS}") from None
    if isinstance(model, ModelConfig):
        refuse_other_model(found, model, where=path, networks=networks)
    elif wanted is not None:
        named = wanted.model_copy(update={"patch": found.patch, "tubelet": found.tubelet})
        refuse_other_model(found, named, where=path, by=by, networks=["encoder"])
    return found


def named_model(name: str) -> ModelConfig:
    if name not in ENCODERS:
        raise UserError(
            f"no model named {name!r}",
            where="--model",
            fix=f"{', '.join(ENCODERS)}, or heads=22 with the number of heads",
        )
    return ModelConfig.model_validate({"encoder": name})


def refuse_other_heads(found: ConsolidatedConfig, text: str, *, where: object) -> None:
    """Raises UserError unless weights with known numbers of heads match ``heads=…``."""
    for network, heads in _parse_heads(text).items():
        if network == "predictor" and "action_predictor" in found.networks:
            network = "action_predictor"
        if (here := getattr(found.model, network).heads) != heads:
            raise UserError(f"{network}: {here} heads in the file", where=where, fix=f"leave --model {text} out")


def _parse_heads(text: str) -> dict[str, int]:
    out = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in ("heads", "predictor_heads") or not value.isdigit() or int(value) == 0:
            raise UserError(f"{part!r} in {text!r}", where="--model", fix="heads=22 or heads=22,predictor_heads=12")
        out["encoder" if key == "heads" else "predictor"] = int(value)
    return out
