"""What the encoder and the predictor promise beyond being equal to the published ones."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tests.chain import ROOT
from vjepa_scale.core.errors import UserError
from vjepa_scale.model import Encoder, Predictor, initialise
from vjepa_scale.recipe.schema import ENCODERS, EncoderConfig, ModelConfig, PredictorConfig, RopeConfig

SMALL = ModelConfig(
    encoder=EncoderConfig(width=64, depth=2, heads=2),
    predictor=PredictorConfig(width=48, depth=2, heads=2, mlp_hidden=192),
    patch=8,
)


def _randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


@torch.no_grad()
def test_keeping_every_token_is_keeping_none_out() -> None:
    encoder = _randomised(Encoder(SMALL))
    clips = torch.randn(2, 3, 4, 24, 40)
    everything = torch.arange(2 * 3 * 5).expand(2, -1)
    torch.testing.assert_close(encoder(clips, everything), encoder(clips), rtol=0, atol=1e-5)


@torch.no_grad()
def test_order_of_kept_tokens_is_the_order_of_the_result() -> None:
    encoder = _randomised(Encoder(SMALL))
    clips = torch.randn(2, 3, 4, 24, 40)
    keep = torch.stack([torch.randperm(30)[:11] for _ in range(2)])
    order = torch.randperm(11)
    torch.testing.assert_close(encoder(clips, keep[:, order]), encoder(clips, keep)[:, order], rtol=0, atol=1e-5)


@torch.no_grad()
def test_dropped_tokens_do_not_exist() -> None:
    """Pixels outside the kept tubelets change nothing; pixels inside change every kept token."""
    encoder = _randomised(Encoder(SMALL))
    clips = torch.randn(1, 3, 4, 16, 24)
    keep = torch.tensor([[0, 4, 7, 11]])  # grid 2×2×3: token 7 is τ=1, y=0, x=1
    before = encoder(clips, keep)
    outside = clips.clone()
    outside[:, :, 0:2, 0:8, 8:16] += 1  # token 1
    torch.testing.assert_close(encoder(outside, keep), before, rtol=0, atol=0)
    inside = clips.clone()
    inside[:, :, 2:4, 0:8, 8:16] += 1  # token 7
    assert ((encoder(inside, keep) - before).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_masked_encoder_equals_attention_limited_to_the_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping tokens is the same as computing all of them while nobody attends to a dropped one."""
    encoder = _randomised(Encoder(SMALL))
    clips = torch.randn(2, 3, 4, 24, 40)
    keep = torch.stack([torch.randperm(30)[:11].sort().values for _ in range(2)])
    kept = encoder(clips, keep)
    allowed = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, keep, True)[:, None, None, :]
    plain = torch.nn.functional.scaled_dot_product_attention

    def limited(q: Tensor, k: Tensor, v: Tensor, attn_mask: None) -> Tensor:
        return plain(q, k, v, attn_mask=allowed)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", limited)
    everything = encoder(clips)
    torch.testing.assert_close(everything.gather(1, keep[..., None].expand(-1, -1, 64)), kept, rtol=0, atol=1e-5)


@torch.no_grad()
def test_patch_embedding_is_its_convolution() -> None:
    embed = _randomised(Encoder(SMALL)).patch_embed
    clips = torch.randn(2, 3, 6, 16, 32)
    torch.testing.assert_close(embed(clips), embed.proj(clips).flatten(2).transpose(1, 2), rtol=0, atol=1e-4)


def test_clip_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="5 frames of 24×40 pixels does not divide into tubelets of 2×8×8"):
        Encoder(SMALL)(torch.zeros(1, 3, 5, 24, 40))


@pytest.mark.parametrize("shape", [(3, 4, 24, 40), (1, 4, 3, 24, 40), (1, 1, 4, 24, 40), (4, 24), ()])
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(UserError) as refusal:
            Encoder(SMALL).to(device)(torch.zeros(shape, device=device))
        assert str(refusal.value) == f"clip: clips of shape {list(shape)} (give [B, 3, T, H, W])"


