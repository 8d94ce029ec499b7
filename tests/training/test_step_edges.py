"""A step's thresholds, on an engine that computes nothing: when gradients are clipped, dropped or refused."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from vjepa_scale.distributed.engine import Engine
from vjepa_scale.objective.objective import Objective
from vjepa_scale.training.step import (
    NonFiniteLossError,
    StepGradients,
    StepResult,
    apply_gradients,
    compute_gradients,
)

LIMIT = 2.0


class Recording:
    """An engine and an objective: gradients by clip group, and what was asked of them in order.

    ranks: in the group; of them this one alone asks for anything
    """

    device = torch.device("cpu")
    dp_rank = 0
    trained: Mapping[str, torch.nn.Module] = {}

    def __init__(self, gradients: Mapping[str, list[float]], ranks: int = 1) -> None:
        self.gradients = {group: torch.tensor(values, dtype=torch.float64) for group, values in gradients.items()}
        self.ranks = self.dp_world_size = ranks
        self.asked: list[str] = []
        self.micro_batches: list[tuple[float, bool]] = []

    def backward(self, loss: Callable[[], Tensor], *, share: float, last: bool) -> Tensor:
        self.micro_batches.append((share, last))
        return loss() * share

    def reduced(self, values: Tensor) -> tuple[list[float], dict[str, float]]:
        own = [self.ranks] * (len(values) - 2)  # loss and part are every rank's, all else is this one's
        norms = {group: float(gradient.norm()) for group, gradient in self.gradients.items()}
        return (values / torch.tensor([1.0, 1.0, *own])).tolist(), norms

    def _gradients(self) -> dict[str, list[Tensor]]:
        return {group: [gradient] for group, gradient in self.gradients.items()}

    def scale_gradients(self, factors: Mapping[str, float]) -> None:
        self.asked.append("scale")
        Engine.scale_gradients(cast("Engine", self), factors)

    def discard_gradients(self) -> None:
        self.asked.append("discard")

    def step(self, lr: float) -> None:
        self.asked.append(f"step {lr}")

    def loss(self, micro_batch: float, observed: object) -> dict[str, Tensor]:
        return {"loss": torch.tensor(micro_batch), "part": torch.tensor(10 * micro_batch)}

    def figures(self, reported: Mapping[str, float]) -> dict[str, float]:
        return {"twice": 2 * reported["part"]} if reported else {}

    def after_step(self) -> None:
        self.asked.append("after")


def apply(of: Recording, limit: float | None, *, loss: float = 1.0) -> StepResult:
    norms = {group: float(gradient.norm()) for group, gradient in of.gradients.items()}
    found = StepGradients(loss, norms, {}, {}, [0.0], stop=False, collapsed=False, failures=False, observe=None)
    return apply_gradients(cast("Objective", of), cast("Engine", of), found, lr=0.1, clip_grad_norm=limit)


def vector(norm: float) -> list[float]:
    return [0.6 * norm, -0.8 * norm]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, 1.0, 1.001, 1.5, 1000.0])
def test_a_gradient_is_clipped_above_the_limit_and_only_there(share: float) -> None:
    """share: of the limit. The judge is PyTorch's clip_grad_norm_, whose denominator has 1e-6 more."""
    ours = Recording({"all": vector(share * LIMIT)})
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = ours.gradients["all"].clone()
    torch.nn.utils.clip_grad_norm_([parameter], LIMIT)
    result = apply(ours, LIMIT)
    torch.testing.assert_close(ours.gradients["all"], parameter.grad, rtol=1e-6, atol=0)
    assert float(ours.gradients["all"].norm()) == pytest.approx(min(share, 1) * LIMIT, rel=1e-12)
    assert result.grad_norm == pytest.approx(share * LIMIT)  # before clipping
    assert ours.asked == [*["scale"][: share > 1], "step 0.1", "after"]


def test_without_a_limit_nothing_is_clipped() -> None:
    ours = Recording({"all": vector(1e30)})
    apply(ours, None)
    assert ours.gradients["all"].tolist() == vector(1e30)
    assert ours.asked == ["step 0.1", "after"]


def test_each_group_is_clipped_by_its_own_norm_and_a_lost_one_gets_zeros() -> None:
    ours = Recording({"small": vector(1.5), "large": vector(4.0), "largest": vector(8.0), "lost": [math.inf, 1.0]})
    result = apply(ours, LIMIT)
    assert ours.gradients["small"].tolist() == vector(1.5)
    assert ours.gradients["large"].tolist() == pytest.approx(vector(LIMIT))
    assert ours.gradients["largest"].tolist() == pytest.approx(vector(LIMIT))
    assert ours.gradients["lost"].tolist() == [0.0, 0.0]
    assert result.lost == ("lost",)
    assert result.grad_norm == pytest.approx(math.hypot(1.5, 4.0, 8.0))


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.inf, 1.0), (-math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_nothing_moves_where_the_loss_or_every_gradient_is_not_finite(loss: float, gradient: float) -> None:
    ours = Recording({"all": [gradient, 1.0]})
    with pytest.raises(NonFiniteLossError, match="did not move"):
        apply(ours, LIMIT, loss=loss)
    assert ours.asked == ["discard"]


def gradients_of(of: Recording, *losses: float, **values: Any) -> StepGradients:
    batch = cast("Any", losses)
    return compute_gradients(cast("Objective", of), cast("Engine", of), batch, **values)


def test_micro_batches_have_equal_shares_and_only_the_last_one_is_the_last() -> None:
    ours = Recording({"all": [1.0]})
    found = gradients_of(ours, 1.0, 2.0, 6.0)
    assert ours.micro_batches == [(pytest.approx(1 / 3), False)] * 2 + [(pytest.approx(1 / 3), True)]
    assert found.loss == pytest.approx(3.0)
    assert found.reported == {"part": pytest.approx(30.0)}
    ours = Recording({"all": [1.0]})
    gradients_of(ours, 1.0)
    assert ours.micro_batches == [(1.0, True)]


@pytest.mark.parametrize(
    ("stop", "collapsed", "failures"), [(False, False, 0), (True, False, 0), (False, True, 0), (False, False, 1)]
)
def test_one_rank_of_many_is_enough_to_stop_or_to_report_a_clip(stop: bool, collapsed: bool, failures: int) -> None:
    ours = Recording({"all": [1.0]}, ranks=1024)
    found = gradients_of(ours, 1.0, stop_asked=stop, collapsed=collapsed, failures=failures)
    assert (found.stop, found.collapsed, found.failures) == (stop, collapsed, failures > 0)


def test_each_rank_has_its_own_wait_and_counts_add_up() -> None:
    """The other ranks have counted nothing and not waited."""
    ours = Recording({"all": [1.0]}, ranks=4)
    ours.dp_rank = 2
    found = gradients_of(ours, 1.0, counts={"tokens": 3e17, "clips": 8}, waited_s=0.5)
    assert found.counts == {"tokens": pytest.approx(3e17, rel=1e-12), "clips": pytest.approx(8)}
    assert found.waited_s == pytest.approx([0, 0, 0.5, 0])
    result = apply_gradients(cast("Objective", ours), cast("Engine", ours), found, lr=0.1)
    assert result.parts == {"part": 10.0, "twice": 20.0}
