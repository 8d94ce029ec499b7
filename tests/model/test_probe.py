"""The attentive probe against Hugging Face's; tests/published compares it with the published one."""

import re

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

from vjepa_scale.model.probe import AttentiveProbe

NAMES = (
    (r"^classifier\.", "linear."),
    (r"\.self_attention_layers\.", ".blocks."),
    (r"\.cross_attention_layer\.", ".cross_attention_block."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.q_proj\.", ".attn.qkv."),
    (r"\.cross_attn\.q_proj\.", ".xattn.q."),
    (r"\.cross_attn\.k_proj\.", ".xattn.kv."),
)


def random_classifier(*, width: int, heads: int, mlp_ratio: float, classes: int) -> VJEPA2ForVideoClassification:
    torch.manual_seed(0)
    model = VJEPA2ForVideoClassification(
        VJEPA2Config(
            patch_size=8,
            crop_size=32,
            frames_per_clip=4,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            mlp_ratio=mlp_ratio,
            pred_hidden_size=24,
            pred_num_hidden_layers=1,
            pred_num_attention_heads=2,
            num_labels=classes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        for parameter in model.vjepa2.encoder.layernorm.parameters():
            parameter *= 0.1  # tokens of variance below 1e-3: LayerNorm's eps shows
    return model.eval()


def probe_weights(model: VJEPA2ForVideoClassification) -> dict[str, Tensor]:
    """The head's weights by our names; their separate projections laid end to end."""
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("vjepa2.")}
    weights = {}
    for name, value in state.items():
        if re.search(r"self_attn\.[kv]_proj|cross_attn\.v_proj", name):
            continue
        if "self_attn.q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        elif "cross_attn.k_proj" in name:
            value = torch.cat([value, state[name.replace("k_proj", "v_proj")]])
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    return weights


# The second one's mlp_ratio is ViT-g's: the head's hidden width is 4·D all the same.
@pytest.mark.parametrize(("width", "heads", "ratio"), [(64, 4, 4.0), (88, 2, 48 / 11)])
@torch.no_grad()
def test_equals_hugging_face(width: int, heads: int, ratio: float) -> None:
    model = random_classifier(width=width, heads=heads, mlp_ratio=ratio, classes=5)
    probe = AttentiveProbe(width=width, heads=heads, classes=5, eps=1e-6).eval()
    probe.load_state_dict(probe_weights(model))
    clips = torch.randn(3, 4, 3, 32, 32)
    theirs = model(clips).logits
    ours = probe(model.vjepa2(clips, skip_predictor=True).last_hidden_state)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_every_parameter_takes_part() -> None:
    probe = AttentiveProbe(width=32, heads=2, classes=3)
    torch.nn.init.normal_(probe.pooler.query_tokens)
    probe(torch.randn(2, 6, 32)).square().sum().backward()
    assert [name for name, p in probe.named_parameters() if p.grad is None or not p.grad.any()] == []
