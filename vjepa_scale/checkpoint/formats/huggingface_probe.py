"""An encoder and a trained probe, as Hugging Face's VJEPA2ForVideoClassification (docs/method.md 10).

Its head is the published attentive classifier with the encoder's number of heads and eps 1e-6; probes with others
compute something that it cannot.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats.huggingface import Head, write_huggingface
from vjepa_scale.checkpoint.formats.source import WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.folders import content_of, replaced_folder
from vjepa_scale.model.attention import Attention
from vjepa_scale.model.blocks import LAYER_NORM_EPS
from vjepa_scale.model.probe import AttentiveProbe, CrossAttention


def write_video_classifier(out: Path, source: WeightSource, probe: AttentiveProbe, classes: Sequence[str]) -> Path:
    """Write a folder that ``VJEPA2ForVideoClassification.from_pretrained`` loads; returns it.

    out:     a new or empty folder
    source:  the encoder that the probe was trained on, and its predictor, which that model also holds
    classes: names, in the order of the logits

    Raises UserError where their head cannot express the probe, or ``out`` holds something.
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
    # One type for the whole model: from_pretrained loads it in the one of config.json.
    dtype = source.entries[0][2]
    head = Head({name: value.to(dtype) for name, value in _their_head(probe).items()}, keys)
    with replaced_folder(out) as folder:
        write_huggingface(folder, replace(source, config=config), head=head)
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
