"""Encoder and predictor against Hugging Face's VJEPA2Model with the same weights."""

import pytest
import torch
from torch import Tensor

from tests.model.published import our_weights, random_published
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

# width, depth, heads, hidden | predictor width, depth, heads, mask tokens | patch, tubelet, crop, frames
CONFIGS = {
    "heads of 64 and 32": ((192, 3, 3, 768), (96, 2, 3, 1), (16, 2, 96, 8)),
    "heads of 32 and 64": ((128, 4, 4, 512), (128, 3, 2, 2), (8, 2, 48, 6)),
    "heads of 88, ratio 48/11": ((176, 2, 2, 768), (64, 2, 2, 10), (16, 2, 64, 16)),
    "heads of 48, tubelet 1": ((96, 2, 2, 384), (96, 2, 2, 3), (4, 1, 32, 5)),
    "ViT-L's width": ((1024, 2, 16, 4096), (384, 2, 12, 10), (16, 2, 128, 4)),
    "width 768, heads of 48": ((768, 2, 16, 3072), (192, 2, 4, 2), (16, 2, 80, 6)),
    "ViT-g's width, heads of 88": ((1408, 2, 16, 6144), (384, 2, 12, 10), (16, 2, 64, 8)),
    "ViT-g": ((1408, 2, 22, 6144), (384, 3, 12, 10), (16, 2, 96, 6)),
}


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    (width, depth, heads, hidden), (p_width, p_depth, p_heads, mask_tokens), (patch, tubelet, crop, frames) = CONFIGS[
        name
    ]
    config = ModelConfig(
        encoder=EncoderConfig(width=width, depth=depth, heads=heads, mlp_hidden=hidden),
        predictor=PredictorConfig(
            width=p_width, depth=p_depth, heads=p_heads, mlp_hidden=4 * p_width, mask_tokens=mask_tokens
        ),
        patch=patch,
        tubelet=tubelet,
    )
    theirs = random_published(config, crop=crop, frames=frames, seed=len(name))
    # As sharp as in trained networks: where attention is nearly a mean, it hardly shows who attends to whom
    # (queries and keys that changed places differed by 1.02e-5).
    for parameter_name, parameter in theirs.named_parameters():
        if ".query." in parameter_name or ".key." in parameter_name:
            parameter.mul_(6)
    encoder_weights, predictor_weights = our_weights(theirs)
    encoder, predictor = Encoder(config).eval(), Predictor(config).eval()
    encoder.load_state_dict(encoder_weights)
    predictor.load_state_dict(predictor_weights)
    clips = torch.randn(2, 3, frames, crop, crop)
    grid = (frames // tubelet, crop // patch, crop // patch)
    count = grid[0] * grid[1] * grid[2]
    shuffled = torch.stack([torch.randperm(count) for _ in range(2)])
    context, target = shuffled[:, : count // 3], shuffled[:, count // 2 :]

    out = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[target])
    tokens = encoder(clips)
    _close(tokens, out.last_hidden_state)
    context_tokens = tokens.gather(1, context[..., None].expand(-1, -1, width))
    predicted = predictor(context_tokens, context, target, grid, mask_token=1)
    _close(predicted, out.predictor_output.last_hidden_state)


def test_every_parameter_takes_part_in_the_comparison() -> None:
    """Each of our parameters changes the output of the compared forward: none is compared by being unused."""
    config = ModelConfig(
        encoder=EncoderConfig(width=64, depth=2, heads=2),
        predictor=PredictorConfig(width=48, depth=2, heads=2, mlp_hidden=192, mask_tokens=2),
        patch=8,
    )
    encoder_weights, predictor_weights = our_weights(random_published(config, crop=32, frames=4, seed=0))
    encoder, predictor = Encoder(config), Predictor(config)
    encoder.load_state_dict(encoder_weights)
    predictor.load_state_dict(predictor_weights)
    index = torch.arange(32)[None]
    predicted = predictor(
        encoder(torch.randn(1, 3, 4, 32, 32), index[:, :12]), index[:, :12], index[:, 12:], (2, 4, 4), mask_token=1
    )
    predicted.square().sum().backward()
    unused = {
        name
        for network in (encoder, predictor)
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert unused == {"mask_tokens.0"}
