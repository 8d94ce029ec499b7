"""One optimiser step, as in the paper, in two halves: gradients, which change no weights, and the update.

Between the halves all ranks have the same reduced values: the mean loss, the gradients' norms, and whether any rank has
a new decode failure or a stop request. So either all ranks update or none does.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.core.log import Laps, region
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.objective.objective import Objective


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients of a step are not finite; nothing was updated."""


@dataclass(frozen=True)
class StepGradients:
    """The results of a step's micro-batches, before the update. Equal on every rank, unless stated.

    loss:     the mean over all micro-batches of all ranks, which have equal size
    norms:    L2, by clip group (distributed/optim.py)
    reported: the objective's other scalars
    counts:   sums over all ranks of what the caller counted
    waited_s: of each rank, what the caller measured
    stop:     some rank has received a signal to save and stop
    collapsed: rank 0 has seen a collapse that the run must end at
    failures: some rank has decode failures that the ledger does not have yet
    observe:  features of this rank, in a step in which they are measured
    laps:     of this rank: forward, backward, reduce
    """

    loss: float
    norms: dict[str, float]
    reported: dict[str, float]
    counts: dict[str, float]
    waited_s: list[float]
    stop: bool
    collapsed: bool
    failures: bool
    observe: Observation | None
    laps: Laps = field(default_factory=Laps)


@dataclass(frozen=True)
class StepResult:
    """The results of one step. Equal on every rank, unless stated.

    lr:        the learning rate of the step
    measured:  further columns of metrics.jsonl, in a step in which they are measured; on rank 0 only
    grad_norm: of all finite gradients together
    parts:     the objective's other scalars
    counts, waited_s: as in StepGradients
    skipped:   the step has changed nothing, since it is a spike
    lost:      clip groups whose gradient was not finite; it was set to zero
    stop:      some rank has received a signal to save and stop
    laps:      of this rank: forward, backward, reduce, optimizer, ema. On a GPU, "reduce" includes waiting for it
    """

    loss: float
    lr: float
    grad_norm: float
    measured: Future[dict[str, float]] | None
    parts: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    waited_s: list[float] = field(default_factory=list)
    skipped: bool = False
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
    observe: Observation | None = None,
) -> StepResult:
    """Runs both halves of a step. Raises NonFiniteLossError as ``apply_gradients``."""
    gradients = compute_gradients(objective, engine, batch, observe=observe)
    return apply_gradients(objective, engine, gradients, lr=lr, clip_grad_norm=clip_grad_norm)


def compute_gradients(
    objective: Objective,
    engine: Engine,
    batch: Sequence[MicroBatch],
    *,
    observe: Observation | None = None,
    counts: Mapping[str, float] | None = None,
    waited_s: float = 0.0,
    stop_asked: bool = False,
    collapsed: bool = False,
    failures: int = 0,
) -> StepGradients:
    """Masks, target, context, prediction, loss (in ``objective.loss``), gradients; averaged over ranks.

    batch:      this rank's micro-batches, with their masks
    observe:    in a step in which features are measured; on all ranks or none
    counts:     figures of this rank to add up over the ranks, the same names on each
    waited_s:   how long this rank waited for the batch
    stop_asked, collapsed: this rank asks all to stop; reduced with the loss, so all ranks stop together
    failures:   decode failures in this batch that the ledger does not have yet
    """
    counts = counts or {}
    total = torch.zeros((), device=engine.device)
    sums: dict[str, Tensor] = {}
    laps = Laps()

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        with region("forward"):
            found = objective.loss(micro_batch, observe)
        for name, part in found.items():
            if name != "loss":
                sums[name] = sums.get(name, torch.zeros_like(total)) + part.detach() / len(batch)
        laps.lap("forward")
        return found["loss"]

    for index, micro_batch in enumerate(batch):
        total += engine.backward(partial(loss_of, micro_batch), share=1 / len(batch), last=index == len(batch) - 1)
        laps.lap("backward")

    if observe is not None:
        with region("observe"):
            objective.observe_networks(observe)
        laps.lap("observe")
    # One collective and one wait for the device. It sums, so each rank's own figure has its own place.
    ranks, own = engine.dp_world_size, [0.0] * engine.dp_world_size
    own[engine.dp_rank] = waited_s
    of_host = torch.tensor(
        [float(stop_asked), float(collapsed), float(failures), *counts.values(), *own], dtype=torch.float64
    )
    of_device = torch.stack([total, *sums.values()])
    with region("reduce"):
        values, norms = engine.reduced(torch.cat([of_device, of_host.to(of_device.device, non_blocking=True)]))
    laps.lap("reduce")
    (loss, *parts), (stop, collapse, failed, *rest) = values[: len(of_device)], values[len(of_device) :]
    summed = [value * ranks for value in rest]
    return StepGradients(
        loss,
        norms,
        reported=dict(zip(sums, parts, strict=True)),
        counts=dict(zip(counts, summed[: len(counts)], strict=True)),
        waited_s=summed[len(counts) :],
        stop=stop > 0,
        collapsed=collapse > 0,
        failures=failed > 0,
        observe=observe,
        laps=laps,
    )


def skip_step(objective: Objective, engine: Engine, gradients: StepGradients, *, lr: float) -> StepResult:
    """Discards the gradients: weights, optimiser and EMA do not move. The row of the step has what was seen."""
    engine.discard_gradients()
    return _result(objective, gradients, lr, grad_norm=math.hypot(*gradients.norms.values()), skipped=True)


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

    observe, trained = gradients.observe, list(objective.trained.values())
    before = engine.weight_sample(trained) if observe is not None else None
    with region("optimizer"):
        engine.step(lr)
    gradients.laps.lap("optimizer")
    with region("ema"):
        objective.after_step()
    gradients.laps.lap("ema")
    measured = None
    if observe is not None and before is not None:
        with region("observe"):
            after, counts = engine.weight_sample(trained)
            observe.add_update(before[0], after, counts)
            measured = observe.measured(engine.device)
        gradients.laps.lap("observe")
    return _result(objective, gradients, lr, grad_norm=math.hypot(*finite.values()), measured=measured, lost=lost)


def _result(
    objective: Objective,
    gradients: StepGradients,
    lr: float,
    *,
    grad_norm: float,
    measured: Future[dict[str, float]] | None = None,
    lost: tuple[str, ...] = (),
    skipped: bool = False,
) -> StepResult:
    return StepResult(
        gradients.loss,
        lr,
        grad_norm=grad_norm,
        measured=measured,
        parts=gradients.reported | objective.figures(gradients.reported),
        counts=gradients.counts,
        waited_s=gradients.waited_s,
        skipped=skipped,
        lost=lost,
        stop=gradients.stop,
        laps=gradients.laps,
    )
