"""Formats of weights: ours, the published code's and Hugging Face's, read into and written from one neutral type.

    open_weights(path)  →  WeightSource  →  safetensors | huggingface | published

``source`` has the neutral type; ``open_weights`` detects the format of a path; ``native``, ``published`` (with
``published_model``) and ``huggingface`` implement one format each. docs/formats.md is for users.
"""

from collections.abc import Iterable
from pathlib import Path

from vjepa_scale.checkpoint.formats import huggingface, native, published
from vjepa_scale.checkpoint.formats.published import published_optimizer
from vjepa_scale.checkpoint.formats.published_model import named_model, refuse_other_heads
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, Match, Weights, WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.networks import Network, refuse_other_model
from vjepa_scale.recipe.schema import ModelConfig

__all__ = ["ConsolidatedConfig", "Match", "WeightSource", "open_weights", "published_optimizer"]


_KINDS = "a run, stage or checkpoint folder, a consolidated folder or file, a published .pt, a Hugging Face folder"


def open_weights(
    path: str | Path,
    *,
    model: str | ModelConfig | None = None,
    weights: Weights | None = None,
    networks: Iterable[Network] | None = None,
) -> WeightSource:
    """Opens weights of any format; tensors are read on demand.

    path:     a run, a stage or a checkpoint of ours (opens and verifies the last checkpoint; of a run, that of the
              stage selected by ``networks``, see ``find_checkpoint``), a consolidated folder or file, a published
              ``.pt``, a Hugging Face folder
    model:    the expected model; required for a published file of others, see ``open_published``
    weights:  which encoder becomes encoder.*; ``both``: the context encoder, with target_encoder.* where there are two;
              None: the target encoder where there are two, else the only one
    networks: the networks to open; None: all

    Raises UserError where the path is something else, or lacks what is requested.
    """
    path, wanted = Path(path), None if networks is None else tuple(networks)
    source = _open(path, model, weights, wanted)
    if wanted is not None:
        for network in wanted:
            if network not in source.networks():
                raise UserError(f"it holds no {network}", where=path, fix="give weights with one")
        source = source.only((*wanted, "target_encoder") if "encoder" in wanted else wanted)
    return source


def _open(
    path: Path, model: str | ModelConfig | None, weights: Weights | None, networks: tuple[Network, ...] | None
) -> WeightSource:
    if not path.exists():
        raise UserError("no such file or folder", where=path, fix=f"give {_KINDS}")
    if path.is_dir() and (path / published.WEIGHTS_FILE).is_file():
        path = path / published.WEIGHTS_FILE
    if path.is_file() and path.suffix != ".safetensors":
        return published.open_published(path, model=model, weights=weights, networks=networks)

    named = named_model(model) if isinstance(model, str) and "=" not in model else None
    wanted = model if isinstance(model, ModelConfig) else None
    if path.is_file():
        source = native.open_consolidated(path)
    elif huggingface.is_huggingface(path):
        source = huggingface.open_huggingface(path)
    elif (path / native.WEIGHTS_FILE).is_file():
        source = native.open_consolidated(path / native.WEIGHTS_FILE)
    else:
        source = native.open_checkpoint(native.find_checkpoint(path, networks=networks), weights=weights or "target")
    there: tuple[Network, ...] = networks or source.config.networks
    if wanted is not None:
        refuse_other_model(source.config.model, wanted, where=path, networks=there)
    if isinstance(model, str) and "=" in model:
        refuse_other_heads(source.config, model, where=path)
    if named is not None:
        sizes = {key: getattr(source.config.model, key) for key in ("patch", "tubelet", "positions", "rope", "sincos")}
        refuse_other_model(
            source.config.model, named.model_copy(update=sizes), where=path, by=str(model), networks=["encoder"]
        )
    if weights in ("target", "context") and source.config.weights not in (weights, None):
        raise UserError(
            f"it holds the {source.config.weights} encoder only", where=path, fix=f"ask for {source.config.weights}"
        )
    return source
