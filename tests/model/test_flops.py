"""Parameters and FLOPs by formula, against what PyTorch counts. Matrix products only, so they agree exactly but for the
mask tokens' share; the issue of record allows 1 %."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.chain import ROOT
from vjepa_scale.model import Encoder, Predictor, flops
from vjepa_scale.recipe import load_recipe
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

SMALL = ModelConfig(
    encoder=EncoderConfig(width=64, depth=3, heads=2, mlp_hidden=200),
    predictor=PredictorConfig(width=48, depth=2, heads=2, mlp_hidden=100, mask_tokens=3),
    patch=8,
    tubelet=4,
)
MODELS = {"small": SMALL} | {name: ModelConfig(encoder=name) for name in ("vit_large", "vit_giant", "vit_gigantic")}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        encoder, predictor = Encoder(model), Predictor(model)
    assert flops.encoder_parameters(model) == sum(p.numel() for p in encoder.parameters())
    assert flops.predictor_parameters(model) == sum(p.numel() for p in predictor.parameters())


@pytest.mark.parametrize("name", ["small", "vit_giant"])
def test_a_step(name: str) -> None:
    """Target forward, then context, predictor and backward for two pairs, on a non-square grid without memory."""
    model = MODELS[name]
    grid, pairs = (2, 3, 5), [(7, 18), (4, 20)]
    frames, height, width = 2 * model.tubelet, 3 * model.patch, 5 * model.patch
    with torch.device("meta"):
        encoder, predictor, target_encoder = Encoder(model), Predictor(model), Encoder(model)
        clip = torch.empty(1, 3, frames, height, width)
        tokens = torch.empty(1, 30, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            target_encoder(clip)
        for context, target in pairs:
            places = tokens[:, :context], tokens[:, :target]
            predictor(encoder(clip, places[0]), *places, grid).sum().backward()
    assert flops.jepa_step(model, 30, pairs) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_long_clip_is_dominated_by_attention() -> None:
    """64 frames at 384 px through ViT-g, by hand: 40·(18432²·4·1408) for attention alone."""
    alone = 40 * 18432**2 * 4 * 1408
    whole = flops.encoder_forward(load_recipe(ROOT / "recipes" / "vitg_384.yaml").model, 18432)
    assert alone < whole < 2 * alone + 40 * 18432 * 2 * (4 * 1408**2 + 2 * 1408 * 6144)
