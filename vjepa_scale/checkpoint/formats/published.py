"""The published code's checkpoint: one ``.pt`` file with a dict (docs/method.md 11).

    encoder, predictor, target_encoder   state dicts; names are canonical behind ``module.backbone.`` or ``module.``;
                                         ``predictor`` may be an action-conditioned one
    opt, scaler                          the optimiser's state, and the loss scaler's
    epoch, loss, batch_size, world_size, lr

Such a file contains neither the number of attention heads (width 1408 exists with 16 and with 22) nor the kind of
positions. Our files come with FILE.json, a ConsolidatedConfig that contains both; for a file of others the caller must
give them (``published_model``). The tables of V-JEPA 2's released weights are always tiled (docs/method.md 3).
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats.published_model import is_action_predictor, published_config
from vjepa_scale.checkpoint.formats.source import (
    NETWORKS,
    ConsolidatedConfig,
    Network,
    Weights,
    WeightSource,
    network_shapes,
    read_config_file,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import write_json, writing
from vjepa_scale.model.positions import Positions
from vjepa_scale.recipe.schema import ModelConfig

WEIGHTS_FILE = "model.pt"
CONFIG_FILE = WEIGHTS_FILE + ".json"
PREFIX = "module.backbone."
# Prefix in files with an action-conditioned predictor: that training wraps its networks once, not twice.
ACTION_PREFIX = "module."

# Fixed tables that released files contain although their models use rotary positions.
_TABLES = {"encoder": "pos_embed", "target_encoder": "pos_embed", "predictor": "predictor_pos_embed"}
_NETWORKS = tuple(_TABLES)
_BESIDE = ("opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
_V21 = re.compile(r"norms_block\.|mod_embed|patch_embed_img|patch_embed_image")


# -- reading -----------------------------------------------------------------------------------------


def open_published(
    path: Path,
    *,
    model: str | ModelConfig | None = None,
    weights: Weights | None = None,
    networks: Iterable[Network] | None = None,
) -> WeightSource:
    """Opens a ``.pt`` file, mapped into memory.

    model:    what the file does not contain: a name from ENCODERS, ``heads=22`` or ``heads=22,predictor_heads=12``, or
              a whole ModelConfig, which the file must match; not needed where FILE.json exists
    networks: the networks to read; None: all

    Raises UserError where the file is no such file, where a model is needed and not given or does not match the file,
    and for weights of V-JEPA 2.1, whose networks differ.
    """
    content = _load(path)
    states = {name: _named(content[name], path, name) for name in _NETWORKS if name in content}
    _refuse_unknown(content, states, path)
    beside = path.with_name(path.name + ".json")
    stored = read_config_file(beside) if beside.exists() else None
    taken, encoder_is = _choose(states, stored, weights, path)
    if networks is not None:
        taken = {ours: name for ours, name in taken.items() if ours.removeprefix("target_") in set(networks)}
        for network in networks:
            if network not in taken:
                raise UserError(f"it holds no {network}", where=path, fix=_instead(network, states))

    config = published_config(stored, {ours: states[theirs] for ours, theirs in taken.items()}, states, model, path)
    config = config.model_copy(update={"weights": encoder_is, "networks": tuple(n for n in NETWORKS if n in taken)})
    tensors, ignored = {}, []
    for ours, theirs in taken.items():
        for name, tensor in states[theirs].items():
            if name == _TABLES[theirs]:
                _check_table(config.model, ours, tensor, path)
                ignored.append(f"{ours}.{name}")
            else:
                tensors[f"{ours}.{name}"] = tensor
    source = WeightSource(
        where=path,
        config=config,
        entries=[(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()],
        read=tensors.__getitem__,
        ignored=tuple(ignored),
        kind="a published checkpoint",
    )
    source.match()
    return source


def _instead(network: Network, states: dict[str, dict[str, Tensor]]) -> str:
    """Returns the fix where a network is not in a file."""
    if network == "predictor" and is_action_predictor(states.get("predictor", {})):
        return "its predictor is an action-conditioned one: vjepa_scale.load_world_model loads it, docs/planning.md"
    return "give a file with one"


def _load(path: Path) -> dict[str, Any]:
    """Loads the dict without running code from the file."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # PyTorch's format before 1.6
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        found = re.search(r"GLOBAL (\S+)", reason)
        raise UserError(
            f"it names {found[1]}, code that loading it would run: refused, and nothing was run"
            if found
            else "not a PyTorch checkpoint that can be read without running code from it",
            where=path,
            fix="give a file with tensors and plain values only",
        ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (bytes that are no pickle fail in any way, even with IndexError)
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise UserError(f"not a whole PyTorch checkpoint: {reason}", where=path, fix="copy it again") from None
    if not isinstance(content, dict) or not any(name in content for name in ("encoder", "target_encoder")):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"no encoder in this file ({keys})", where=path, fix="give a dict with encoder, predictor, target_encoder"
        )
    return content


