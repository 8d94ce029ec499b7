"""Weights of any format, into files that other tools load."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vjepa_scale.checkpoint.formats import huggingface, native, published
from vjepa_scale.checkpoint.formats.model_card import predicts_as
from vjepa_scale.checkpoint.formats.native import find_checkpoint
from vjepa_scale.checkpoint.formats.open import open_weights
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, WeightSource, read_config_file
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.folders import content_of, replaced_folder

__all__ = ["FORMATS", "Format", "consolidate", "find_checkpoint", "result_config"]

Format = Literal["safetensors", "huggingface", "published"]

# The files of each format's result.
FORMATS: dict[Format, tuple[str, ...]] = {
    "safetensors": (native.WEIGHTS_FILE, native.CONFIG_FILE),
    "huggingface": huggingface.FILES,
    "published": (published.WEIGHTS_FILE, published.CONFIG_FILE),
}


def consolidate(
    source: Path,
    out: Path,
    *,
    to: Format = "safetensors",
    weights: Literal["target", "context"] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    model: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    encoder_only: bool = False,
    check: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write ``out``, whole or not at all; returns it.

    source:  what open_weights takes: a run, a checkpoint, a published file, a Hugging Face folder …
    out:     a new or empty folder, or one that holds this same result, which is written again
    weights: which encoder, where there are two; default: the target encoder, and both for ``published``
    dtype:   what tensors are rounded to; default: as they are
    model:   for a published file of others, which does not say it
    frames, size: of the clips these weights are for, where the source does not say it
    check:   run a Hugging Face result beside ours, where transformers is installed
    say:     gets a line for everything the user should know

    Needs no process group. Ours and Hugging Face's are written with at most one whole tensor and one shard of it in
    memory; a published file is one dict, all of it in memory. Raises UserError where there is nothing good to
    read, where the format cannot express it, where the check fails, or ``out`` holds something else.
    """
    opened = open_weights(
        source,
        model=model,
        weights=weights or ("both" if to == "published" else None),
        networks=("encoder",) if encoder_only else None,
    )
    if opened.config.origin is not None:
        say(f"{opened.where}: {opened.match().sentence()}")
    if dtype is not None:
        opened = opened.rounded(dtype)
    opened = _with_clip(opened, frames, size)
    if to == "huggingface":
        huggingface.refuse_inexpressible(opened.config, opened.where)
    _refuse_other_content(out, opened.config, to)
    with replaced_folder(out) as folder:
        if to == "safetensors":
            native.write_consolidated(folder, opened.config, opened.entries, opened.read)
        elif to == "published":
            published.write_published(folder, opened)
        else:
            huggingface.write_huggingface(folder, opened)
            token = huggingface.mask_token(opened.config.model)
            say(f"Hugging Face's predictor uses mask token {token}. {predicts_as(opened.config, token)}")
            _check(folder, opened, check, say)
    return out


def _with_clip(source: WeightSource, frames: int | None, size: int | None) -> WeightSource:
    """The same weights, with the clip that the user gives where theirs is not known."""
    config = source.config
    given: dict[str, Any] = {}
    if frames is not None:
        given["frames"] = frames
    if size is not None:
        given["size"] = (size, size)
    for key, value in given.items():
        known = getattr(config, key)
        if key not in config.assumed and known != value:
            raise UserError(f"these weights are for {key} {known}", where=f"--{key}", fix="leave it out")
    assumed = tuple(key for key in config.assumed if key not in given)
    model = config.model
    if "size" in config.assumed and size is not None and "action_predictor" in config.networks:
        # The published network takes the grid of its own pictures for the pretraining's: that was assumed, too.
        action_predictor = model.action_predictor.model_copy(
            update={"grid": (size // model.patch, size // model.patch)}
        )
        model = model.model_copy(update={"action_predictor": action_predictor})
    return replace(source, config=config.model_copy(update={**given, "model": model, "assumed": assumed}))


def _check(folder: Path, source: WeightSource, wanted: bool, say: Callable[[str], None]) -> None:
    if not wanted:
        say("not checked against transformers: --no-check")
    elif importlib.util.find_spec("transformers") is None:
        say("not checked: transformers is not installed (pip install transformers, then run this again)")
    else:
        from vjepa_scale.checkpoint.formats.huggingface_check import check_against_transformers

        say(check_against_transformers(folder, source))


# -- the folder that is written ----------------------------------------------------------------------


def result_config(folder: Path, to: Format) -> ConsolidatedConfig:
    """The configuration of a result of this program. Raises UserError where there is none of this format."""
    if to == "safetensors":
        return native.read_native_config(folder / native.WEIGHTS_FILE)
    return read_config_file(folder / {"published": published.CONFIG_FILE, "huggingface": huggingface.SIDECAR_FILE}[to])


def _refuse_other_content(out: Path, config: ConsolidatedConfig, to: Format) -> None:
    """Raise UserError unless ``out`` is new, empty or holds the result that ``config`` describes."""
    content = content_of(out)
    if not content:
        return
    fix = "give another --out, or remove this one"
    for other, files in FORMATS.items():
        # A Hugging Face folder has files of the same names as ours, and one more that says so.
        if other == "safetensors" and huggingface.SIDECAR_FILE in content:
            continue
        try:
            found = result_config(out, other)
        except (UserError, OSError):
            continue
        if other != to:
            raise UserError(f"holds {found.title()} in the format {other}", where=out, fix=fix)
        if found != config:
            before, now = found.title(), config.title()
            raise UserError(
                f"holds {before}" + (f", not {now}" if before != now else " of another run"), where=out, fix=fix
            )
        if strangers := sorted(set(content) - set(files)):
            raise UserError(f"holds this result and also {', '.join(strangers[:3])}", where=out, fix=fix)
        return
    raise UserError("not empty, and not a result of this program", where=out, fix=fix)
