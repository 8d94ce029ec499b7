"""One optimiser step, as the paper writes it."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.effective_rank import FeatureCovariance
from vjepa_scale.objective.objective import Objective


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients of a step are not numbers; nothing has moved."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank.

    effective_rank: where it was asked for, on rank 0 alone
    grad_norm: of all gradients together that are finite
    parts:     what the objective reports beside its loss
    lost:      of several networks that learn each by itself, those whose gradient was not finite: they got zeros
    stop:      some rank has been asked to save and stop
    """

    loss: float
    grad_norm: float
    effective_rank: Future[float] | None
    parts: dict[str, float] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
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
    clip_grad_norm: of each part of the networks that learns by itself (optim.part_of)
    Raises NonFiniteLossError where the loss is not finite, and where no part's gradient is.
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

    flags = (total.new_full((), value) for value in (float(stop_asked), float(accidents)))
    (mean_loss, stop, unsettled, *parts), norms = engine.reduced(torch.stack([total, *flags, *sums.values()]))
    if unsettled > 0 and settle is not None:
        settle()
    finite = {part: norm for part, norm in norms.items() if math.isfinite(norm)}
    if not (math.isfinite(mean_loss) and finite):
        engine.discard_gradients()
        found = ", ".join(str(norm) for norm in norms.values())
        raise NonFiniteLossError(f"loss {mean_loss}, gradient norm {found}; weights, optimiser and EMA did not move")
    lost = tuple(part for part in norms if part not in finite)
    clipped = {part: clip_grad_norm / norm for part, norm in finite.items() if clip_grad_norm and norm > clip_grad_norm}
    if factors := clipped | dict.fromkeys(lost, 0.0):
        engine.scale_gradients(factors)

    engine.step(lr)
    objective.after_step()
    rank = observed.effective_rank() if observed else None
    reported = dict(zip(sums, parts, strict=True))
    return StepResult(mean_loss, math.hypot(*finite.values()), rank, reported, lost, stop > 0)
