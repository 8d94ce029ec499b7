"""Measures what the metrics of a step cost: steps of the demo's pretraining with and without them, alternating.

    plain      a step that returns its loss and gradient norm only
    counted    with the columns that every row has: counts and waits in the step's one reduction, speed, a row written
    measured   with the columns of log.effective_rank_every too: covariances, losses of clips, distances of weights

Medians of one process, milliseconds. The cost of a step is that of a counted one, and of a measured one every n steps.

    OMP_NUM_THREADS=2 python benchmarks/watching.py [--steps 60] [key=value …]
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from step import random_batch

from vjepa_scale.core.errors import run_command
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Phase, Recipe, load_recipe, stages_of
from vjepa_scale.run.metrics import MetricsLog
from vjepa_scale.training.step import apply_gradients, compute_gradients
from vjepa_scale.training.throughput import Throughput, memory

ROOT = Path(__file__).parents[1]
KINDS = ("plain", "counted", "measured")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each kind")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the demo's recipe")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", arguments.overrides)
    torch.set_num_threads(recipe.engine.threads)
    phase = stages_of(recipe)["pretrain"].phases[-1]
    with tempfile.TemporaryDirectory() as folder:
        process_group.start(detect_ranks(), recipe.engine, rendezvous=Path(folder) / "rendezvous")
        times = {
            kind: statistics.median(values) for kind, values in timed(recipe, phase, arguments.steps, folder).items()
        }
        process_group.stop()
    every = recipe.log.effective_rank_every
    print(f"{phase.micro_batch} clips of {phase.frames} × {phase.size[0]} px, {torch.get_num_threads()} threads\n")
    print("| step | ms | over plain |\n|---|---|---|")
    for kind, value in times.items():
        print(f"| {kind} | {value:.2f} | {value / times['plain'] - 1:+.2%} |")
    usual = times["counted"] + (times["measured"] - times["counted"]) / every
    print(f"| mean, measured every {every} | {usual:.2f} | {usual / times['plain'] - 1:+.2%} |")
    return 0


def timed(recipe: Recipe, phase: Phase, steps: int, folder: str) -> dict[str, list[float]]:
    stage = stages_of(recipe)["pretrain"]
    engine = build_engine(recipe.engine, detect_ranks())
    objective = Jepa(stage, engine)
    engine.start_optimizer(recipe.optimizer, objective.trained, unreached=objective.unreached)
    throughput = Throughput(stage, engine)
    log = MetricsLog(Path(folder) / "metrics.jsonl", step=0, last_step=1, console_every=10**9)  # no lines
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    name = stage.data_sets[0]
    for number in range(-5, steps):
        # All kinds have the same batch: lengths of masks, and so times, differ from batch to batch.
        drawn = random_batch(recipe, phase, number % 20)
        batch = [type(drawn)(drawn.clips, drawn.masks, drawn.step, drawn.slots, (name,) * len(drawn.slots))]
        for kind in random.Random(number).sample(KINDS, len(KINDS)):  # none always after the same other one
            began = time.perf_counter()
            observe = None
            if kind == "measured":
                observe = Observation(stage.data_sets)
                for column, value in memory(engine.device, [os.getpid()]).items():
                    observe.add_of_rank(column, value)
            counts = {} if kind == "plain" else throughput.counts(phase, batch)
            gradients = compute_gradients(objective, engine, batch, observe=observe, counts=counts, waited_s=0.01)
            result = apply_gradients(objective, engine, gradients, lr=1e-4)
            if kind != "plain":
                row = {
                    "step": number,
                    "stage": "pretrain",
                    "phase": phase.name,
                    "lr": 1e-4,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "effective_rank": None,
                }
                log.write(
                    row | {"clips_per_s": 1.0} | throughput.columns(result, seconds=0.1, saved_s=0.0), result.measured
                )
            if number >= 0:
                times[kind].append(1000 * (time.perf_counter() - began))
            if result.measured is not None:
                result.measured.result()  # the thread must not take a core of the next step
    log.flush()
    assert len(Path(folder, "metrics.jsonl").read_text().splitlines()) == 2 * (steps + 5)
    return times


if __name__ == "__main__":
    run_command(main)
