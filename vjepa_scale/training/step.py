"""One optimiser step, as the paper writes it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.objective.effective_rank import FeatureCovariance
from vjepa_scale.objective.objective import Objective
from vjepa_scale.parallel.engine import Engine


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of a step is not a number; nothing has moved."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank.

    parts: what the objective reports beside its loss
    stop:  some rank has been asked to save and stop
    """

    loss: float
    grad_norm: float
    effective_rank: float | None
    parts: dict[str, float] = field(default_factory=dict)
    stop: bool = False


def training_step(
    objective: Objective,
    engine: Engine,
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
    observed = FeatureCovariance() if measure_rank and objective.observes else None
    total = torch.zeros((), device=engine.device)
    sums: dict[str, Tensor] = {}

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        found = objective.loss(micro_batch, observed)
        for name, part in found.items():
            if name != "loss":
                sums[name] = sums.get(name, torch.zeros_like(total)) + part.detach() / len(batch)
        return found["loss"]

    for index, micro_batch in enumerate(batch):
        total += engine.backward(partial(loss_of, micro_batch), share=1 / len(batch), last=index == len(batch) - 1)

    flags = torch.tensor([float(stop_asked), float(accidents)], device=engine.device)
    mean_loss, stop, unsettled, *parts = engine.mean(torch.stack([total, *flags, *sums.values()])).tolist()
    if unsettled > 0 and settle is not None:
        settle()
    grad_norm = engine.grad_norm()
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        engine.discard_gradients()
        raise NonFiniteLossError(
            f"loss {mean_loss}, gradient norm {grad_norm}; weights, optimiser and EMA did not move"
        )
    if clip_grad_norm is not None and grad_norm > clip_grad_norm:
        engine.scale_gradients(clip_grad_norm / grad_norm)

    engine.step(lr)
    objective.after_step()
    rank = observed.effective_rank() if observed else None
    return StepResult(mean_loss, grad_norm, rank, dict(zip(sums, parts, strict=True)), stop > 0)
