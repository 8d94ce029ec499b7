"""Hugging Face's VJEPA2Model: a folder with config.json and model.safetensors, or several with an index.

    OUT/
      model.safetensors                their names; query, key and value apart; mask tokens as one tensor
      config.json                      a VJEPA2Config
      video_preprocessor_config.json   a VJEPA2VideoProcessor
      vjepa_scale.json                 our ConsolidatedConfig, since their config cannot express all of it
      README.md                        the model card, with the recipe

Their model only has the tiled layout of rotary positions, on one square grid: their positions are computed from
``crop_size``, for any size of the clip.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa_scale.checkpoint.formats import published_model
from vjepa_scale.checkpoint.formats.model_card import ClassifierCard, model_card
from vjepa_scale.checkpoint.formats.native import read_safetensors, safetensors_entries
from vjepa_scale.checkpoint.formats.source import (
    ConsolidatedConfig,
    WeightSource,
    match_shapes,
    network_shapes,
    read_config_file,
)
from vjepa_scale.checkpoint.safetensors_writer import Entry, write_safetensors
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, read_json, write_atomic, write_json
from vjepa_scale.model.blocks import LAYER_NORM_EPS
from vjepa_scale.recipe.networks import refuse_other_model
from vjepa_scale.recipe.schema import ModelConfig

MODEL_TYPE = "vjepa2"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "video_preprocessor_config.json"
SIDECAR_FILE = "vjepa_scale.json"
CARD_FILE = "README.md"
FILES = (WEIGHTS_FILE, CONFIG_FILE, PROCESSOR_FILE, SIDECAR_FILE, CARD_FILE)

# Their predictor's forward always uses this mask token, modulo the number of mask tokens.
MASK_TOKEN = 1

_RENAMED = {
    "encoder": {"patch_embed.": "embeddings.patch_embeddings.", "blocks.": "layer.", "norm.": "layernorm."},
    "predictor": {
        "predictor_embed.": "embeddings.predictor_embeddings.",
        "predictor_blocks.": "layer.",
        "predictor_norm.": "layernorm.",
        "predictor_proj.": "proj.",
    },
}
_MASK_TOKENS = "predictor.embeddings.mask_tokens"
_QKV = ("query", "key", "value")
# Name prefixes in VJEPA2ForVideoClassification: of its head, and of the network inside it.
_HEAD = ("pooler.", "classifier.")
_INSIDE = "vjepa2."


@dataclass(frozen=True)
class Head:
    """The parts of VJEPA2ForVideoClassification besides the network: tensors by their names, keys of its config.

    card: what the model card says about it
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    card: ClassifierCard


def parts_of(name: str) -> tuple[str, ...]:
    """Returns their names of one of our tensors; three names for its parts along the first axis where it is split.

    Mask tokens have no separate names: they are rows of one tensor.
    """
    network, _, rest = name.partition(".")
    if rest.startswith("mask_tokens."):
        return (_MASK_TOKENS,)
    ours = next(prefix for prefix in _RENAMED[network] if rest.startswith(prefix))
    theirs = f"{network}.{_RENAMED[network][ours]}{rest.removeprefix(ours)}".replace(".attn.", ".attention.")
    return tuple(theirs.replace(".qkv.", f".{part}.") for part in _QKV) if ".qkv." in theirs else (theirs,)


