"""One optimiser step, as the paper writes it, in two halves: gradients, which move nothing, and the move.

Between them all ranks know the same: the mean loss, the gradients' norms, and whether a clip did not decode anywhere or
a stop was asked for. So all of them go on, or none.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.core.log import Laps
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.effective_rank import FeatureCovariance
from vjepa_scale.objective.objective import Objective


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients of a step are not numbers; nothing has moved."""


@dataclass(frozen=True)
class StepGradients:
    """What one step's micro-batches gave, equal on every rank. Nothing has moved.

    loss:     the mean over all micro-batches of all ranks, which have equal size
    norms:    L2, by clip group (distributed/optim.py)
    reported: what the objective reports beside its loss
    stop:     some rank has been asked to save and stop
    failures: some rank has had clips that do not decode and that the run does not know of yet
    observed: features of this rank, where their effective rank is asked for
    laps:     of this rank: forward, backward, reduce
    """

    loss: float
    norms: dict[str, float]
    reported: dict[str, float]
    stop: bool
    failures: bool
    observed: FeatureCovariance | None
    laps: Laps = field(default_factory=Laps)


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank.

    lr:        the learning rate of the step
    effective_rank: where it was asked for, on rank 0 alone
    grad_norm: of all gradients together that are finite
    parts:     what the objective reports beside its loss
    lost:      of several networks that learn each by itself, those whose gradient was not finite: they got zeros
    stop:      some rank has been asked to save and stop
    laps:      of this rank: forward, backward, reduce, optimizer, ema. On a GPU, "reduce" has the wait for it
    """

    loss: float
    lr: float
    grad_norm: float
    effective_rank: Future[float] | None
    parts: dict[str, float] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    stop: bool = False
    laps: Laps = field(default_factory=Laps)


def training_step(
    objective: Objective,
    engine: Engine,
    batch: Sequence[MicroBatch],
    *,
    lr: float,
    clip_grad_norm: float | None = None,
    measure_rank: bool = False,
) -> StepResult:
    """Both halves of a step. Raises NonFiniteLossError where nothing could be learned."""
    gradients = compute_gradients(objective, engine, batch, measure_rank=measure_rank)
    return apply_gradients(objective, engine, gradients, lr=lr, clip_grad_norm=clip_grad_norm)


def compute_gradients(
    objective: Objective,
    engine: Engine,
    batch: Sequence[MicroBatch],
    *,
    measure_rank: bool = False,
    stop_asked: bool = False,
    failures: int = 0,
) -> StepGradients:
    """Masks, target, context, prediction, loss (in ``objective.loss``), gradients; averaged over ranks.

    batch:        this rank's micro-batches, with their masks
    measure_rank: look at the effective rank of the target features
    stop_asked:   this rank has been asked to stop; all ranks learn it with the loss, so they stop together
    failures:     clips of this batch that did not decode, and that the run does not know of yet
    """
    observed = FeatureCovariance() if measure_rank and objective.observes else None
    total = torch.zeros((), device=engine.device)
    sums: dict[str, Tensor] = {}
    laps = Laps()

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        found = objective.loss(micro_batch, observed)
        for name, part in found.items():
            if name != "loss":
                sums[name] = sums.get(name, torch.zeros_like(total)) + part.detach() / len(batch)
        laps.lap("forward")
        return found["loss"]

    for index, micro_batch in enumerate(batch):
        total += engine.backward(partial(loss_of, micro_batch), share=1 / len(batch), last=index == len(batch) - 1)
        laps.lap("backward")

    flags = (total.new_full((), value) for value in (float(stop_asked), float(failures)))
    (loss, stop, failed, *parts), norms = engine.reduced(torch.stack([total, *flags, *sums.values()]))
    laps.lap("reduce")
    return StepGradients(loss, norms, dict(zip(sums, parts, strict=True)), stop > 0, failed > 0, observed, laps)


def apply_gradients(
    objective: Objective,
    engine: Engine,
    gradients: StepGradients,
    *,
    lr: float,
    clip_grad_norm: float | None = None,
) -> StepResult:
    """Check, clip, step, EMA. All ranks judge the reduced loss and gradients before anything moves.

    clip_grad_norm: of each clip group (distributed/optim.py)
    Raises NonFiniteLossError where the loss is not finite, and where no part's gradient is.
    """
    finite = {group: norm for group, norm in gradients.norms.items() if math.isfinite(norm)}
    if not (math.isfinite(gradients.loss) and finite):
        engine.discard_gradients()
        found = ", ".join(str(norm) for norm in gradients.norms.values())
        raise NonFiniteLossError(
            f"loss {gradients.loss}, gradient norm {found}; weights, optimiser and EMA did not move"
        )
    lost = tuple(group for group in gradients.norms if group not in finite)
    limit = clip_grad_norm or math.inf
    clipped = {group: limit / norm for group, norm in finite.items() if norm > limit}
    if factors := clipped | dict.fromkeys(lost, 0.0):
        engine.scale_gradients(factors)

    engine.step(lr)
    gradients.laps.lap("optimizer")
    objective.after_step()
    gradients.laps.lap("ema")
    rank = gradients.observed.effective_rank() if gradients.observed else None
    norm = math.hypot(*finite.values())
    return StepResult(gradients.loss, lr, norm, rank, gradients.reported, lost, gradients.stop, gradients.laps)
