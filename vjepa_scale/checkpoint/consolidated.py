"""A consolidated checkpoint: what a user of a trained model loads.

    OUT/
      model.safetensors   encoder.*, predictor.*: canonical names; by default the target encoder's weights
      config.json         what they are: ConsolidatedConfig, the same JSON as in the file's metadata

The configuration travels inside model.safetensors too, so the bare file is enough.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vjepa_scale.checkpoint.safetensors_writer import Entry, write_safetensors
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import write_json
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.recipe.schema import ModelConfig, Section

FORMAT: Final = "vjepa_scale.consolidated"
VERSION: Final = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METADATA_KEY = "vjepa_scale"

Network = TypeVar("Network", bound=nn.Module)


class ConsolidatedConfig(Section):
    """What the tensors are.

    weights:       encoder.* is the EMA target encoder or the context encoder
    stage, step:   where in training they come from: completed steps on the global step
    mean, std:     per channel, of pixels in 0 … 1; the encoder expects (pixel − mean) / std
    frames, size, fps: clip of the last phase: T, (H, W) in pixels, frames per second
    recipe:        the resolved recipe of the run
    """

    format: Literal["vjepa_scale.consolidated"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelConfig
    weights: Literal["target", "context"]
    stage: str
    step: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames: int
    size: tuple[int, int]
    fps: float
    recipe: dict[str, Any]


def write_consolidated(
    folder: Path, config: ConsolidatedConfig, entries: Iterable[Entry], read: Callable[[str], Tensor]
) -> None:
    """Write both files of a consolidated checkpoint, one tensor in memory at a time.

    entries, read: as write_safetensors takes them; names start with ``encoder.`` or ``predictor.``
    """
    content = config.model_dump(mode="json")
    # transformers and other readers of safetensors look for format: pt.
    write_safetensors(folder / WEIGHTS_FILE, entries, read, {"format": "pt", METADATA_KEY: json.dumps(content)})
    write_json(folder / CONFIG_FILE, content)


def read_config(path: str | Path) -> ConsolidatedConfig:
    """The configuration inside a consolidated checkpoint (folder or file): geometry, normalisation, recipe."""
    return _read_config(weights_file(Path(path)))


def load_encoder(path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The trained encoder of a consolidated checkpoint, float32, in eval mode.

    path: a folder written by tools/consolidate.py, or its model.safetensors

    The encoder maps normalised clips [B, 3, T, H, W] to tokens [B, N, D]; ``read_config(path)`` says the
    mean and std, and the clip length, size and frame rate that it was trained on last.
    Raises UserError where the path is something else or the tensors do not match the model, all of them.
    """
    return _load(Path(path), "encoder", Encoder, torch.device(device))


def load_predictor(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """The trained predictor of a consolidated checkpoint, float32, in eval mode. As load_encoder."""
    return _load(Path(path), "predictor", Predictor, torch.device(device))


def _load(path: Path, name: str, build: Callable[[ModelConfig], Network], device: torch.device) -> Network:
    file = weights_file(path)
    config = _read_config(file)
    with torch.device("meta"):
        network = build(config.model)
    prefix = f"{name}."
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt", device=str(device)) as archive:
        for key in archive.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key.startswith(prefix):
                tensors[key.removeprefix(prefix)] = archive.get_tensor(key).float()
    _check_match(network, tensors, name, file)
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def _check_match(network: nn.Module, tensors: dict[str, Tensor], name: str, file: Path) -> None:
    expected = {key: value.shape for key, value in network.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    reshaped = sorted(key for key in expected.keys() & tensors.keys() if expected[key] != tensors[key].shape)
    if not (missing or unexpected or reshaped):
        return
    matched = len(expected) - len(missing) - len(reshaped)
    first = [
        *(f"{name}.{key} is missing" for key in missing[:2]),
        *(f"{name}.{key} is unexpected" for key in unexpected[:2]),
        *(f"{name}.{key} is {list(tensors[key].shape)}, not {list(expected[key])}" for key in reshaped[:2]),
    ]
    raise UserError(
        f"{name}: {matched} tensors match, {len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(reshaped)} of another shape: {'; '.join(first)}",
        where=file,
        fix="consolidate the checkpoint again with tools/consolidate.py",
    )


def _read_config(file: Path) -> ConsolidatedConfig:
    with _open(file) as archive:
        metadata = archive.metadata() or {}
    if METADATA_KEY not in metadata:
        raise UserError(
            f"a safetensors file, but not of this project: no {METADATA_KEY!r} in its metadata",
            where=file,
            fix="give a folder or file written by tools/consolidate.py",
        )
    content = json.loads(metadata[METADATA_KEY])
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(
            f"format {content.get('format')!r} {content.get('version')!r}; this program reads {FORMAT!r} {VERSION}",
            where=file,
            fix="consolidate the run again with this version",
        )
    try:
        return ConsolidatedConfig.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(problem["msg"], where=f"{file}:{METADATA_KEY}.{key}") from None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"not a whole safetensors file: {error}",
            where=file,
            fix="consolidate the checkpoint again with tools/consolidate.py",
        ) from None


def weights_file(path: Path) -> Path:
    """The safetensors file of a consolidated checkpoint; a UserError says what the path is instead."""
    consolidate = f"run tools/consolidate.py {path} --to safetensors --out DIR first, and give DIR"
    if not path.exists():
        raise UserError("no such file or folder", where=path, fix="a folder written by tools/consolidate.py")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                "not a safetensors file", where=path, fix="give a folder or file written by tools/consolidate.py"
            )
        return path
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    if (path / ".metadata").exists() or next(path.glob("**/*.distcp"), None) or path.name.startswith("step_"):
        raise UserError("a sharded training checkpoint", where=path, fix=consolidate)
    if next(path.glob("**/checkpoints"), None) or next(path.glob("**/recipe.yaml"), None) or path.name == "checkpoints":
        raise UserError("a run folder", where=path, fix=consolidate)
    raise UserError(f"no {WEIGHTS_FILE} in this folder", where=path, fix="a folder written by tools/consolidate.py")
