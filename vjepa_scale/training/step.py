"""One optimiser step, as in the paper, in two halves: gradients, which change no weights, and the update.

Between the halves all ranks have the same reduced values: the mean loss, the gradients' norms, and whether any rank has
a new decode failure or a stop request. So either all ranks update or none does.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.core.log import Laps, region
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.effective_rank import FeatureCovariance
from vjepa_scale.objective.objective import Objective


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients of a step are not finite; nothing was updated."""


@dataclass(frozen=True)
class StepGradients:
    """The results of a step's micro-batches, before the update. Equal on every rank, unless stated.

    loss:     the mean over all micro-batches of all ranks, which have equal size
    norms:    L2, by clip group (distributed/optim.py)
    reported: the objective's other scalars
    stop:     some rank has received a signal to save and stop
    failures: some rank has decode failures that the ledger does not have yet
    observed: features of this rank, if their effective rank is measured in this step
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
    """The results of one step. Equal on every rank, unless stated.

    lr:        the learning rate of the step
    effective_rank: if it is measured in this step; on rank 0 only
    grad_norm: of all finite gradients together
    parts:     the objective's other scalars
    lost:      clip groups whose gradient was not finite; it was set to zero
    stop:      some rank has received a signal to save and stop
    laps:      of this rank: forward, backward, reduce, optimizer, ema. On a GPU, "reduce" includes waiting for it
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
    """Runs both halves of a step. Raises NonFiniteLossError as ``apply_gradients``."""
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
    measure_rank: measure the effective rank of the target features
    stop_asked:   this rank has received a signal to stop; reduced with the loss, so all ranks stop together
    failures:     decode failures in this batch that the ledger does not have yet
    """
    observed = FeatureCovariance() if measure_rank and objective.observes else None
    total = torch.zeros((), device=engine.device)
    sums: dict[str, Tensor] = {}
    laps = Laps()

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        with region("forward"):
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
    with region("reduce"):
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
    """Check, clip, step, EMA. All ranks check the reduced loss and gradients before any update.

    clip_grad_norm: limit for each clip group (distributed/optim.py)
    Raises NonFiniteLossError if the loss is not finite, or no clip group has a finite gradient.
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

    with region("optimizer"):
        engine.step(lr)
    gradients.laps.lap("optimizer")
    with region("ema"):
        objective.after_step()
    gradients.laps.lap("ema")
    rank = gradients.observed.effective_rank() if gradients.observed else None
    norm = math.hypot(*finite.values())
    return StepResult(gradients.loss, lr, norm, rank, gradients.reported, lost, gradients.stop, gradients.laps)