@torch.no_grad()
def test_layout_changes_the_features() -> None:
    encoder = _randomised(Encoder(SMALL))
    other = Encoder(SMALL.model_copy(update={"rope": RopeConfig(layout="interleaved")})).eval()
    other.load_state_dict(encoder.state_dict())
    clips = torch.randn(1, 3, 4, 32, 32)
    assert (encoder(clips) - other(clips)).abs().max() > 1e-3


@torch.no_grad()
def test_predictor_returns_targets_in_their_order_and_takes_the_token_asked_for() -> None:
    predictor = _randomised(Predictor(SMALL))
    index = torch.stack([torch.randperm(24) for _ in range(2)])
    context, target = index[:, :9], index[:, 9:]
    tokens = torch.randn(2, 9, 64)
    predicted = predictor(tokens, context, target, (2, 3, 4))
    order = torch.randperm(15)
    moved = predictor(tokens, context, target[:, order], (2, 3, 4))
    torch.testing.assert_close(moved, predicted[:, order], rtol=0, atol=1e-5)
    assert (predictor(tokens, context, target, (2, 3, 4), mask_token=1) - predicted).abs().max() > 1e-3
    torch.testing.assert_close(predictor(tokens, context, target, (2, 3, 4), mask_token=2), predicted, rtol=0, atol=0)


# Millions of parameters: the paper's table; the three small ones are the image ViTs' published counts less
# class token, positions and head, plus the patch embedding's second frame.
PUBLISHED_MILLIONS = {
    "vit_tiny": 5.63,
    "vit_small": 21.9,
    "vit_base": 86.2,
    "vit_large": 304,
    "vit_huge": 632,
    "vit_giant": 1012,
    "vit_gigantic": 1845,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_named_sizes_have_their_parameters(name: str) -> None:
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(encoder=name))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.01)


def test_giant_is_built_without_memory() -> None:
    """Encoder, target encoder and predictor of ViT-g, 2 billion parameters, in a process of their own."""
    script = """
import resource, torch
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.recipe.schema import ModelConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = ModelConfig(encoder="vit_giant")
with torch.device("meta"):
    networks = Encoder(config), Encoder(config), Predictor(config)
assert all(p.is_meta for network in networks for p in network.parameters())
assert not any(list(network.buffers()) for network in networks)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 1024  # KiB


def test_gradients_reach_every_parameter_through_a_masked_pass() -> None:
    encoder, predictor = Encoder(SMALL), Predictor(SMALL)
    initialise(encoder, seed=0, prefix="encoder")
    initialise(predictor, seed=0, prefix="predictor")
    index = torch.arange(24).expand(2, -1)
    predicted = predictor(encoder(torch.randn(2, 3, 4, 24, 32), index[:, :10]), index[:, :10], index[:, 10:], (2, 3, 4))
    (predicted - 1).abs().mean().backward()
    without = [n for n, p in [*encoder.named_parameters(), *predictor.named_parameters()] if p.grad is None]
    assert without == ["mask_tokens.1"]


@torch.no_grad()
def test_tokens_of_several_blocks() -> None:
    """Each equals the result of an encoder that ends there."""
    deep = ModelConfig(encoder=EncoderConfig(width=64, depth=3, heads=2), patch=8)
    encoder = _randomised(Encoder(deep))
    clips = torch.randn(2, 3, 4, 24, 40)
    keep = torch.stack([torch.randperm(30)[:11] for _ in range(2)])
    first, last = encoder(clips, keep, layers=[0, -1])
    assert torch.equal(last, encoder(clips, keep))
    shallow = Encoder(deep.model_copy(update={"encoder": EncoderConfig(width=64, depth=1, heads=2)})).eval()
    shallow.load_state_dict(
        {k: v for k, v in encoder.state_dict().items() if not k.startswith(("blocks.1", "blocks.2"))}
    )
    assert torch.equal(first, shallow(clips, keep))
    with pytest.raises(UserError, match="no block 3"):
        encoder.layers(clips, [3])
