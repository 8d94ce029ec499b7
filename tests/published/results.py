"""What the published code computed, and our networks with the same weights."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.published import inputs
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

HERE = Path(__file__).parent

MODEL = ModelConfig(
    encoder=EncoderConfig(width=inputs.WIDTH, depth=inputs.DEPTH, heads=inputs.HEADS),
    predictor=PredictorConfig(
        width=inputs.PREDICTOR_WIDTH,
        depth=inputs.PREDICTOR_DEPTH,
        heads=inputs.PREDICTOR_HEADS,
        mlp_hidden=4 * inputs.PREDICTOR_WIDTH,
        mask_tokens=2,
    ),
    patch=inputs.PATCH,
    tubelet=inputs.TUBELET,
)


@cache
def networks() -> dict[str, Tensor]:
    return load_file(HERE / "networks.safetensors")


@cache
def steps() -> dict[str, Tensor]:
    return load_file(HERE / "steps.safetensors")


@cache
def action_steps(run: str) -> dict[str, Tensor]:
    found = load_file(HERE / "action_steps.safetensors")
    return {name.removeprefix(f"{run}."): value for name, value in found.items() if name.startswith(f"{run}.")}


@cache
def checkpoint() -> dict[str, dict[str, Tensor]]:
    """The published file's networks, by our names."""
    saved = torch.load(HERE / "checkpoint.pt", weights_only=True)
    return {
        network: {name.removeprefix("module.backbone."): value for name, value in saved[network].items()}
        for network in ("encoder", "predictor", "target_encoder")
    }


def filled(network: nn.Module, prefix: str) -> nn.Module:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(inputs.weight(f"{prefix}.{name}", tuple(parameter.shape))))
    return network.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest published value."""
    assert ours.shape == theirs.shape
    assert theirs.any()
    return float((ours - theirs).abs().max() / theirs.abs().max())
