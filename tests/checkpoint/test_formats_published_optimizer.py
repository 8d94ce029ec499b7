"""The optimiser's state in files of the published format."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.formats_material import (
    network_of,
    published_dict,
    same,
)
from tests.checkpoint.published_material import HEADS, saved
from vjepa_scale.checkpoint.formats import open_weights, published_optimizer
from vjepa_scale.core.errors import UserError

PUBLISHED = Path(__file__).parents[1] / "published"


class Backbone(nn.Module):
    """The published networks as far as their parameters go: their names, order and a fixed table of positions."""

    def __init__(self, tensors: dict[str, Tensor], table: str) -> None:
        super().__init__()
        setattr(self, table, nn.Parameter(torch.ones(1, 4, 2), requires_grad=False))
        for name, value in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(value.clone()))


def trained_file(
    tensors: dict[str, Tensor], steps: int = 2
) -> tuple[dict[str, Any], torch.optim.AdamW, dict[str, Any]]:
    """A published dict after AdamW steps over four groups, the way the published code makes them."""
    networks = {
        "encoder": Backbone(network_of(tensors, "encoder"), "pos_embed"),
        "predictor": Backbone(network_of(tensors, "predictor"), "predictor_pos_embed"),
    }

    def group(network: str, decayed: bool) -> list[nn.Parameter]:
        named = networks[network].named_parameters()
        return [p for name, p in named if (("bias" not in name) and (len(p.shape) != 1)) == decayed]

    groups = [
        {"params": group("encoder", True)},
        {"params": group("predictor", True)},
        {"params": group("encoder", False), "weight_decay": 0},
        {"params": group("predictor", False), "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    parameters = {f"{n}.{name}": p for n, network in networks.items() for name, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for name, parameter in parameters.items():
            if parameter.requires_grad and not re.search(r"mask_tokens\.[12]$", name):  # those are never trained
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    content = published_dict(tensors)
    for name, network in networks.items():
        content[name] = {f"module.backbone.{key}": value for key, value in network.state_dict().items()}
    return content | {"opt": optimizer.state_dict()}, optimizer, parameters


def test_optimizer_state_goes_to_the_right_names(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content, optimizer, parameters = trained_file(tensors)
    found = published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)
    wanted = {name for name in tensors if not name.startswith("target_encoder.")}
    assert found.keys() == wanted
    untrained = {"predictor.mask_tokens.1", "predictor.mask_tokens.2"}
    for name, state in found.items():
        if name in untrained:
            assert not any(value.any() for value in state.values())
            assert state["exp_avg"].shape == tensors[name].shape
            continue
        kept = optimizer.state[parameters[name]]
        assert same(state, {key: kept[key] for key in ("exp_avg", "exp_avg_sq", "step")}), name
        assert state["step"] == 2


def _group_of_another_length(opt: dict[str, Any]) -> None:
    opt["param_groups"][1]["params"].pop()


def _one_group(opt: dict[str, Any]) -> None:
    opt["param_groups"] = [{"params": list(opt["state"])}]


def _other_shape(opt: dict[str, Any]) -> None:
    opt["state"][3]["exp_avg"] = torch.zeros(3)


def _no_state(opt: dict[str, Any]) -> None:
    del opt["state"][3]


def _sgd(opt: dict[str, Any]) -> None:
    opt["state"] = {number: {"momentum_buffer": None} for number in opt["state"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group_of_another_length, r"groups of \[\d+, \d+, \d+, \d+\] parameters, the networks have"),
        (_one_group, r"groups of \[\d+\] parameters, the networks have"),
        (_other_shape, r"exp_avg of encoder\.\S+ is \[3\], not \["),
        (_no_state, r"no AdamW state for encoder\."),
        (_sgd, r"no AdamW state for encoder\."),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content, _, _ = trained_file(tensors)
    change(content["opt"])
    with pytest.raises(UserError, match=message):
        published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)


def test_a_file_without_optimizer_or_in_another_order_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match="holds no optimiser state"):
        published_optimizer(saved(tmp_path / "x.pt", published_dict(tensors)), model=HEADS)
    content, _, _ = trained_file(tensors)
    content["encoder"] = dict(reversed(content["encoder"].items()))
    with pytest.raises(UserError, match="encoder: weights in another order"):
        published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)


def test_a_file_that_the_published_training_saved() -> None:
    """tests/published/checkpoint.pt: after k gradients g, exp_avg_sq sums to Σ (1 − β₂)·β₂^(K−k)·‖g‖², by name.

    The norms were measured by the published run itself, so that a moment under another name would show.
    """
    path, heads = PUBLISHED / "checkpoint.pt", "heads=2,predictor_heads=2"
    steps = load_file(PUBLISHED / "steps.safetensors")
    found = published_optimizer(path, model=heads)
    source = open_weights(path, model=heads, weights="both")
    assert found.keys() == {name for name, _, _ in source.entries if not name.startswith("target_encoder.")}
    assert source.networks() == {"encoder", "target_encoder", "predictor"}
    for name, state in found.items():
        norms = [float(steps.get(f"step{k}.norm.{name}", torch.zeros(()))) for k in range(3)]
        expected = sum(0.001 * 0.999 ** (2 - k) * norm**2 for k, norm in enumerate(norms))
        # float32 in the moments and in the recorded norms: about 1e-6 of each.
        assert float(state["exp_avg_sq"].double().sum()) == pytest.approx(expected, rel=1e-5), name
        assert state["step"] == (3 if expected else 0)
