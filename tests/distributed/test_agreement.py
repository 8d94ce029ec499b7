"""Sharded training is the same training: against plain PyTorch on one process, for every way to shard.

Tolerances: loss 1e-5 relative and gradient norm 1e-4, for float32 sums in another order over a few steps; weights
and EMA 1e-5 with SGD. AdamW divides by the gradient's size, so where the true gradient is 0 it makes whole steps out
of rounding noise: with it only loss and norm are compared. The planted bugs show that these tolerances can fail.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.jepa_shape import Outcome, train_plain, train_sharded
from tests.processes import ENGINE, LIMIT_S, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.distributed.optim import TOGETHER
from vjepa_scale.recipe.schema import EngineConfig

# Inductor's C++ compiles for minutes where nothing is cached and the machine is busy.
COMPILING_S = 5 * int(LIMIT_S)

WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "1 process": (1, {}),
    "2 ranks": (2, {}),
    "4 ranks": (4, {}),
    "hybrid 2x2": (4, {"replicate": 2}),
    "plain replication": (2, {"replicate": 2}),
    "weights kept gathered": (2, {"reshard_after_forward": False}),
    "a copy per pair, kept gathered": (4, {"replicate": 2, "reshard_after_forward": "auto"}),
    "sharded as a whole": (2, {"shard_blocks": False}),
    "activation checkpointing": (2, {"activation_checkpointing": "full"}),
    "selective checkpointing": (2, {"activation_checkpointing": "selective"}),
    "compiled": (2, {"compile": True, "activation_checkpointing": "full", "timeout_s": COMPILING_S}),
    "ZeRO 1": (2, {"kind": "deepspeed", "zero_stage": 1}),
    "ZeRO 2": (2, {"kind": "deepspeed", "zero_stage": 2}),
    "ZeRO 3": (2, {"kind": "deepspeed", "zero_stage": 3}),
    "ZeRO 3, activation checkpointing": (
        2,
        {"kind": "deepspeed", "zero_stage": 3, "activation_checkpointing": "full"},
    ),
}
RATES = {"sgd": 0.3, "adamw": 0.01}
# One of FSDP2 in make test; the table is make test-full's. SGD tells more than AdamW, which three ways are enough for.
FAST = {("2 ranks", "sgd"), ("hybrid 2x2", "sgd")}
COMPILED = [pytest.mark.system("compiler"), pytest.mark.timeout(COMPILING_S + 60)]
ROWS = [(way, kind) for way in WAYS for kind in RATES if kind == "sgd" or way in ("2 ranks", "ZeRO 2", "ZeRO 3")]
TABLE = [
    pytest.param(
        way,
        kind,
        marks=[*([] if (way, kind) in FAST else [pytest.mark.slow]), *(COMPILED if way == "compiled" else [])],
    )
    for way, kind in ROWS
]

Plain = dict[str, Outcome]
Plant = Callable[[Engine], None]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def plain() -> Plain:
    outcomes = {kind: train_plain(kind, rate) for kind, rate in RATES.items()}
    for outcome in outcomes.values():
        assert outcome.losses[0] - outcome.losses[-1] > 0.05 * outcome.losses[0]  # else little would be compared
    return outcomes


def _trained(ranks: Ranks, jobs: list[tuple[EngineConfig, str, Plant | None]]) -> list[Outcome]:
    return [train_sharded(ranks, cfg, kind, RATES[kind], plant) for cfg, kind, plant in jobs]


def sharded(jobs: Sequence[tuple[str, str, Plant | None]]) -> list[list[Outcome]]:
    """(way, optimizer, bug) of some jobs, all in one start of a group → the outcomes of every rank, for each job."""
    (world_size,) = {WAYS[way][0] for way, _, _ in jobs}
    tasks = [(ENGINE.model_copy(update=WAYS[way][1]), kind, plant) for way, kind, plant in jobs]
    cfg = tasks[0][0]  # its time limit, of the group
    ranks = run_processes(_trained, world_size, tasks, cfg=cfg, timeout_s=float(cfg.timeout_s))
    return [list(outcomes) for outcomes in zip(*ranks, strict=True)]


@functools.cache
def _outcomes(world_size: int, apart: object) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes of the table's rows that start together: with DeepSpeed, say, a start takes seconds."""
    rows = [row for row in ROWS if _start_of(*row) == (world_size, apart)]
    return dict(zip(rows, sharded([(*row, None) for row in rows]), strict=True))


