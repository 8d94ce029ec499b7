"""Where the time of a training step goes: target, context, predictor, backward, optimiser, EMA.

One process, random clips, real masks, the recipe's engine. Prints milliseconds per part, clips per second, the peak of
memory, and the model FLOPs per second as a share of what one large matrix product reaches in the same run, and on a GPU
also of the number its maker gives.

    OMP_NUM_THREADS=2 python benchmarks/step.py --device cpu --model vit_tiny --frames 16 --size 64 --batch 4
    python benchmarks/step.py --device cuda --model vit_giant --frames 16 --size 256 --batch 24 engine.compile=true
    python benchmarks/step.py --device cuda --model vit_giant --frames 64 --size 384 --batch 2 \\
        engine.activation_checkpointing=full engine.attention=flash
"""

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.masking import draw_masks
from vjepa_scale.objective.cost import step_flops
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.parallel import process_group
from vjepa_scale.parallel.engine import build_engine
from vjepa_scale.recipe import Phase, Recipe, load_recipe, resolve_phases
from vjepa_scale.training.step import training_step

ROOT = Path(__file__).parents[1]
PARTS = ("target", "context", "predictor", "backward", "optimiser", "EMA", "rest")
# Dense bf16 FLOPs per second by the makers' data sheets.
NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="vit_tiny", help="a name of an encoder")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="clips per micro-batch, of which a step has one")
    parser.add_argument("--steps", type=int, default=10, help="timed, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as engine.compile=true")
    arguments = parser.parse_intermixed_args()
    recipe = _recipe(arguments)
    phase = resolve_phases(recipe, "pretrain")[0]
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(0, 1, 0, 1, "benchmark", "submitit-local", "benchmark")
        process_group.start(ranks, recipe.engine, rendezvous=Path(folder))
        _report(recipe, phase, arguments)
        process_group.stop()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    total = arguments.steps + arguments.warmup
    stage = {
        "clip": {"frames": arguments.frames, "size": arguments.size},
        "global_batch": arguments.batch,
        "micro_batch": arguments.batch,
        "steps": total,
    }
    overrides = [
        f"engine.device={arguments.device}",
        f"engine.threads={torch.get_num_threads()}",
        f"model.encoder={arguments.model}",
        f"masks.group={arguments.batch}",
        f"pretrain.steps={total}",
        f"pretrain.clip={{frames: {arguments.frames}, size: {arguments.size}}}",
        f"pretrain.global_batch={stage['global_batch']}",
        f"pretrain.micro_batch={stage['micro_batch']}",
        "pretrain.phases=[{name: all, start_lr: 1.0e-5}]",
        "cooldown=null",
        *arguments.overrides,
    ]
    if arguments.device == "cpu" and not any(word.startswith("engine.precision=") for word in arguments.overrides):
        overrides.append("engine.precision=float32")
    return load_recipe(ROOT / "recipes" / "vitg_256.yaml", overrides)


class Clock:
    """Milliseconds by part, of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ms: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def watch(self, part: str, module: nn.Module) -> None:
        began: list[float] = []
        module.register_forward_pre_hook(lambda *_: began.append(self.now()))

        def end(*_: Any) -> None:
            self.ms[part] += self.now() - began.pop()

        module.register_forward_hook(end)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside, began = sum(self.ms.values()), self.now()
            result = function(*args, **kwargs)
            self.ms[part] += self.now() - began - (sum(self.ms.values()) - inside)  # what is inside has its own part
            return result

        return run


def _report(recipe: Recipe, phase: Phase, arguments: argparse.Namespace) -> None:
    engine = build_engine(recipe.engine, Ranks(0, 1, 0, 1, "benchmark", "submitit-local", "benchmark"))
    objective: Any = Jepa(recipe, engine)
    engine.start_optimizer(recipe.optimizer, objective.trained)
    clock = Clock(engine.device)
    clock.watch("target", objective.target_encoder)
    clock.watch("context", objective.encoder)
    clock.watch("predictor", objective.predictor)
    timed: Any = engine
    timed.backward = clock.timed("backward", engine.backward)
    timed.step = clock.timed("optimiser", engine.step)
    objective.after_step = clock.timed("EMA", objective.after_step)
    rows = []
    for number in range(arguments.warmup + arguments.steps):
        batch = _batch(recipe, phase, number)
        clock.ms.clear()
        began = clock.now()
        training_step(objective, engine, batch, lr=1e-5)
        whole = clock.now() - began
        if number >= arguments.warmup:
            rows.append({**clock.ms, "rest": whole - sum(clock.ms.values()), "whole": whole})
    median = sorted(rows, key=lambda row: row["whole"])[len(rows) // 2]

    cfg = recipe.engine
    print(
        f"{arguments.model}, {phase.frames} frames of {phase.size[0]}×{phase.size[1]}, {arguments.batch} clips a step"
    )
    print(f"{cfg.kind}, {cfg.precision}, attention by {engine.attention}, compile {cfg.compile}, ", end="")
    print(f"activation checkpointing {cfg.activation_checkpointing}, {_device(engine.device)}\n")
    for part in PARTS:
        print(f"{part:10} {median[part]:10.1f} ms {median[part] / median['whole']:7.1%}")
    seconds = median["whole"] / 1000
    print(f"{'step':10} {median['whole']:10.1f} ms     {phase.global_batch / seconds:.2f} clips/s, ", end="")
    print(f"peak {_peak_memory(engine.device):.2f} GiB")
    rate = step_flops(recipe, phase) / seconds
    product = _product_rate(engine.device, torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32)
    print(f"\n{rate / 1e12:.3f} model TFLOP/s: {rate / product:.1%} of a matrix product's {product / 1e12:.2f}", end="")
    name = torch.cuda.get_device_name() if engine.device.type == "cuda" else ""
    nominal = next((value for key, value in NOMINAL.items() if key in name), None)
    print(f", {rate / nominal:.1%} of the {nominal / 1e12:.0f} on the data sheet" if nominal else "")


def _batch(recipe: Recipe, phase: Phase, step: int) -> list[MicroBatch]:
    slots = range(phase.micro_batch)
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(0, 256, (len(slots), 3, phase.frames, *phase.size), dtype=torch.uint8, generator=generator)
    grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet)
    masks = draw_masks(recipe.masks, seed=0, step=step, slots=slots, grid=grid)
    return [MicroBatch(clips, masks, step, slots, ("random",) * len(slots))]


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product: the best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    clock, best = Clock(device), float("inf")
    for _ in range(6):
        began = clock.now()
        a @ b
        best = min(best, clock.now() - began)
    return 2 * n**3 / (best / 1000)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