def expected_shapes(config: ModelConfig, networks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Returns their names and shapes of a whole model."""
    out: dict[str, tuple[int, ...]] = {}
    for network in networks:
        for name, shape in network_shapes(config, network).items():
            if (parts := parts_of(name)) == (_MASK_TOKENS,):
                out[_MASK_TOKENS] = (config.predictor.mask_tokens, *shape)
            else:
                out |= {part: (shape[0] // len(parts), *shape[1:]) for part in parts}
    return out


# -- reading -----------------------------------------------------------------------------------------


def is_huggingface(folder: Path) -> bool:
    """Returns whether a folder's config.json is of a Hugging Face model of any family. Ours has the key ``format``."""
    try:
        content = parse_json((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "model_type" in content


def open_huggingface(folder: Path) -> WeightSource:
    """Opens a folder of VJEPA2Model, or of VJEPA2ForVideoClassification, whose head is ignored.

    Raises UserError where config.json and weights do not match, or are of another family.
    """
    theirs = read_json(folder / CONFIG_FILE)
    found = _model_config(theirs, folder / CONFIG_FILE)
    sidecar = folder / SIDECAR_FILE
    if sidecar.exists():
        config = read_config_file(sidecar).model_copy(update={"classes": ()})
        refuse_other_model(found, config.model, where=folder / CONFIG_FILE, by=SIDECAR_FILE)
    else:
        config = _foreign_config(folder, theirs, found)
    where = _tensor_files(folder)
    stored = {
        name: (file, shape, dtype)
        for file in sorted(set(where.values()))
        for name, shape, dtype in safetensors_entries(file)
    }
    prefix = _INSIDE if any(name.startswith(_INSIDE) for name in stored) else ""
    ignored = tuple(name for name in stored if name.startswith(_HEAD))
    plain = {name.removeprefix(prefix): kept for name, kept in stored.items() if name not in ignored}
    match_shapes(
        {name: shape for name, (_, shape, _) in plain.items()},
        expected_shapes(config.model, ("encoder", "predictor")),
        name="a Hugging Face folder",
        where=folder,
        fix="give a folder whose config.json and weights are of one model",
    )

    def read_theirs(name: str) -> Tensor:
        return read_safetensors(plain[name][0], prefix + name)

    ours = network_shapes(config.model, "encoder") | network_shapes(config.model, "predictor")
    entries: list[Entry] = [(name, tuple(shape), plain[parts_of(name)[0]][2]) for name, shape in ours.items()]
    return WeightSource(
        where=folder,
        config=config,
        entries=entries,
        read=lambda name: _join(name, ours[name], read_theirs),
        ignored=tuple(sorted({name.partition(".")[0] for name in ignored})),
        kind="a Hugging Face folder",
    )


def _join(name: str, shape: torch.Size, read: Callable[[str], Tensor]) -> Tensor:
    parts = parts_of(name)
    if parts == (_MASK_TOKENS,):
        return read(_MASK_TOKENS)[int(name.rpartition(".")[2])]
    return torch.cat([read(part) for part in parts]) if len(parts) > 1 else read(parts[0])


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor in a folder, by its stored name, including the head."""
    files = sorted(set(_tensor_files(folder).values()))
    return {name: file for file in files for name, _, _ in safetensors_entries(file)}


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor by the index; for a single file, only that file under its own name."""
    if (folder / WEIGHTS_FILE).is_file():
        return {WEIGHTS_FILE: folder / WEIGHTS_FILE}
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"no {WEIGHTS_FILE} and no {INDEX_FILE}", where=folder, fix="give a folder with the weights")
    index = read_json(folder / INDEX_FILE)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError("no weight_map in it", where=folder / INDEX_FILE)
    files = {name: folder / file for name, file in names.items()}
    for file in sorted(set(files.values())):
        if file.parent != folder or not file.is_file():
            raise UserError("no such file in the folder", where=file, fix=f"copy all files that {INDEX_FILE} names")
    return files


def _model_config(theirs: dict[str, Any], where: Path) -> ModelConfig:
    if theirs.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"model_type {theirs.get('model_type')!r}", where=where, fix=f"give a folder of model_type {MODEL_TYPE!r}"
        )
    get = {**DEFAULTS, **theirs}.__getitem__
    fixed = {"hidden_act": "gelu", "qkv_bias": True, "in_chans": 3, "layer_norm_eps": LAYER_NORM_EPS}
    for key, value in fixed.items():
        if get(key) != value:
            raise UserError(f"{get(key)!r}; this program has {value!r} only", where=f"{where}:{key}")
    patch = get("patch_size")
    if isinstance(patch, list) and patch and all(side == patch[0] for side in patch):
        patch = patch[0]
    if isinstance(patch, list):
        raise UserError(f"{patch}: patches are square here", where=f"{where}:patch_size")
    tree: dict[str, Any] = {network: {} for network in _SIZES}
    for network, keys in _SIZES.items():
        for ours, key in keys.items():
            tree[network][ours] = get(key)
    for network, (width, ratio) in _RATIOS.items():
        for key in (width, ratio):
            if isinstance(get(key), bool) or not isinstance(get(key), int | float) or not 0 < get(key) < 2**40:
                raise UserError(f"{get(key)!r}: not a size", where=f"{where}:{key}")
        tree[network]["mlp_hidden"] = int(get(width) * get(ratio))
    tree |= {"patch": patch, "tubelet": get("tubelet_size"), "rope": {"layout": "tiled"}}
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise _invalid(error, where) from None


# Our keys of a network -> theirs; and their keys of its width and of its MLP ratio.
_SIZES = {
    "encoder": {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"},
    "predictor": {
        "width": "pred_hidden_size",
        "depth": "pred_num_hidden_layers",
        "heads": "pred_num_attention_heads",
        "mask_tokens": "pred_num_mask_tokens",
    },
}
_RATIOS = {"encoder": ("hidden_size", "mlp_ratio"), "predictor": ("pred_hidden_size", "pred_mlp_ratio")}
_OTHERS = {"patch": "patch_size", "tubelet": "tubelet_size", "frames": "frames_per_clip", "size": "crop_size"}


def _invalid(error: ValidationError, where: Path) -> UserError:
    """Returns the error for an invalid value in their config, with their key."""
    first = error.errors()[0]
    ours = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    network, key = (ours[0], ours[-1]) if ours else ("", "")
    theirs = _RATIOS[network][1] if key == "mlp_hidden" else _SIZES.get(network, {}).get(key) or _OTHERS.get(network)
    given = first.get("input")
    shown = f", not {given!r}" if not isinstance(given, dict | list | tuple) else ""
    return UserError(f"{first['msg']}{shown}", where=f"{where}:{theirs or '.'.join(ours)}" if ours else where)


def _foreign_config(folder: Path, theirs: dict[str, Any], model: ModelConfig) -> ConsolidatedConfig:
    get = {**DEFAULTS, **theirs}.__getitem__
    processor = read_json(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).exists() else {}
    if not isinstance(processor, dict):
        raise UserError("not a JSON object", where=folder / PROCESSOR_FILE)
    clip = {"frames": get("frames_per_clip"), "size": (get("crop_size"), get("crop_size")), "fps": published_model.FPS}
    colours = {
        "mean": processor.get("image_mean", published_model.MEAN),
        "std": processor.get("image_std", published_model.STD),
    }
    about = {"model": model, "origin": str(folder.resolve())}
    try:
        return ConsolidatedConfig.model_validate(about | clip | colours)
    except ValidationError as error:
        if (key := str(error.errors()[0]["loc"][0])) in colours:
            raise UserError(
                f"{colours[key]!r}: not three numbers", where=f"{folder / PROCESSOR_FILE}:image_{key}"
            ) from None
        raise _invalid(error, folder / CONFIG_FILE) from None


# Defaults of VJEPA2Config, for keys that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "crop_size": 256,
    "frames_per_clip": 64,
    "tubelet_size": 2,
    "hidden_size": 1024,
    "in_chans": 3,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "pred_hidden_size": 384,
    "pred_num_attention_heads": 12,
    "pred_num_hidden_layers": 12,
    "pred_num_mask_tokens": 10,
    "pred_mlp_ratio": 4.0,
}


# -- writing -----------------------------------------------------------------------------------------


def refuse_inexpressible(config: ConsolidatedConfig, where: object) -> None:
    """Raises UserError, with the reason, where their model cannot compute what ours does."""
    model = config.model
    reasons = []
    if model.positions != "rope":
        reasons.append(f"model.positions is {model.positions}, theirs are rotary")
    elif model.rope.layout != "tiled":
        reasons.append(f"model.rope.layout is {model.rope.layout}, theirs is tiled")
    if model.positions == "rope" and model.rope.grid is not None:
        reasons.append("model.rope.grid rescales positions, theirs are never rescaled")
    if config.size[0] != config.size[1]:
        reasons.append(f"clips of {config.size[0]}×{config.size[1]} pixels, theirs are square")
    if "action_predictor" in config.networks:
        reasons.append("its predictor is an action-conditioned one, which theirs is not")
    elif "predictor" not in config.networks:
        reasons.append("there is no predictor, theirs has one")
    if reasons:
        raise UserError(
            "Hugging Face's VJEPA2Model cannot express this model: " + "; ".join(reasons),
            where=where,
            fix="use --to safetensors",
        )
    if config.assumed:
        raise UserError(
            "the clip that these weights are for is not said anywhere", where=where, fix="give --size 256 --frames 64"
        )


def write_huggingface(folder: Path, source: WeightSource, *, head: Head | None = None) -> None:
    """Writes all files of a folder that ``from_pretrained`` loads, one tensor in memory at a time.

    head: of VJEPA2ForVideoClassification, instead of VJEPA2Model
    """
    source.match()
    refuse_inexpressible(source.config, source.where)
    model = source.config.model
    entries, read = their_tensors(source)
    dtypes = {str(dtype).removeprefix("torch.") for _, _, dtype in entries}
    config = their_config(source.config) | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    architecture = "VJEPA2Model"
    if head is not None:
        entries, read = _with_head(entries, read, head.tensors)
        config |= head.config
        architecture = "VJEPA2ForVideoClassification"
    write_safetensors(folder / WEIGHTS_FILE, entries, read, {"format": "pt"})
    write_json(folder / CONFIG_FILE, {"architectures": [architecture]} | config)
    write_json(folder / PROCESSOR_FILE, _processor(source.config))
    write_json(folder / SIDECAR_FILE, source.config.model_dump(mode="json"))
    parameters = sum(math.prod(shape) for _, shape, _ in entries)
    about = None if head is None else head.card
    card = model_card(source.config, parameters=parameters, mask_token=mask_token(model), classifier=about)
    write_atomic(folder / CARD_FILE, card)


def _with_head(
    entries: list[Entry], read: Callable[[str], Tensor], head: dict[str, Tensor]
) -> tuple[list[Entry], Callable[[str], Tensor]]:
    """Returns their tensors and a head's; the network's names then have the prefix ``vjepa2``."""
    every = [(f"{_INSIDE}{name}", shape, dtype) for name, shape, dtype in entries]
    every += [(name, tuple(value.shape), value.dtype) for name, value in head.items()]
    return every, lambda name: head[name] if name in head else read(name.removeprefix(_INSIDE))


def mask_token(model: ModelConfig) -> int:
    """Returns the index of the mask token that their predictor uses."""
    return MASK_TOKEN % model.predictor.mask_tokens


def their_config(config: ConsolidatedConfig) -> dict[str, Any]:
    """VJEPA2Config's keys."""
    model = config.model
    encoder, predictor = model.encoder, model.predictor
    return {
        "model_type": MODEL_TYPE,
        "patch_size": model.patch,
        "crop_size": config.size[0],
        "image_size": config.size[0],
        "frames_per_clip": config.frames,
        "tubelet_size": model.tubelet,
        "in_chans": 3,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": _ratio(encoder.mlp_hidden, encoder.width),
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "pred_hidden_size": predictor.width,
        "pred_num_hidden_layers": predictor.depth,
        "pred_num_attention_heads": predictor.heads,
        "pred_mlp_ratio": _ratio(predictor.mlp_hidden, predictor.width),
        "pred_num_mask_tokens": predictor.mask_tokens,
        "pred_zero_init_mask_tokens": True,
    }


def _ratio(hidden: int, width: int) -> float:
    """Returns a ratio with ``int(width * ratio) == hidden``: they truncate, and 6144 / 1408 is not exact in float."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _processor(config: ConsolidatedConfig) -> dict[str, Any]:
    """Returns VJEPA2VideoProcessor's keys. It resizes the shorter side to 256/224 of the crop and ignores ``size``."""
    crop = config.size[0]
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(crop * 256 / 224)},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def their_tensors(source: WeightSource) -> tuple[list[Entry], Callable[[str], Tensor]]:
    """Returns entries under their names, and a function that reads the value of each."""
    dtypes = {name: dtype for name, _, dtype in source.entries}
    origin: dict[str, str] = {}
    for name in dtypes:
        origin |= dict.fromkeys(parts_of(name), name)
    shapes = expected_shapes(source.config.model, ("encoder", "predictor"))
    entries: list[Entry] = [(theirs, shape, dtypes[origin[theirs]]) for theirs, shape in shapes.items()]
    kept: dict[str, Tensor] = {}  # the last tensor read, because query, key and value are one tensor of ours

    def read(theirs: str) -> Tensor:
        if theirs == _MASK_TOKENS:
            count = source.config.model.predictor.mask_tokens
            return torch.stack([source.read(f"predictor.mask_tokens.{j}") for j in range(count)])
        name = origin[theirs]
        if name not in kept:
            kept.clear()
            kept[name] = source.read(name)
        parts = parts_of(name)
        return kept[name].chunk(len(parts))[parts.index(theirs)]

    return entries, read
