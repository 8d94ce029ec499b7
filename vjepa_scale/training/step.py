"""One optimiser step, as the paper writes it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.objective.effective_rank import FeatureCovariance
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.parallel.fsdp import FsdpEngine


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of a step is not a number; nothing has moved."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank.

    stop: some rank has been asked to save and stop
    """

    loss: float
    grad_norm: float
    effective_rank: float | None
    stop: bool = False


def training_step(
    objective: Jepa,
    engine: FsdpEngine,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[MicroBatch],
    *,
    lr: float,
    clip_grad_norm: float | None = None,
    measure_rank: bool = False,
    stop_asked: bool = False,
    accidents: int = 0,
    settle: Callable[[], None] | None = None,
) -> StepResult:
    """Masks, target, context, prediction, loss (in ``objective.loss``); then gradient, step, EMA.

    batch: this rank's micro-batches, with their masks. The loss is the mean over all micro-batches of all
    ranks, which have equal size. All ranks judge the reduced loss and gradient before anything moves.
    stop_asked: this rank has been asked to stop; all ranks learn it with the loss, so they stop together.
    accidents: of this rank, in loading this batch; where any rank has some, all call ``settle`` before anything moves.
    Raises NonFiniteLossError where either is not finite.
    """
    observed = FeatureCovariance() if measure_rank else None
    total = torch.zeros((), device=engine.device)
    for index, micro_batch in enumerate(batch):
        with engine.accumulating(objective.trained.values(), last=index == len(batch) - 1):
            loss = objective.loss(micro_batch, observed) / len(batch)
            loss.backward()
        total += loss.detach()

    flags = torch.tensor([float(stop_asked), float(accidents)], device=engine.device)
    mean_loss, stop, unsettled = engine.mean(torch.cat([total[None], flags])).tolist()
    if unsettled > 0 and settle is not None:
        settle()
    parameters = [p for network in objective.trained.values() for p in network.parameters()]
    grad_norm = engine.grad_norm(parameters)
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise NonFiniteLossError(
            f"loss {mean_loss}, gradient norm {grad_norm}; weights, optimiser and EMA did not move"
        )
    if clip_grad_norm is not None and grad_norm > clip_grad_norm:
        engine.scale_gradients(parameters, clip_grad_norm / grad_norm)

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    objective.after_step()
    return StepResult(mean_loss, grad_norm, observed.effective_rank() if observed else None, stop > 0)