def _start_of(way: str, kind: str) -> tuple[int, object]:
    """Rows of one start: those of DeepSpeed, whose import takes seconds. Each of FSDP2 has a start of its own."""
    world_size, changes = WAYS[way]
    alone = changes.get("kind") != "deepspeed"
    return world_size, (way, kind) if alone else "deepspeed"


def differences(outcome: Outcome, wanted: Outcome) -> dict[str, float]:
    """The largest ones: of loss and norm relative, of weights and EMA absolute."""
    assert outcome.weights.keys() == wanted.weights.keys()
    apart = {name: float((outcome.weights[name] - value).abs().max()) for name, value in wanted.weights.items()}
    return {
        "loss": max(abs(a - b) / b for a, b in zip(outcome.losses, wanted.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(outcome.norms, wanted.norms, strict=True)),
        "weights": max(value for name, value in apart.items() if not name.startswith("target_")),
        "EMA": max(value for name, value in apart.items() if name.startswith("target_")),
    }


def agree(found: dict[str, float], kind: str) -> bool:
    close = found["loss"] < 1e-5 and found["norm"] < 1e-4
    return close and (kind != "sgd" or max(found["weights"], found["EMA"]) < 1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(("way", "kind"), TABLE)
def test_training_equals_plain_pytorch(way: str, kind: str, plain: Plain, record_property: Record) -> None:
    outcomes = _outcomes(*_start_of(way, kind))[way, kind]
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms) == (outcomes[0].losses, outcomes[0].norms)
    found = differences(outcomes[0], plain[kind])
    record_property("measured", ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    assert agree(found, kind), found


# -- planted bugs ------------------------------------------------------------------------------------


def _summed(engine: Engine) -> None:
    """Gradients summed over ranks, not averaged (gloo has done so)."""
    right = engine.backward

    def backward(loss: Any, *, share: float, last: bool) -> torch.Tensor:
        value = right(loss, share=share, last=last)
        if last:
            engine.scale_gradients({TOGETHER: float(engine.dp_world_size)})
        return value

    engine.backward = backward  # type: ignore[method-assign]


def _zeros_are_gradients(engine: Engine) -> None:
    """A parameter that no loss reaches has a gradient of zeros, and decays (what ZeRO does if nobody tells it)."""
    start = engine.start_optimizer

    def start_optimizer(cfg: Any, trained: Any, settings: Any = None, unreached: Any = ()) -> None:
        start(cfg, trained, settings)

    engine.start_optimizer = start_optimizer  # type: ignore[method-assign]


def _no_ema(engine: Engine) -> None:
    engine.ema_update = lambda target, source, momentum: None  # type: ignore[method-assign]


def _stale_ema(engine: Engine) -> None:
    """The average goes into copies of the weights that were taken while they were gathered."""
    copies: dict[nn.Module, list[torch.Tensor]] = {}

    def ema_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
        ours, theirs = (list(engine.tensors({"n": n}, optimizer=False).values()) for n in (target, source))
        stale = copies.setdefault(target, [value.full_tensor().clone() for value in ours])  # type: ignore[attr-defined]
        torch._foreach_lerp_(stale, [value.full_tensor() for value in theirs], 1 - momentum)  # type: ignore[attr-defined]

    engine.ema_update = ema_update  # type: ignore[method-assign]


def _misaligned(engine: Engine) -> None:
    """Each block of the teacher averages another block of the student."""
    match, right = engine.match_ema, engine.ema_update

    def ema_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
        blocks = target.blocks
        assert isinstance(blocks, nn.ModuleList)
        blocks._modules = dict(zip(blocks._modules, reversed(list(blocks)), strict=True))
        match(target, source)
        right(target, source, momentum)
        blocks._modules = dict(zip(blocks._modules, reversed(list(blocks)), strict=True))

    engine.match_ema = lambda target, source: None  # type: ignore[method-assign]
    engine.ema_update = ema_update  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["2 ranks", "ZeRO 3"])
def test_planted_bugs_are_seen(way: str, plain: Plain) -> None:
    plants = [_summed, _no_ema, _stale_ema, _misaligned]
    for plant, outcomes in zip(plants, sharded([(way, "sgd", plant) for plant in plants]), strict=True):
        found = differences(outcomes[0], plain["sgd"])
        assert not agree(found, "sgd"), (plant, found)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_must_be_told_what_no_loss_reaches(plain: Plain) -> None:
    for outcomes in sharded([(f"ZeRO {stage}", "sgd", _zeros_are_gradients) for stage in (1, 3)]):
        found = differences(outcomes[0], plain["sgd"])
        assert not agree(found, "sgd"), found
