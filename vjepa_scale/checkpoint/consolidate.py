"""Converts weights of any format to files that other tools load.

A Hugging Face export is run and compared with our networks: where outputs differ, the export is wrong.
"""

import importlib.util
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats import huggingface, native, open_weights, published
from vjepa_scale.checkpoint.formats.huggingface import Head, mask_token, write_huggingface
from vjepa_scale.checkpoint.formats.model_card import ClassifierCard, predicts_as
from vjepa_scale.checkpoint.formats.native import find_checkpoint
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, WeightSource, match_shapes, read_config_file
from vjepa_scale.checkpoint.load import TrainedProbe, load_probe
from vjepa_scale.checkpoint.manifest import is_checkpoint
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import content_of, read_json, replaced_folder
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.blocks import LAYER_NORM_EPS, Attention
from vjepa_scale.model.probe import AttentiveProbe, CrossAttention
from vjepa_scale.recipe.stage import CHECKPOINTS, EVALUATION

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
    """Writes ``out`` completely or not at all; returns it.

    source:  as for open_weights: a run, a checkpoint, a published file, a Hugging Face folder …
    out:     a new or empty folder, or one that holds this same result, which is then overwritten
    weights: which encoder, where there are two; default: the target encoder, and both for ``published``
    dtype:   type that tensors are rounded to; default: unchanged
    model:   for a published file of others, which does not contain it
    frames, size: of the clips that these weights are for, where the source does not contain them
    check:   run a Hugging Face result and compare it with ours, where transformers is installed
    say:     receives lines for the user

    Needs no process group. Our format and Hugging Face's are written with at most one whole tensor and one shard of it
    in memory; a published file is one dict, held in memory as a whole. Raises UserError where the source cannot be
    read, where the format cannot express it, where the check fails, or where ``out`` holds something else.
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
    """Returns the same weights, with the user's clip geometry where the source has none."""
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
        # The published network uses its own pictures' grid as the pretraining grid, so that was assumed, too.
        action_predictor = model.action_predictor.model_copy(
            update={"grid": (size // model.patch, size // model.patch)}
        )
        model = model.model_copy(update={"action_predictor": action_predictor})
    return replace(source, config=config.model_copy(update={**given, "model": model, "assumed": assumed}))


def _check(
    folder: Path,
    source: WeightSource,
    wanted: bool,
    say: Callable[[str], None],
    probe: AttentiveProbe | None = None,
) -> None:
    if not wanted:
        say("not checked against transformers: --no-check")
    elif importlib.util.find_spec("transformers") is None:
        say("not checked: transformers is not installed (pip install 'vjepa_scale[huggingface]', then run this again)")
    else:
        say(check_against_transformers(folder, source, probe))


# -- the folder that is written ----------------------------------------------------------------------


def result_config(folder: Path, to: Format) -> ConsolidatedConfig:
    """Returns the configuration of a result of this program. Raises UserError where there is none of this format."""
    if to == "safetensors":
        return native.read_native_config(folder / native.WEIGHTS_FILE)
    return read_config_file(folder / {"published": published.CONFIG_FILE, "huggingface": huggingface.SIDECAR_FILE}[to])


def _refuse_other_content(out: Path, config: ConsolidatedConfig, to: Format) -> None:
    """Raises UserError unless ``out`` is new, empty or holds the result that ``config`` describes."""
    content = content_of(out)
    if not content:
        return
    fix = "give another --out, or remove this one"
    for other, files in FORMATS.items():
        # A Hugging Face folder has the same file names as ours, and one more file that identifies it.
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
        if extra := sorted(set(content) - set(files)):
            raise UserError(f"holds this result and also {', '.join(extra[:3])}", where=out, fix=fix)
        return
    raise UserError("not empty, and not a result of this program", where=out, fix=fix)


# -- the check against transformers ----------------------------------------------------------------

# Largest difference over largest output, float32, which rounding makes 1e-6. Where attention is selective, a wrong
# number of heads or layout of RoPE makes 1e-3. Where it is nearly uniform, as with fresh weights, places hardly count:
# a wrong layout made 2.4e-5 in a small network, which is why the check makes attention selective.
LIMIT = 1e-4
# Positions in time are treated as those in height and width, so two time steps suffice for any clip length.
TIME_STEPS = 2


@torch.no_grad()
def check_against_transformers(folder: Path, source: WeightSource, probe: AttentiveProbe | None = None) -> str:
    """Compares features and predictions of a random clip, float32 on the CPU; returns a sentence with the differences.

    source: the weights that ``folder`` was written from. Mask tokens are used unchanged; both sides get the same
            larger weights of queries and keys where these are small.
    probe:  of a classifier, whose logits are compared too
    Holds both models in memory. Raises UserError where they differ by more than LIMIT, or transformers cannot load it.
    """
    # Imported here, because only this check needs the package, which may be missing.
    from transformers import VJEPA2ForVideoClassification, VJEPA2Model
    from transformers.utils import logging

    config = source.config
    logging.disable_progress_bar()
    kind: Any = VJEPA2Model if probe is None else VJEPA2ForVideoClassification
    try:
        theirs, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load the result: {error}", where=source.where) from None
    if extra := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"transformers finds {extra[:3]} missing or unexpected in the result", where=source.where)
    theirs.eval()
    their_network = theirs if probe is None else theirs.vjepa2
    with torch.device("meta"):
        encoder, predictor = Encoder(config.model), Predictor(config.model)
    for prefix, network in (("encoder.", encoder), ("predictor.", predictor)):
        names = [name for name, _, _ in source.entries if name.startswith(prefix)]
        state = {name.removeprefix(prefix): source.read(name).float() for name in names}
        network.load_state_dict(state, assign=True)
        layers = getattr(their_network, prefix.removesuffix(".")).layer
        attentions = [layer for layer in network.modules() if isinstance(layer, Attention)]
        for ours, layer in zip(attentions, layers, strict=True):
            _make_selective(ours, layer.attention)

    generator = torch.Generator().manual_seed(0)
    height, width = config.size
    clips = torch.randn(1, 3, TIME_STEPS * config.model.tubelet, height, width, generator=generator)
    grid = (TIME_STEPS, height // config.model.patch, width // config.model.patch)
    order = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator)[None]
    context, target = order[:, : order.shape[1] // 3], order[:, order.shape[1] // 2 :]
    output = their_network(clips.transpose(1, 2), context_mask=[context], target_mask=[target])
    tokens = encoder(clips)
    kept = tokens.gather(1, context[..., None].expand(-1, -1, tokens.shape[-1]))
    predictions = predictor(kept, context, target, grid, mask_token=mask_token(config.model))
    differences = {
        "features": _difference(tokens, output.last_hidden_state),
        "predictions": _difference(predictions, output.predictor_output.last_hidden_state),
    }
    if probe is not None:
        stored = deepcopy(probe).to(source.entries[0][2]).float()  # the type that its tensors were rounded to
        differences["logits"] = _difference(stored(tokens), theirs(clips.transpose(1, 2)).logits)
    text = ", ".join(f"{name} differ by {value:.1e}" for name, value in differences.items())
    if not all(value <= LIMIT for value in differences.values()):  # also where it is not a number
        raise UserError(
            f"transformers computes something else: {text} of the largest output (at most {LIMIT:g})",
            where=source.where,
            fix="report this; --no-check writes it all the same",
        )
    return f"checked against transformers: {text} of the largest output, float32"


def _make_selective(ours: Attention, theirs: Any) -> None:
    """Scale queries and keys of one layer on both sides, so that scores of normalised tokens vary by 4 or more."""
    width = ours.qkv.in_features
    weight = ours.qkv.weight[: 2 * width]
    factor = max(1.0, 2 / (width * float(weight.square().mean())) ** 0.5)
    # A copy: what is read from a file may be a view of it.
    rows = torch.ones(3 * width, 1)
    rows[: 2 * width] = factor
    ours.qkv.weight = nn.Parameter(ours.qkv.weight * rows)
    ours.qkv.bias = nn.Parameter(ours.qkv.bias * rows[:, 0])
    for part in (theirs.query, theirs.key):
        part.weight *= factor
        part.bias *= factor


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -- a trained probe as Hugging Face's VJEPA2ForVideoClassification (docs/method.md 10) ------------


def export_classifier(
    folder: Path, out: Path, *, check: bool = False, say: Callable[[str], None] = lambda line: None
) -> TrainedProbe:
    """Writes the best probe of a stage's folder, and the model that it was trained on, as VJEPA2ForVideoClassification.

    Reads the model, including the predictor that their class also holds, from the weights that the stage started from.
    check, say: as for ``consolidate``; logits are compared too
    Raises UserError where its encoder differs in any bit from the one saved with the probe, or where their class
    cannot express the probe.
    """
    trained = load_probe(folder)
    if trained.result["origin"].get("path") is None:
        raise UserError("its encoder was never trained", where=folder / EVALUATION, fix="a probe of a trained one")
    origin = _source_of_probe(folder, trained.result["origin"])
    manifest = store.read_manifest(trained.checkpoint)
    # For a published file of others, the stage's recipe has what the file does not contain.
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
    best, counted = trained.result["best"], trained.result.get("clips")
    card = ClassifierCard(best["probe"], best.get("accuracy"), counted, manifest["recipe"])
    write_video_classifier(
        out, replace(source, config=config), trained.probe, trained.classes, card=card, check=check, say=say
    )
    return trained


def _source_of_probe(folder: Path, origin: dict[str, Any]) -> str:
    """Returns the path of the model that a probe stage started from: the old one, or the new one in a moved run."""
    then = str(origin["path"])
    if Path(then).exists() or "identity" not in origin:
        return then
    beside = folder.resolve().parent / str(origin["stage"]) / CHECKPOINTS / Path(then).name
    if not is_checkpoint(beside, origin["identity"]):
        raise UserError(
            f"the checkpoint that the probe started from is not there, and not at {beside}",
            where=then,
            fix="put it back at either place",
        )
    return str(beside)


def write_video_classifier(
    out: Path,
    source: WeightSource,
    probe: AttentiveProbe,
    classes: Sequence[str],
    *,
    card: ClassifierCard | None = None,
    check: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a folder that ``VJEPA2ForVideoClassification.from_pretrained`` loads; returns it.

    out:     a new or empty folder
    source:  the encoder that the probe was trained on, and its predictor, which that model also holds
    classes: names, in the order of the logits
    card:    what the model card says about the probe
    check, say: as for ``consolidate``; logits are compared too

    Its head is the published attentive classifier with the encoder's number of heads and eps 1e-6. Raises UserError
    where it cannot express the probe, or ``out`` holds something.
    """
    config = source.config.model_copy(update={"classes": tuple(classes)})
    _refuse_inexpressible(probe, source, len(classes))
    if content_of(out):
        raise UserError("not empty", where=out, fix="give another folder, or remove this one")
    names = dict(enumerate(classes))
    keys = {
        "num_pooler_layers": len(probe.pooler.blocks),
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
    }
    # One type for the whole model, because from_pretrained loads it in the type of config.json.
    dtype = source.entries[0][2]
    head = Head({name: value.to(dtype) for name, value in _their_head(probe).items()}, keys, card or ClassifierCard())
    written = replace(source, config=config)
    with replaced_folder(out) as folder:
        write_huggingface(folder, written, head=head)
        if check:
            _check(folder, written, True, say, probe)
    return out


def _refuse_inexpressible(probe: AttentiveProbe, source: WeightSource, classes: int) -> None:
    encoder, pooler = source.config.model.encoder, probe.pooler
    every = [part for part in pooler.modules() if isinstance(part, Attention | CrossAttention)]
    norms = [norm for norm in pooler.modules() if isinstance(norm, torch.nn.LayerNorm)]
    reasons = []
    if heads := {part.heads for part in every} - {encoder.heads}:
        reasons.append(f"it has {heads.pop()} heads, theirs as many as the encoder: {encoder.heads}")
    if eps := {norm.eps for norm in norms} - {LAYER_NORM_EPS}:
        reasons.append(f"its LayerNorms have eps {eps.pop():g}, theirs {LAYER_NORM_EPS:g}")
    if probe.linear.in_features != encoder.width:
        reasons.append(f"it is {probe.linear.in_features} wide, the encoder {encoder.width}")
    if (hidden := pooler.cross_attention_block.mlp.fc1.out_features) != 4 * probe.linear.in_features:
        reasons.append(f"its MLPs have {hidden} hidden channels, theirs {4 * probe.linear.in_features}")
    if probe.linear.out_features != classes:
        reasons.append(f"it has {probe.linear.out_features} outputs, and there are {classes} names of classes")
    if reasons:
        raise UserError(
            "VJEPA2ForVideoClassification cannot express this probe: " + "; ".join(reasons),
            where=source.where,
            fix="train a probe with the encoder's number of heads and eps 1e-6",
        )


def _their_head(probe: AttentiveProbe) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in probe.state_dict().items():
        theirs = (
            name.replace("linear.", "classifier.")
            .replace("cross_attention_block.", "cross_attention_layer.")
            .replace("pooler.blocks.", "pooler.self_attention_layers.")
            .replace(".norm", ".layer_norm")
            .replace(".attn.proj.", ".self_attn.out_proj.")
            .replace(".attn.", ".self_attn.")
            .replace(".xattn.", ".cross_attn.")
        )
        for joined, parts in (("qkv", "qkv"), ("kv", "kv"), ("q", "q")):
            if f"attn.{joined}." in theirs:
                pieces = zip(parts, value.chunk(len(parts)), strict=True)
                out |= {theirs.replace(f".{joined}.", f".{part}_proj."): piece for part, piece in pieces}
                break
        else:
            out[theirs] = value
    return out


@dataclass(frozen=True)
class ClassifierHead:
    """The head of a VJEPA2ForVideoClassification as our probe, in eval mode. classes: of its logits, in order"""

    probe: AttentiveProbe
    classes: tuple[str, ...]


def read_classifier_head(folder: Path) -> ClassifierHead | None:
    """Reads the head of a Hugging Face folder, float32; None if it has none. Raises UserError where it is damaged."""
    stored = huggingface.stored_tensors(folder)
    tensors = {
        name: native.read_safetensors(file, name).float()
        for name, file in stored.items()
        if name.startswith(("pooler.", "classifier."))
    }
    if not tensors:
        return None
    config = huggingface.DEFAULTS | read_json(folder / huggingface.CONFIG_FILE)
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    probe = AttentiveProbe(
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        classes=len(labels),
        depth=1 + config.get("num_pooler_layers", 3),
        eps=LAYER_NORM_EPS,
    )
    theirs = _their_head(probe)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    match_shapes(
        shapes,
        {name: tuple(value.shape) for name, value in theirs.items()},
        name="the head of a classifier",
        where=folder,
        fix="give a folder whose config.json and weights are of one model",
    )
    # The tensors of _their_head are views of the probe's parameters.
    with torch.no_grad():
        for name, piece in theirs.items():
            piece.copy_(tensors[name])
    return ClassifierHead(probe.eval(), tuple(str(labels[key]) for key in sorted(labels, key=int)))
