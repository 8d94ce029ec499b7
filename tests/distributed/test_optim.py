"""Optimisers: which parameters decay, state as named tensors, and AdamW on shards against torch's on whole tensors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed.jepa_shape import MODEL, batch, start
from tests.processes import ENGINE, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.fsdp import FsdpEngine
from vjepa_scale.distributed.optim import (
    GroupSetting,
    build_optimizer,
    get_optimizer_steps,
    make_optimizer,
    optimizer_tensors,
    set_optimizer_steps,
    set_weight_decay,
)
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.stage_sections import OptimizerConfig


def named_parameters() -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{prefix}.{name}", parameter)
        for prefix, network in {"encoder": Encoder(MODEL), "predictor": Predictor(MODEL)}.items()
        for name, parameter in network.named_parameters()
    ]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_biases_and_norms_do_not_decay_and_mask_tokens_do(kind: str) -> None:
    named = named_parameters()
    optimizer = build_optimizer(OptimizerConfig(kind=kind, weight_decay=0.5), named)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(named)
    for name, parameter in named:
        norm = "norm" in name
        assert decay[id(parameter)] == (0.0 if norm or name.endswith(".bias") else 0.5), name
    assert any("mask_tokens" in name and decay[id(p)] == 0.5 for name, p in named)


def test_state_is_there_before_the_first_step_and_is_no_copy() -> None:
    named = named_parameters()
    optimizer = build_optimizer(OptimizerConfig(), named)
    tensors = optimizer_tensors(optimizer, named)
    assert tensors.keys() == {f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name, _ in named}
    assert all(not tensor.any() and not tensor.requires_grad for tensor in tensors.values())
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(tensors["optimizer.exp_avg.encoder.norm.bias"][0]) == pytest.approx(0.1)
    assert get_optimizer_steps(optimizer) == 1


def test_restored_moments_and_count_continue_exactly() -> None:
    named = named_parameters()
    optimizer = build_optimizer(OptimizerConfig(), named)

    def step(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()

    step(optimizer, named, 0)
    step(optimizer, named, 1)
    copied = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in named]
    restored = build_optimizer(OptimizerConfig(), copied)
    for name, tensor in optimizer_tensors(restored, copied).items():
        tensor.copy_(optimizer_tensors(optimizer, named)[name])
    set_optimizer_steps(restored, get_optimizer_steps(optimizer))
    step(optimizer, named, 2)
    step(restored, copied, 2)
    for (name, original), (_, again) in zip(named, copied, strict=True):
        assert torch.equal(original, again), name


def test_sgd_has_no_state() -> None:
    named = named_parameters()
    optimizer = build_optimizer(OptimizerConfig(kind="sgd"), named)
    set_optimizer_steps(optimizer, 7)
    assert optimizer_tensors(optimizer, named) == {}
    assert get_optimizer_steps(optimizer) == 0


def _mean_square(encoder: nn.Module, step: int) -> torch.Tensor:
    return encoder(batch(step)[0]).square().mean()


def _adamw_on_shards(ranks: Ranks) -> tuple[list[torch.Tensor], list[bool]]:
    engine = FsdpEngine(ENGINE, ranks)
    with torch.device("meta"):
        encoder = Encoder(MODEL)
    engine.shard(encoder, name="encoder", seed=0, trainable=True, initial_value=start)
    engine.start_optimizer(OptimizerConfig(), {"encoder": encoder})
    for step in range(3):
        engine.backward(partial(_mean_square, encoder, step), share=1.0, last=True)
        engine.step(1e-3)
    state = engine.tensors({"encoder": encoder}, optimizer=True)
    named = list(encoder.named_parameters())
    alike = [
        isinstance(moment, DTensor) and (moment.placements, moment.dtype) == (p.placements, torch.float32)  # type: ignore[attr-defined]
        for name, p in named
        for moment in (state[f"optimizer.exp_avg.encoder.{name}"], state[f"optimizer.exp_avg_sq.encoder.{name}"])
    ]
    return [p.full_tensor().detach() for _, p in named], alike  # type: ignore[attr-defined]


@pytest.mark.distributed
def test_adamw_on_shards_equals_adamw_on_whole_tensors() -> None:
    plain = Encoder(MODEL)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(start(f"encoder.{name}", parameter.shape, seed=0))
    flat = [p for name, p in plain.named_parameters() if name.endswith("bias") or p.ndim == 1]
    rest = [p for p in plain.parameters() if not any(p is other for other in flat)]
    optimizer = torch.optim.AdamW(
        [{"params": flat, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.04}], lr=1e-3, betas=(0.9, 0.999)
    )
    for step in range(3):
        plain(batch(step)[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, alike = run_processes(_adamw_on_shards, 2)[0]
    assert all(alike)
    for (name, wanted), found in zip(plain.named_parameters(), weights, strict=True):
        # The true gradient of a key's bias is zero: Adam makes steps of full size out of rounding noise.
        difference = (found - wanted.detach()).abs()
        if name.endswith("qkv.bias"):
            difference[MODEL.encoder.width : 2 * MODEL.encoder.width] = 0
        assert float(difference.max()) < 2e-5, name


def test_a_schedule_leaves_networks_with_settings_alone() -> None:
    """Their weight decay is their own: of three networks, a probe's group keeps 0.3 and a rate of its own scale."""
    networks = {name: nn.Linear(2, 2) for name in ("encoder", "predictor", "probe")}
    settings = {"probe": GroupSetting(0.1, 0.3)}
    named = [(f"{name}.{n}", p) for name, network in networks.items() for n, p in network.named_parameters()]
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), named, settings=settings)
    set_weight_decay(optimizer, 0.2)
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [of[id(network.weight)] for network in networks.values()] == [0.2, 0.2, 0.3]
    assert [of[id(network.bias)] for network in networks.values()] == [0.0, 0.0, 0.0]