def _named(state: Any, path: Path, network: str) -> dict[str, Tensor]:
    """Returns a state dict under canonical names, in its order."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError("not a dict of tensors", where=f"{path}:{network}")
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix("module.").removeprefix("backbone.")
        if plain in out:
            raise UserError(f"{plain} comes twice, under two prefixes", where=f"{path}:{network}")
        out[plain] = tensor
    return out


def _refuse_unknown(content: dict[str, Any], states: dict[str, dict[str, Tensor]], path: Path) -> None:
    for name, state in states.items():
        if newer := next((key for key in state if _V21.search(key)), None):
            raise UserError(
                f"{name}.{newer}: weights of V-JEPA 2.1, whose networks differ",
                where=path,
                fix="give V-JEPA 2 weights: 2.1 is not supported yet",
            )
    for name, value in content.items():
        if name in (*_NETWORKS, *_BESIDE):
            continue
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
            raise UserError(f"unknown weights {name!r}", where=path, fix="remove them from the file")


def _choose(
    states: dict[str, dict[str, Tensor]], stored: ConsolidatedConfig | None, weights: Weights | None, path: Path
) -> tuple[dict[str, str], Weights | None]:
    """Returns our name of each of the file's networks, and which encoder encoder.* is."""
    single = stored is not None and stored.weights in ("target", "context")
    action = is_action_predictor(states.get("predictor", {}))
    named: Weights | None
    if single:
        assert stored is not None
        if weights in ("target", "context") and weights != stored.weights:
            raise UserError(f"it holds the {stored.weights} encoder only", where=path, fix=f"ask for {stored.weights}")
        choice, named = {"encoder": "encoder"}, stored.weights
    elif weights == "both":
        choice = {"encoder": "encoder", "target_encoder": "target_encoder"}
        choice = {ours: theirs for ours, theirs in choice.items() if theirs in states}
        if "encoder" not in choice:
            choice = {"encoder": "target_encoder"}
        named = "both" if len(choice) == 2 else "target" if "target_encoder" in choice.values() else None
    elif weights == "context":
        choice, named = {"encoder": "encoder"}, "context"
    elif "target_encoder" in states or (weights == "target" and not action):
        choice, named = {"encoder": "target_encoder"}, "target"
    else:
        # One encoder of unknown kind. With an action predictor it is frozen, so it counts as a target encoder.
        choice, named = {"encoder": "encoder"}, weights
    if absent := [theirs for theirs in choice.values() if theirs not in states]:
        other = "context" if absent == ["target_encoder"] else "target"
        raise UserError(f"it holds no {absent[0]}", where=path, fix=f"ask for the {other} encoder")
    if "predictor" in states:
        choice["action_predictor" if action else "predictor"] = "predictor"
    return choice, named


