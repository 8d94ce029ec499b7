"""Optimisers, and their state as named tensors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vjepa_scale.recipe.stage_sections import OptimizerConfig

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class GroupSetting(NamedTuple):
    """What a network has of its own. lr_scale: its learning rate is the step's times this."""

    lr_scale: float
    weight_decay: float


# The clip group of all networks without a setting of their own.
TOGETHER = ""


def clip_group(name: str, settings: Mapping[str, GroupSetting] | None) -> str:
    """Of a parameter: its network, where that has a setting of its own, or all others together.

    A clip group learns by itself: its gradient is clipped by its own norm, and lost alone where it is not finite.
    """
    network = name.partition(".")[0]
    return network if network in (settings or {}) else TOGETHER


def named_parameters(networks: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """All parameters of some networks by canonical name: the network's prefix, then the parameter's own name."""
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
    """AdamW or plain SGD, in groups with weight decay and without. The caller sets the rate of each step (set_rate).

    shape:     of a whole parameter, where it does not tell itself
    settings:  of networks that have groups of their own, by the prefix of their parameters' names
    unreached: parameters that no loss reaches. PyTorch's optimisers skip what has no gradient; an engine that hands
               them zeros for it would decay these
    fused:     AdamW in one kernel, for a GPU; else in operations over lists of tensors
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
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """The weight decay of the next step, of the groups that were made with one and without settings of their own."""
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
    """``make_optimizer`` with moments from the start, as zeros: a checkpoint has the same tensors at any step."""
    optimizer = make_optimizer(cfg, named_parameters, settings=settings, unreached=unreached, fused=fused)
    if cfg.kind == "adamw":
        start_moments(optimizer, (parameter for group in optimizer.param_groups for parameter in group["params"]))
    return optimizer


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """AdamW's state before its first step."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else None),
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
