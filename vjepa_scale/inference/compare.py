"""Compares this package with transformers on the same clips: ``tools/consolidate.py --compare``.

    SOURCE ───────────────────► our networks ─┐
    REFERENCE ────────────────► transformers ─┼─► differences of tokens, predictions and logits
    SOURCE ─► our exporter ───► transformers ─┘    and: are the exported tensors those of REFERENCE, to the bit?

REFERENCE is a Hugging Face folder: SOURCE itself where it is one, or a second path. With neither, transformers can only
run the output of our exporter. One model is in memory at a time; its outputs are kept.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.checkpoint.consolidate import LIMIT, ClassifierHead, read_classifier_head, write_video_classifier
from vjepa_scale.checkpoint.formats import huggingface, open_weights
from vjepa_scale.checkpoint.formats.native import read_safetensors
from vjepa_scale.checkpoint.formats.published_model import PREDICTOR_HEADS
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, Weights, WeightSource
from vjepa_scale.checkpoint.load import network_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.clips import clip_of_file
from vjepa_scale.inference.model import usable_device
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.encoder import PixelNormaliser
from vjepa_scale.recipe.networks import Network, refuse_other_model

# Positions in time are treated as those in height and width, so a few time steps suffice to detect an error.
FRAMES = 16

Outputs = dict[str, list[Tensor]]
TOKENS, PREDICTIONS, LOGITS = "encoder tokens", "predictor outputs", "logits"


def compare(
    source: Path,
    reference: Path | None = None,
    *,
    model: str | None = None,
    size: int | None = None,
    frames: int | None = None,
    clips: int = 1,
    videos: Sequence[Path] = (),
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> bool:
    """Compares the outputs of this package and of transformers, in float32. Returns whether the two agree.

    source:    as for open_weights
    reference: a Hugging Face folder of the same model; None: ``source`` itself if it is such a folder, else this
               package's export of it
    model:     as for open_weights; not needed with a reference
    size:      side of the clips in pixels, where the weights do not contain it
    frames:    of a clip; default: 16, or the model's where that is fewer
    clips:     number of clips of seeded noise; used where there are no ``videos``
    videos:    files; the first ``frames`` pictures of each
    say:       receives the lines of the report

    They agree where each output differs by at most LIMIT of the largest one, and each exported tensor equals the
    reference's to the bit. Raises UserError where transformers is missing, or where the two cannot be compared.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers is not installed", where="--compare", fix="pip install 'vjepa_scale[huggingface]'"
        )
    if reference is None and huggingface.is_huggingface(source):
        reference = source
    theirs = None if reference is None else _open_reference(reference)
    place = usable_device(device)
    found, problems = _open_source(source, theirs, model, say)
    found = _with_clip(found, theirs, size)
    sample = _sample(found.config, frames, clips, videos)
    head = None if reference is None else read_classifier_head(reference)
    _say_what_is_compared(found, theirs, sample, place, head, say)

    rows: list[tuple[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        exported = _export(found, Path(folder) / "exported", head, theirs is None, say)
        ours = _run_ours(found, head, sample, place)
        if reference is not None:
            published = _run_theirs(reference, sample, place, head is not None, problems)
            rows += _differences(ours, published, "")
        if exported is not None:
            stored = None if reference is None else huggingface.stored_tensors(reference)
            again = _run_theirs(exported, sample, place, head is not None, problems, stored, say)
            rows += _differences(ours, again, "exported: " if reference is not None else "")
    return _report(rows, problems, ours, say)


# -- what is compared ------------------------------------------------------------------------------


def _open_reference(folder: Path) -> WeightSource:
    if not folder.is_dir() or not huggingface.is_huggingface(folder):
        raise UserError(
            "not a Hugging Face folder",
            where=folder,
            fix="give a folder with config.json and model.safetensors as the second path",
        )
    return huggingface.open_huggingface(folder)


def _open_source(
    path: Path, theirs: WeightSource | None, model: str | None, say: Callable[[str], None]
) -> tuple[WeightSource, list[str]]:
    """Returns the weights to run, and how they differ from the reference; of two encoders, takes the nearer one."""
    if theirs is not None and theirs.where == path:
        say(f"{path}: {theirs.match().sentence()}")
        return theirs, []
    if theirs is not None and model is None and path.suffix == ".pt" and not Path(f"{path}.json").exists():
        model = _heads(theirs.config)
    both = open_weights(path, model=model, weights="both")
    networks: tuple[Network, ...] = ("encoder", "predictor") if "predictor" in both.networks() else ("encoder",)
    kinds: dict[Weights | None, str] = {None: "encoder."}
    if "target_encoder" in both.networks():
        kinds = {"target": "target_encoder.", "context": "encoder."}
    best, problems = next(iter(kinds)), []
    if theirs is not None:
        both.only((*networks, "target_encoder")).match(theirs.config.model)
        try:
            refuse_other_model(
                both.config.model, theirs.config.model, where=None, by="the reference", networks=networks
            )
        except UserError as error:
            problems.append(error.what)
        other = {kind: _other_tensors(both, theirs, prefix) for kind, prefix in kinds.items()}
        best = min(kinds, key=lambda kind: len(other[kind]))
        count = sum(name.startswith("encoder.") for name, _, _ in theirs.entries)
        for kind in kinds:
            words = "the encoder" if kind is None else f"the {kind} encoder"
            alike = f"{count - len(other[kind])} of {count} tensors equal to the reference's"
            say(f"{words}: {alike}" + ", compared" * (kind == best))
        wrong = other[best] + (_other_tensors(both, theirs, "predictor.") if "predictor" in networks else [])
        if wrong:
            problems.append(f"{len(wrong)} tensors are not the reference's: {_first(wrong)}")
    found = open_weights(path, model=model, weights=best, networks=networks)
    say(f"{path}: {found.match().sentence()}")
    return found, problems


def _heads(config: ConsolidatedConfig) -> str:
    """Returns ``--model`` of a published file, from its reference."""
    predictor = config.model.predictor
    said = f"heads={config.model.encoder.heads}"
    known = PREDICTOR_HEADS["predictor"].get(predictor.width)
    return said if known == predictor.heads else f"{said},predictor_heads={predictor.heads}"


def _other_tensors(source: WeightSource, theirs: WeightSource, prefix: str) -> list[str]:
    """Returns names, as in the reference, of a network's tensors that differ from it. Shapes must match."""
    named = {
        name: name.replace("target_encoder.", "encoder.") for name, _, _ in source.entries if name.startswith(prefix)
    }
    return [
        known for name, known in named.items() if not torch.equal(source.read(name).float(), theirs.read(known).float())
    ]


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _with_clip(source: WeightSource, theirs: WeightSource | None, size: int | None) -> WeightSource:
    """Returns the weights with the clip geometry of the reference, whose positions are for that size only."""
    config = source.config if theirs is None else theirs.config
    given = config.size if size is None else (size, size)
    if given != config.size and "size" not in config.assumed:
        raise UserError(f"these weights are for size {config.size}", where="--size", fix="leave it out")
    clip = {"frames": config.frames, "size": given, "fps": config.fps, "mean": config.mean, "std": config.std}
    return replace(source, config=source.config.model_copy(update=clip | {"assumed": ()}))


@dataclass(frozen=True)
class _Sample:
    """Normalised clips, each [1, 3, T, H, W], and places [1, K], [1, M] in the grid (t, h, w)."""

    clips: list[Tensor]
    context: Tensor
    target: Tensor
    grid: tuple[int, int, int]
    kind: str


def _sample(config: ConsolidatedConfig, frames: int | None, count: int, videos: Sequence[Path]) -> _Sample:
    model, (height, width) = config.model, config.size
    if frames is None:
        frames = min(FRAMES, config.frames) // model.tubelet * model.tubelet or model.tubelet
    if frames < 1 or frames % model.tubelet:
        raise UserError(f"{frames} frames", where="--frames", fix=f"a multiple of {model.tubelet}, the tubelet")
    if height % model.patch or width % model.patch:
        raise UserError(f"clips of {height}×{width}", where="--size", fix=f"a multiple of {model.patch}, the patch")
    if count < 1:
        raise UserError(f"{count} clips", where="--clips", fix="1 or more, or video files")
    generator = torch.Generator().manual_seed(0)
    pixels = PixelNormaliser(config.mean, config.std)
    clips = [
        pixels(clip_of_file(video, frames=frames, fps=config.fps, size=config.size, start_s=0.0, still=frames)[None])
        for video in videos
    ] or [torch.randn(1, 3, frames, height, width, generator=generator) for _ in range(count)]
    grid = (frames // model.tubelet, height // model.patch, width // model.patch)
    order = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator)[None]
    places = order.shape[1]
    kind = "videos" if videos else "noise"
    return _Sample(clips, order[:, : max(places // 3, 1)], order[:, places // 2 :], grid, kind)


def _say_what_is_compared(
    source: WeightSource,
    theirs: WeightSource | None,
    sample: _Sample,
    device: torch.device,
    head: ClassifierHead | None,
    say: Callable[[str], None],
) -> None:
    import transformers  # optional

    version = f"transformers {transformers.__version__}"
    if theirs is None:
        say(
            f"{version} gets these weights through this package's own exporter. For a check that does not depend on "
            "the exporter, give the released Hugging Face folder of the same model as a second path. Both "
            "sides use the same number of heads (--model)."
        )
    elif theirs.where == source.where:
        say(f"{version} loads the folder itself; this package loads it through its own reader.")
    else:
        say(
            f"{source.where} in this package against {theirs.where} in {version}: an independent check. No converter "
            "of this package is between the two."
        )
    if "predictor" not in source.config.networks:
        say(f"{PREDICTIONS}: not compared: {source.where} has no pretraining predictor")
    if head is not None:
        say(f"{LOGITS}: {len(head.classes)} classes, by the head of the Hugging Face folder")
    parameters = sum(torch.Size(shape).numel() for _, shape, _ in source.entries)
    weights = 4 * parameters / 1e9
    steps, height, width = sample.grid
    frames, patch = steps * source.config.model.tubelet, source.config.model.patch
    say(
        f"clips: {len(sample.clips)} ({sample.kind}), {frames} frames of {height * patch}×{width * patch} pixels; "
        f"{sample.context.shape[1]} context and {sample.target.shape[1]} target tokens; float32 on {device}"
    )
    say(
        f"needs about {1.3 * weights + 0.5:.1f} GB of memory (one model at a time: {weights:.1f} GB) and {weights:.1f} "
        f"GB of disk in {os.environ.get('TMPDIR', tempfile.gettempdir())}"
    )


# -- running ---------------------------------------------------------------------------------------


@torch.no_grad()
def _run_ours(source: WeightSource, head: ClassifierHead | None, sample: _Sample, device: torch.device) -> Outputs:
    encoder = network_of(source, "encoder", Encoder, device)
    with_predictor = "predictor" in source.config.networks
    predictor = network_of(source, "predictor", Predictor, device) if with_predictor else None
    context, target = sample.context.to(device), sample.target.to(device)
    out: Outputs = {}
    for clip in sample.clips:
        with torch.backends.cudnn.flags(allow_tf32=False):
            tokens = encoder(clip.to(device))
        out.setdefault(TOKENS, []).append(tokens.cpu())
        if predictor is not None:
            kept = tokens.gather(1, context[..., None].expand(-1, -1, tokens.shape[-1]))
            predicted = predictor(
                kept, context, target, sample.grid, mask_token=huggingface.mask_token(source.config.model)
            )
            out.setdefault(PREDICTIONS, []).append(predicted.cpu())
        if head is not None:
            out.setdefault(LOGITS, []).append(head.probe.to(device)(tokens).cpu())
    return out


@torch.no_grad()
def _run_theirs(
    folder: Path,
    sample: _Sample,
    device: torch.device,
    classifier: bool,
    problems: list[str],
    stored: dict[str, Path] | None = None,
    say: Callable[[str], None] = print,
) -> Outputs:
    """Returns the outputs of transformers. Adds to ``problems`` the tensors that it does not find in the folder.

    stored: the tensors that this folder's tensors must equal
    """
    from transformers import VJEPA2ForVideoClassification, VJEPA2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind: Any = VJEPA2ForVideoClassification if classifier else VJEPA2Model
    try:
        loaded, info = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load it: {error}", where=folder) from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [str(name) for name in info[what]]:
            problems.append(
                f"transformers finds {len(names)} {what.replace('_', ' ')} in the {folder.name} folder: {_first(names)}"
            )
    if stored is not None:
        state: dict[str, Tensor] = loaded.state_dict()
        other = [name for name in sorted(state.keys() | stored.keys()) if not _equal(state, stored, name)]
        say(
            f"exported: {len(state) - len(set(other) & state.keys())} of {len(stored)} tensors equal to the reference's"
        )
        if other:
            problems.append(f"{len(other)} exported tensors are not the reference's: {_first(other)}")
    loaded = loaded.eval().to(device)
    network = loaded.vjepa2 if classifier else loaded
    context, target = sample.context.to(device), sample.target.to(device)
    out: Outputs = {}
    for clip in sample.clips:
        with torch.backends.cudnn.flags(allow_tf32=False):
            given = network(clip.transpose(1, 2).to(device), context_mask=[context], target_mask=[target])
        out.setdefault(TOKENS, []).append(given.last_hidden_state.cpu())
        out.setdefault(PREDICTIONS, []).append(given.predictor_output.last_hidden_state.cpu())
        if classifier:
            out.setdefault(LOGITS, []).append(loaded.classifier(loaded.pooler(given.last_hidden_state)).cpu())
    return out


def _equal(state: dict[str, Tensor], stored: dict[str, Path], name: str) -> bool:
    if name not in state or name not in stored:
        return False
    return torch.equal(state[name], read_safetensors(stored[name], name).float())


def _export(
    source: WeightSource, folder: Path, head: ClassifierHead | None, needed: bool, say: Callable[[str], None]
) -> Path | None:
    """Exports to Hugging Face's format; returns None where their model cannot express it and it is not needed."""
    try:
        huggingface.refuse_inexpressible(source.config, source.where)
    except UserError as error:
        if needed:
            fix = "give the Hugging Face folder of the same model as a second path"
            raise UserError(error.what, where=source.where, fix=fix) from None
        say(f"exported: not compared: {error.what}")
        return None
    if head is not None:
        return write_video_classifier(folder, source, head.probe.cpu(), head.classes)
    folder.mkdir()
    huggingface.write_huggingface(folder, source)
    return folder


# -- the report ------------------------------------------------------------------------------------


def _differences(ours: Outputs, theirs: Outputs, label: str) -> list[tuple[str, dict[str, float]]]:
    return [(label + name, _difference(torch.cat(ours[name]), torch.cat(theirs[name]))) for name in ours]


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Returns differences over all clips. relative: to the largest output; 1 − cosine: of the worst token or logits"""
    apart = (ours - theirs).abs()
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    return {
        "max abs": float(apart.max()),
        "mean abs": float(apart.mean()),
        "relative": float(apart.max() / theirs.abs().max()),
        "1 - cosine": float((1 - cosine).max()),
    }


def _report(
    rows: list[tuple[str, dict[str, float]]], problems: list[str], ours: Outputs, say: Callable[[str], None]
) -> bool:
    width = max(len(name) for name, _ in rows)
    say(" " * width + "".join(f"{column:>12}" for column in rows[0][1]))
    for name, numbers in rows:
        say(f"{name:<{width}}" + "".join(f"{number:>12.1e}" for number in numbers.values()))
    # "not <=", so that NaN counts as wrong.
    wrong = [name for name, numbers in rows if not numbers["relative"] <= LIMIT]
    problems = problems + ([f"{', '.join(wrong)}: more than {LIMIT:g} of the largest output apart"] if wrong else [])
    if problems:
        say(f"verdict: differ: {'; '.join(problems)}")
        return False
    say(
        f"verdict: agree: {', '.join(ours)} differ by at most {LIMIT:g} of the largest output (float32 rounding: about "
        "1e-6; a wrong number of heads or layout of RoPE: about 1e-3 in random weights with selective attention)"
    )
    return True
