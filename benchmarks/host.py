"""Measures host time of a step at many ranks, in one process (PyTorch's fake group replaces the other ranks).

    optimiser   AdamW on one rank's shards of a model: on DTensors, PyTorch's default, and on plain tensors over the
                same memory, as in distributed/fsdp.py. Both include the arithmetic
    plan        rank 0's plan of a save for the shards of all ranks: computed, and cached from the save before
    rank        wait of a step for the effective rank: with its eigenvalues, and with a thread that computes them
    tables      rotary tables of a micro-batch's five forward passes: computed, and cached

Milliseconds, medians.

    OMP_NUM_THREADS=1 python benchmarks/host.py --model vit_giant --ranks 128
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from vjepa_scale.checkpoint import store
from vjepa_scale.core.errors import run_command
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model import positions
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Recipe, load_recipe, stages_of

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_giant", help="a name of an encoder")
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(
        ROOT / "recipes" / "vitg_256.yaml",
        [
            f"model.encoder={arguments.model}",
            "engine.device=cpu",
            "engine.compile=false",
            "engine.replicate=1",
            *arguments.overrides,
        ],
    )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=arguments.ranks, store=FakeStore())
    ranks = Ranks(1, arguments.ranks, 1, 8, "benchmark", "submitit-local", "benchmark")
    print(f"{arguments.model}, rank 1 of {arguments.ranks}, torch {torch.__version__}; ms\n")
    print("| | the first way | this code |\n|---|---|---|", flush=True)
    engine = build_engine(recipe.engine, ranks)
    objective = Jepa(stages_of(recipe)["pretrain"], engine)
    engine.start_optimizer(recipe.optimizer, objective.trained, unreached=objective.unreached)
    row("optimiser", *optimiser(engine, objective, arguments.repeats))
    row("plan", *plan(engine, objective, arguments.ranks))
    dist.destroy_process_group()
    row("rank", *effective_rank(recipe, arguments.repeats))
    row("tables", *tables(arguments.repeats))
    return 0


def row(name: str, before: float, now: float) -> None:
    print(f"| {name} | {before:.1f} | {now:.1f} |", flush=True)


def median_ms(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def optimiser(engine: Engine, objective: Jepa, repeats: int) -> tuple[float, float]:
    parameters = [p for network in objective.trained.values() for p in network.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    plain = torch.optim.AdamW(parameters, lr=0.0, foreach=True)

    def give() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def on_dtensors() -> None:
        give()
        plain.step()
        plain.zero_grad()

    def on_shards() -> None:
        give()
        engine.step(0.0)

    return median_ms(on_dtensors, repeats), median_ms(on_shards, repeats)


def plan(engine: Engine, objective: Jepa, ranks: int) -> tuple[float, float]:
    tensors = engine.tensors(objective.networks, optimizer=True)
    times = []
    for planner in (dcp.DefaultSavePlanner(), store.planner()):
        planner.set_up_planner(tensors, is_coordinator=True)
        of_ranks = [_of_rank(planner.create_local_plan(), rank, ranks) for rank in range(ranks)]
        began = time.perf_counter()
        whole, _ = planner.create_global_plan(of_ranks)
        planner.finish_plan(whole[0])
        times.append(1000 * (time.perf_counter() - began))
    began = time.perf_counter()
    assert not planner.create_local_plan().usable, "the plan of the save before is kept"
    planner.create_global_plan([SavePlan([], usable=False)] * ranks)
    return times[0], 1000 * (time.perf_counter() - began)


def _of_rank(plan: SavePlan, rank: int, ranks: int) -> SavePlan:
    """Returns the plan for the same tensors' shards on another rank."""
    items = []
    for item in plan.items:
        assert item.tensor_data is not None
        rows, *rest = item.tensor_data.size
        share = -(-rows // ranks)
        first = min(rank * share, rows)
        chunk = ChunkStorageMetadata(
            torch.Size((first, *[0] * len(rest))), torch.Size((min(share, rows - first), *rest))
        )
        if chunk.sizes[0]:
            index = replace(item.index, offset=chunk.offsets, index=None)
            items.append(replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk)))
    return replace(plan, items=items)


def effective_rank(recipe: Recipe, repeats: int) -> tuple[float, float]:
    width, grid = recipe.model.encoder.width, (8, 8, 8)
    features = torch.randn(2 * width // 256, 512, width, generator=torch.Generator().manual_seed(0))
    pending: list[Future[dict[str, float]] | None] = []

    def measured() -> Future[dict[str, float]] | None:
        observe = Observation()
        observe.add_target(features, grid)
        return observe.measured(features.device)

    def begun() -> None:
        if pending:
            pending.pop().result()  # type: ignore[union-attr]
        began = time.perf_counter()
        pending.append(measured())
        waited.append(1000 * (time.perf_counter() - began))

    waited: list[float] = []
    whole = median_ms(lambda: measured().result(), repeats)  # type: ignore[union-attr]
    for _ in range(repeats):
        begun()
    return whole, statistics.median(waited)


def tables(repeats: int) -> tuple[float, float]:
    """Times the tables of five forward passes: target, and context and predictor for both generators."""
    index = torch.arange(512).expand(24, -1)

    def five() -> None:
        for _ in range(5):
            positions.rope_tables(index, grid=(8, 16, 16), head_dim=64, layout="tiled")

    def anew() -> None:
        with patch.dict(positions._kept, clear=True):
            five()

    return median_ms(anew, repeats), median_ms(five, repeats)


if __name__ == "__main__":
    run_command(main)