def _check_table(model: ModelConfig, network: str, stored: Tensor, path: Path) -> None:
    """Raises UserError where the file's table of added positions differs from our model's."""
    if model.positions == "rope":
        return
    size = model.predictor if network == "predictor" else model.encoder
    frames, (height, width) = model.sincos.frames, model.sincos.size
    grid = (max(frames // model.tubelet, 1), height // model.patch, width // model.patch)
    positions = Positions(model, width=size.width, heads=size.heads)
    ours = positions.add(torch.zeros(1, grid[0] * grid[1] * grid[2], size.width), None, grid)
    if stored.shape != ours.shape or not torch.allclose(stored.float(), ours, atol=1e-5, rtol=0):
        raise UserError(
            f"{network}: its table of positions is not that of model.sincos ({list(stored.shape)}, {list(ours.shape)})",
            where=path,
            fix="set model.sincos to the frames, size and uniform_power of the file's training",
        )


# -- its optimiser -----------------------------------------------------------------------------------


def published_optimizer(path: str | Path, *, model: str | ModelConfig | None = None) -> dict[str, dict[str, Tensor]]:
    """Returns AdamW's state in a published file: canonical name → exp_avg, exp_avg_sq, step.

    The file numbers parameters through four groups: encoder with weight decay, predictor with, encoder without,
    predictor without; each in the order of ``named_parameters``, tables of positions included. A mask token that was
    never trained has no state in the file, and zeros here. Tensors are mapped from the file.

    model: as for open_weights. Raises UserError where the file has no such state, or it does not match the weights.
    """
    path = Path(path)
    networks: tuple[Network, ...] = ("encoder", "predictor")
    source = open_published(path, model=model, weights="both", networks=networks)
    content = _load(path)
    opt = content.get("opt")
    if not isinstance(opt, Mapping) or not isinstance(opt.get("state"), Mapping) or "param_groups" not in opt:
        raise UserError(
            "it holds no optimiser state (opt)", where=path, fix="start from its weights only, with init_from"
        )
    if "encoder" not in content:
        raise UserError("its optimiser's state is of an encoder that it does not hold", where=path, fix="use init_from")
    where = f"{path}:opt"
    names = _parameter_groups(content, source.config.model, path)
    try:
        numbers = [[int(number) for number in group["params"]] for group in opt["param_groups"]]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError("its param_groups are not those of an optimiser", where=where) from None
    counts, expected = [len(group) for group in numbers], [len(group) for group in names]
    if counts != expected:
        raise UserError(
            f"groups of {counts} parameters, the networks have {expected}: encoder and predictor with weight decay, "
            "then without",
            where=where,
            fix="give the file of a run whose optimiser is the published one",
        )
    out: dict[str, dict[str, Tensor]] = {}
    for group, indices in zip(names, numbers, strict=True):
        for (name, shape), index in zip(group, indices, strict=True):
            if not name.endswith("pos_embed"):
                out[name] = _parameter_state(opt["state"].get(index), name, shape, where)
    return out


def _parameter_groups(content: dict[str, Any], model: ModelConfig, path: Path) -> list[list[tuple[str, torch.Size]]]:
    """Returns (canonical name, shape) of every parameter, in the published code's four groups and order."""
    ordered: dict[str, list[tuple[str, torch.Size]]] = {}
    for network in ("encoder", "predictor"):
        state = _named(content[network], path, network)
        table = _TABLES[network]
        # A module's own parameters come before its children's: the table first.
        own = [(f"{network}.{table}", state[table].shape)] if table in state else []
        ordered[network] = own + list(network_shapes(model, network).items())
        stored = [f"{network}.{name}" for name in state]
        if stored != [name for name, _ in ordered[network]]:
            raise UserError("weights in another order than the published code's", where=f"{path}:{network}")
    decayed = {
        network: [bool("bias" not in name and len(shape) != 1) for name, shape in every]
        for network, every in ordered.items()
    }
    return [
        [entry for entry, is_decayed in zip(ordered[network], decayed[network], strict=True) if is_decayed == wanted]
        for wanted in (True, False)
        for network in ("encoder", "predictor")
    ]


def _parameter_state(state: Any, name: str, shape: torch.Size, where: str) -> dict[str, Tensor]:
    moments = ("exp_avg", "exp_avg_sq")
    if state is None and ".mask_tokens." in name:
        return {key: torch.zeros(shape) for key in moments} | {"step": torch.zeros(())}
    if not isinstance(state, Mapping) or not {*moments, "step"} <= state.keys():
        raise UserError(f"no AdamW state for {name}", where=where, fix="start from its weights only, with init_from")
    for key in moments:
        if not isinstance(state[key], Tensor) or state[key].shape != shape:
            found = list(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
            raise UserError(f"{key} of {name} is {found}, not {list(shape)}", where=where)
    step = state["step"]
    if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise UserError(f"step of {name} is no number", where=where)
    return {key: state[key] for key in moments} | {"step": torch.as_tensor(step, dtype=torch.float32)}


# -- writing -----------------------------------------------------------------------------------------


def write_published(folder: Path, source: WeightSource) -> None:
    """Writes model.pt and model.pt.json. Holds the whole model in memory, because ``torch.save`` takes a dict.

    A source with one encoder is written under both names, ``encoder`` and ``target_encoder``, stored once.
    The optimiser is not written: ``opt`` and ``scaler`` are None.
    """
    source.match()
    there = source.networks()
    prefix = ACTION_PREFIX if "action_predictor" in there else PREFIX
    states: dict[str, dict[str, Tensor]] = {}
    for network in ("encoder", "predictor", "action_predictor", "target_encoder"):
        if network in there:
            names = network_shapes(source.config.model, network)
            states[network.removeprefix("action_")] = {
                prefix + name.removeprefix(f"{network}."): source.read(name).contiguous() for name in names
            }
    states.setdefault("target_encoder", states["encoder"])
    beside = {
        "opt": None,
        "scaler": None,
        "epoch": 0,
        "loss": float("nan"),
        "batch_size": 0,
        "world_size": 1,
        "lr": 0.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / WEIGHTS_FILE), open(folder / WEIGHTS_FILE, "wb") as file:
        torch.save({**states, **beside}, file)
    write_json(folder / CONFIG_FILE, source.config.model_dump(mode="json"))
