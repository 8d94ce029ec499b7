"""Measures the cost of checkpoints: time that training waits, and time and memory of consolidation.

Training: the networks of a recipe (the demo's) in one process. Milliseconds of a step; of a blocking save; of a save in
the background: the copy, the total wait of training, and a step while files are written.

Consolidation: a checkpoint of ViT-H's shape, written here, by tools/consolidate.py in a separate process: seconds, and
peak resident memory, which counts pages of the checkpoint's files only while they are mapped.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --model vit_large --skip-training
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.core.errors import run_command
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch, draw_masks
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.model import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Phase, Recipe, load_recipe, stages_of
from vjepa_scale.training.step import training_step

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "demo.yaml"), help="whose training waits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of that recipe")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--model", default="vit_huge", help="whose checkpoint is consolidated")
    parser.add_argument("--dir", type=Path, help="a folder on the disk in question (default: the temporary one)")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--skip-consolidation", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        if not arguments.skip_training:
            _training(load_recipe(arguments.recipe, arguments.overrides), Path(folder), arguments.saves)
        if not arguments.skip_consolidation:
            _consolidation(arguments.model, Path(folder))
    return 0


# -- training --------------------------------------------------------------------------------------


def _training(recipe: Recipe, folder: Path, saves: int) -> None:
    ranks = Ranks(0, 1, 0, 1, "benchmark", "submitit-local", "benchmark")
    process_group.start(ranks, recipe.engine, rendezvous=folder / "rendezvous")
    engine = build_engine(recipe.engine, ranks)
    objective = Jepa(stages_of(recipe)["pretrain"], engine)
    engine.start_optimizer(recipe.optimizer, objective.trained)
    phase = stages_of(recipe)["pretrain"].phases[0]
    steps = iter(range(10**9))

    def step() -> float:
        batch = _batch(recipe, phase, next(steps))
        return _ms(lambda: training_step(objective, engine, batch, lr=1e-5))

    for _ in range(3):
        step()
    alone = statistics.median(step() for _ in range(saves))

    waited: dict[bool, list[float]] = {}
    meanwhile, copied = list[float](), list[float]()
    for background in (False, True):
        saver = Saver(folder / f"background={background}", background=background)
        waited[background] = []
        for number in range(saves):
            tensors = engine.tensors(objective.networks, optimizer=True)
            if background:
                copied.append(_ms(partial(saver._copied, tensors)))
            waited[background].append(_ms(partial(saver.save, number, tensors, {})))
            if background:
                meanwhile.append(step())
            saver.take(wait=True)
    megabytes = sum(t.nbytes for t in engine.tensors(objective.networks, optimizer=True).values()) / 1e6
    process_group.stop()
    copy, stall = statistics.median(copied), statistics.median(waited[True])
    print(f"{Path(recipe.run.dir).name}: {megabytes:.0f} MB of tensors, {saves} saves; median milliseconds\n")
    print(f"a step                              {alone:9.1f}")
    print(f"a save that training waits for      {statistics.median(waited[False]):9.1f}")
    print(f"a save in the background: the copy  {copy:9.1f}")
    print(f"  all that training waits           {stall:9.1f}")
    print(f"  beyond the copy, of a step        {max(0.0, stall - copy) / alone:9.1%}   (target: under 10 %)")
    print(f"  a step while it is being written  {statistics.median(meanwhile):9.1f}\n", flush=True)


def _batch(recipe: Recipe, phase: Phase, step: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(step)
    grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet)
    batch = []
    for first in range(0, phase.global_batch, phase.micro_batch):
        slots = range(first, first + phase.micro_batch)
        clips = torch.randint(
            0, 256, (len(slots), 3, phase.frames, *phase.size), dtype=torch.uint8, generator=generator
        )
        masks = draw_masks(recipe.masks, seed=0, step=step, slots=slots, grid=grid)
        batch.append(MicroBatch(clips, masks, step, slots, ("random",) * len(slots)))
    return batch


def _ms(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


# -- consolidation ---------------------------------------------------------------------------------


def _consolidation(model: str, folder: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "vitg_256.yaml", [f"model.encoder={model}"])
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # hides DCP's warning that there is no process group
        checkpoint = _saved(recipe, folder)
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e9
    print(f"{model}: a checkpoint of {size:.1f} GB, written in {time.perf_counter() - began:.0f} s\n")
    print(f"{'to':12} | {'seconds':>8} | {'peak GiB':>8}   (targets: under 60 s and 2 GiB)")
    for to in ("safetensors", "huggingface"):
        command = [sys.executable, ROOT / "tools" / "consolidate.py", checkpoint, "--to", to, "--out", folder / to]
        measured = [sys.executable, "-c", _MEASURE, *map(str, [*command, "--no-check"])]
        done = subprocess.run(measured, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, peak = map(float, done.stdout.split()[-2:])
        print(f"{to:12} | {seconds:8.1f} | {peak:8.2f}", flush=True)


# Runs a command, then prints its seconds and its peak of resident memory, GiB.
_MEASURE = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
"""


def _saved(recipe: Recipe, folder: Path) -> Path:
    """Saves encoder, target encoder and predictor; without moments, which consolidation does not read."""
    networks = {"encoder": Encoder(recipe.model), "predictor": Predictor(recipe.model)}
    for name, network in networks.items():
        initialise(network, seed=0, prefix=name)
    tensors = {
        f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()
    }
    tensors |= {f"target_{name}": value for name, value in tensors.items() if name.startswith("encoder.")}
    phase = stages_of(recipe)["pretrain"].phases[-1]
    manifest = {
        "stage": "pretrain",
        "phase": phase.name,
        "first": 0,
        "fps": recipe.data.fps,
        "frames": phase.frames,
        "size": list(phase.size),
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "data": {},
    }
    return store.save(folder / "checkpoints", phase.end, tensors, manifest)


if __name__ == "__main__":
    run_command(main)
