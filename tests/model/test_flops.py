"""Parameters and FLOPs by formula, against what PyTorch counts. Matrix products only, so they agree exactly but for the
mask tokens' share; the issue of record allows 1 %."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.chain import ROOT
from vjepa_scale.model import ActionPredictor, AttentiveProbe, Encoder, Predictor, flops
from vjepa_scale.recipe import load_recipe
from vjepa_scale.recipe.schema import ActionPredictorConfig, EncoderConfig, ModelConfig, PredictorConfig

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
    if name != "small":  # the count of a block, by its width: depths are counted above, as parameters
        model = model.model_copy(update={"encoder": model.encoder.model_copy(update={"depth": 3})})
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


ARM = SMALL.model_copy(
    update={
        "action_predictor": ActionPredictorConfig(
            width=48, depth=2, heads=2, mlp_hidden=96, extrinsics=True, grid=(3, 5)
        )
    }
)


def test_an_action_step() -> None:
    """Three frames: the frozen encoder on each, teacher forcing over two steps, one imagined step more."""
    with torch.device("meta"):
        encoder, predictor = Encoder(ARM), ActionPredictor(ARM.action_predictor, encoder_width=ARM.encoder.width)
        frames = torch.empty(3, 3, ARM.tubelet, 3 * ARM.patch, 5 * ARM.patch)
        states, cameras = torch.empty(1, 2, 7), torch.empty(1, 2, 6)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            encoder(frames)
        for _ in range(2):
            tokens = torch.empty(1, 30, ARM.encoder.width, device="meta", requires_grad=True)
            predictor(tokens, states, states, cameras).sum().backward()
    # A pass costs twice its forward in the backward; of actions and states, the few inputs need no gradient.
    assert flops.action_step(ARM, 3, 15, 2) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops.action_predictor_parameters(ARM) == sum(p.numel() for p in predictor.parameters())


def test_a_probe_step() -> None:
    with torch.device("meta"):
        encoder, probe = Encoder(SMALL), AttentiveProbe(width=64, heads=2, classes=11, depth=3)
        clip = torch.empty(1, 3, 2 * SMALL.tubelet, 3 * SMALL.patch, 5 * SMALL.patch)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as encoded:
            tokens = encoder(clip)
        with FlopCounterMode(display=False) as counter:
            for _ in range(2):
                probe(tokens.detach().requires_grad_()).sum().backward()
    found = counter.get_total_flops()
    for before, expected in ((False, encoded.get_total_flops() + found), (True, found)):  # tokens that were kept
        step = flops.probe_step(SMALL, 30, probes=2, depth=3, classes=11, encoded=not before)
        assert step == pytest.approx(expected, rel=0.01)
