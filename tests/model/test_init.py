"""The start of every weight: statistics, scaling, and that only (seed, name) decides it."""

import math

import pytest
import torch

from vjepa_scale.model import Encoder, Predictor, initial_value, initialise
from vjepa_scale.model.init import probe_initial_value
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

CONFIG = ModelConfig(
    encoder=EncoderConfig(width=128, depth=4, heads=4),
    predictor=PredictorConfig(width=96, depth=3, heads=3, mlp_hidden=384, mask_tokens=3),
    patch=8,
)


def _start(kind: type[Encoder] | type[Predictor], prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    network = kind(CONFIG)
    initialise(network, seed=seed, prefix=prefix)
    return network.state_dict()


@pytest.mark.parametrize(("kind", "prefix"), [(Encoder, "encoder"), (Predictor, "predictor")])
def test_statistics(kind: type[Encoder] | type[Predictor], prefix: str) -> None:
    for name, value in _start(kind, prefix).items():
        if name.endswith("bias") or "mask_tokens" in name:
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            std = 0.02
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                block = int(name.split(".")[1]) + 1
                std /= math.sqrt(2 * block)
            # The sample std of n normal numbers has a relative error of 1/sqrt(2n).
            assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel())), name
            assert abs(float(value.mean())) < 5 * std / math.sqrt(value.numel()), name
            assert float(value.abs().max()) < 8 * std, name


def test_published_rescale_of_the_fourth_block() -> None:
    value = _start(Encoder, "encoder")["blocks.3.mlp.fc2.weight"]
    assert float(value.std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.02)


def test_only_seed_and_name_decide() -> None:
    torch.manual_seed(1)
    first = _start(Encoder, "encoder")
    torch.manual_seed(2)
    again = _start(Encoder, "encoder")
    target = _start(Encoder, "target_encoder")
    other = _start(Encoder, "encoder", seed=1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, target[name])
        if value.ndim > 1:
            assert not torch.equal(value, other[name])


def test_no_two_weights_are_alike() -> None:
    drawn = [
        v.flatten()[:64]
        for v in (*_start(Encoder, "encoder").values(), *_start(Predictor, "predictor").values())
        if v.ndim > 1 and v.any()
    ]
    assert len(torch.unique(torch.stack(drawn)[:, 0])) == len(drawn)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initial_value("encoder.blocks.0.attn.qkv.weight", (30, 10), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_kind_of_parameter_is_refused() -> None:
    with pytest.raises(AssertionError, match="encoder\\.gate"):
        initial_value("encoder.gate", (3,), seed=0)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_probe_starts_as_published(depth: int) -> None:
    """Truncated normals of 0.02 in the pooler; self-attention block i, from 1, divided by sqrt(2·i); the MLP of the
    cross-attention block by sqrt(2·(depth − 1)), and by sqrt(2) where there is no other block (the published code
    counts it as the last self-attention block); the query drawn too; ``linear`` as PyTorch's Linear starts."""
    width, classes = 128, 64
    for name, parameter in AttentiveProbe(width=width, heads=4, classes=classes, depth=depth).named_parameters():
        value = probe_initial_value(f"probe.{name}", parameter.shape, seed=0, depth=depth, width=width)
        assert value.shape == parameter.shape
        spread = 5 / math.sqrt(2 * value.numel())
        if name.startswith("linear."):
            torch_own = torch.nn.Linear(width, classes)
            bound = 1 / math.sqrt(width)
            assert float(value.abs().max()) <= bound
            assert float(torch_own.get_parameter(name.removeprefix("linear.")).detach().abs().max()) <= bound
            assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=spread), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            divisor = 1.0
            if name == "pooler.cross_attention_block.mlp.fc2.weight":
                divisor = {1: math.sqrt(2), 2: math.sqrt(2), 4: math.sqrt(6)}[depth]
            elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                divisor = math.sqrt(2 * (int(name.split(".")[2]) + 1))
            assert float(value.std()) == pytest.approx(0.02 / divisor, rel=spread), name
