"""Optimisers, and their state as named tensors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vjepa_scale.recipe.stage_sections import OptimizerConfig

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class GroupSetting(NamedTuple):
    """A network's own settings. lr_scale: factor on the step's learning rate"""

    lr_scale: float
    weight_decay: float


# The clip group of all networks without their own setting.
TOGETHER = ""


def clip_group(name: str, settings: Mapping[str, GroupSetting] | None) -> str:
    """Returns the clip group of a parameter: its network if that has its own setting, else one group for all others.

    Gradients are clipped by the norm of their clip group. If that is not finite, only this group skips the step.
    """
    network = name.partition(".")[0]
    return network if network in (settings or {}) else TOGETHER


def named_parameters(networks: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Returns all parameters of networks by canonical name: the network's prefix, then the parameter's name."""
    return [(f"{prefix}.{name}", p) for prefix, network in networks.items() for name, p in network.named_parameters()]


# Names of the per-parameter state in checkpoints: optimizer.<moment>.<parameter>
MOMENTS = ("exp_avg", "exp_avg_sq")


def _own_shape(parameter: nn.Parameter) -> Sequence[int]:
    return parameter.shape


def make_optimizer(
    cfg: OptimizerConfig,
    named_parameters: NamedParameters,
    shape: Callable[[nn.Parameter], Sequence[int]] = _own_shape,
    settings: Mapping[str, GroupSetting] | None = None,
    unreached: Collection[str] = (),
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Returns AdamW or SGD, in groups with weight decay and without. The caller sets the rate of each step (set_rate).

    shape:     returns the whole shape of a sharded parameter
    settings:  of networks with their own groups, by the prefix of their parameters' names
    unreached: parameters that no loss reaches, which get no decay. PyTorch's optimisers skip parameters without
               gradient, but an engine that gives them zero gradients would decay them
    fused:     AdamW in one kernel, for a GPU; otherwise in operations over lists of tensors
    """
    split: dict[tuple[str, GroupSetting], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        group = clip_group(name, settings)
        own = (settings or {}).get(group, GroupSetting(1.0, cfg.weight_decay))
        if name in unreached or not is_decayed(name, shape(parameter)):
            own = own._replace(weight_decay=0.0)
        split.setdefault((group, own), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "clip_group": group, "scheduled": own.weight_decay > 0 and group == TOGETHER}
        | own._asdict()
        for (group, own), parameters in split.items()
    ]
    if cfg.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, foreach=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps, foreach=not fused, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Sets the weight decay of the next step in groups that were created with one, without settings of their own."""
    for group in optimizer.param_groups:
        if group["scheduled"]:
            group["weight_decay"] = weight_decay


def build_optimizer(
    cfg: OptimizerConfig,
    named_parameters: NamedParameters,
    settings: Mapping[str, GroupSetting] | None = None,
    unreached: Collection[str] = (),
    fused: bool = False,
) -> torch.optim.Optimizer:
    """``make_optimizer`` with moments of zeros before the first step: checkpoints of any step have the same tensors."""
    optimizer = make_optimizer(cfg, named_parameters, settings=settings, unreached=unreached, fused=fused)
    if cfg.kind == "adamw":
        start_moments(optimizer, (parameter for group in optimizer.param_groups for parameter in group["params"]))
    return optimizer


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Sets AdamW's state before its first step: moments of zeros."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else None),
            **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
        }


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Returns whether a parameter has weight decay. As published, biases and 1-D parameters have none; mask tokens,
    [1, 1, P], have."""
    return len(shape) > 1 and not name.endswith("bias")


def optimizer_tensors(optimizer: torch.optim.Optimizer, named_parameters: NamedParameters) -> dict[str, Tensor]:
    """Returns the moments (not copies) as ``optimizer.exp_avg.<parameter>`` …; SGD has none."""
    return {
        f"optimizer.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named_parameters
        for moment in MOMENTS
        if moment in optimizer.state[parameter]
    }


def get_optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Returns the number of steps of the moments, for Adam's bias correction; 0 for SGD.

    The largest count is returned for all: a parameter that never had a gradient has moments of zero.
    """
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets the number of steps after the moments were loaded."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
