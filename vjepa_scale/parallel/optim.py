"""Optimisers over sharded parameters, and their state as named tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vjepa_scale.recipe.schema import OptimizerConfig

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def named_parameters(networks: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """All parameters of some networks by canonical name: the network's prefix, then the parameter's own name."""
    return [(f"{prefix}.{name}", p) for prefix, network in networks.items() for name, p in network.named_parameters()]


# Names of the per-parameter state in checkpoints: optimizer.<moment>.<parameter>
MOMENTS = ("exp_avg", "exp_avg_sq")


def _own_shape(parameter: nn.Parameter) -> Sequence[int]:
    return parameter.shape


def make_optimizer(
    cfg: OptimizerConfig, named_parameters: NamedParameters, shape: Callable[[nn.Parameter], Sequence[int]] = _own_shape
) -> torch.optim.Optimizer:
    """AdamW or plain SGD, in two groups: with weight decay and without. The caller sets the rate each step.

    shape: of a whole parameter, where it does not tell itself
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        (decayed if is_decayed(name, shape(parameter)) else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    if cfg.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, foreach=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps, foreach=True)


def build_optimizer(cfg: OptimizerConfig, named_parameters: NamedParameters) -> torch.optim.Optimizer:
    """``make_optimizer`` with moments from the start, as zeros: a checkpoint has the same tensors at any step."""
    optimizer = make_optimizer(cfg, named_parameters)
    if cfg.kind == "adamw":
        start_moments(optimizer, (parameter for group in optimizer.param_groups for parameter in group["params"]))
    return optimizer


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """AdamW's state before its first step."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
        }


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """As published: none on biases and 1-D parameters. Mask tokens, [1, 1, P], are decayed."""
    return len(shape) > 1 and not name.endswith("bias")


def optimizer_tensors(optimizer: torch.optim.Optimizer, named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The moments themselves, not copies, as ``optimizer.exp_avg.<parameter>`` …; SGD has none."""
    return {
        f"optimizer.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named_parameters
        for moment in MOMENTS
        if moment in optimizer.state[parameter]
    }


def get_optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps the moments have seen, which Adam's bias correction needs; 0 for SGD.

    One count for all: a parameter that never had a gradient counts less, but has nothing to correct.
    """
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Put the count back after the moments were loaded."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
