"""Times the parts of a training step: target, context, predictor, backward, optimiser, EMA.

Uses one process, random clips, real masks, and the recipe's engine. Prints, for each attention kernel and with or
without compilation, milliseconds per part, clips per second, peak memory, and model FLOPs per second as a share of one
large matrix product's in the same run, and on a GPU also of the data sheet's.

    OMP_NUM_THREADS=2 python benchmarks/step.py --device cpu --model vit_tiny --frames 16 --size 64 --batch 4
    python benchmarks/step.py --device cuda --model vit_giant --frames 16 --size 256 --batch 24 \\
        --compile both --attention sdpa flash

With ``--peer FOLDER``, a checkout of https://github.com/facebookresearch/vjepa2, also times the published code's step,
alternating with ours, with the same sizes, clips and masks. First both compute the loss in float32 from the same
weights; the run stops where they differ.

    python benchmarks/step.py --device cuda --model vit_giant --frames 64 --size 384 --batch 2 \\
        --compile both --attention sdpa flash --peer ../vjepa2
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import Clock, device_name, peak_memory, product_rate
from published import Published
from torch.distributed.tensor import DTensor

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.gpus import peak_of
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch, draw_masks
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Phase, Recipe, load_recipe, stages_of
from vjepa_scale.training.step import training_step

ROOT = Path(__file__).parents[1]
RANKS = Ranks(0, 1, 0, 1, "benchmark", "submitit-local", "benchmark")
PARTS = ("target", "context", "predictor", "backward", "optimiser", "EMA", "rest")
# Dense bf16 FLOPs per second by the makers' data sheets.
RATE = 1e-5
SAME_LOSS = 1e-4  # relative; float32 with another order of operations differs by about 1e-7


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="vit_tiny", help="a name of an encoder")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="clips per micro-batch, of which a step has one")
    parser.add_argument("--steps", type=int, default=10, help="timed, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--product", type=int, metavar="N", help="rows of the matrix product (8192; on a CPU 1536)")
    parser.add_argument(
        "--compile", choices=("on", "off", "both"), help="default: the recipe's engine.compile; on a CPU off"
    )
    parser.add_argument("--attention", nargs="+", help="values of engine.attention; default: the recipe's")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of the published code")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.steps < 2:
        parser.error("--steps: at least 2")
    attention = [word for word in arguments.attention or [None] if word is None or "=" not in word]
    arguments.overrides += [word for word in arguments.attention or () if "=" in word]
    choices: dict[str | None, list[bool | None]] = {"on": [True], "off": [False], "both": [False, True], None: [None]}
    variants = [
        _recipe(arguments, {"engine.attention": kernel, "engine.compile": on})
        for kernel in attention
        for on in choices[arguments.compile]
    ]
    with tempfile.TemporaryDirectory() as folder:
        process_group.start(RANKS, variants[0].engine, rendezvous=Path(folder))
        _report(variants, arguments)
        process_group.stop()
    return 0


def _recipe(arguments: argparse.Namespace, variant: dict[str, Any]) -> Recipe:
    chosen = [f"{key}={str(value).lower()}" for key, value in variant.items() if value is not None]
    return step_recipe(
        device=arguments.device,
        model=arguments.model,
        frames=arguments.frames,
        size=arguments.size,
        batch=arguments.batch,
        steps=arguments.steps + arguments.warmup,
        peer=arguments.peer is not None,
        overrides=[*arguments.overrides, *chosen],
    )


def step_recipe(
    *, device: str, model: str, frames: int, size: int, batch: int, steps: int, peer: bool, overrides: Sequence[str]
) -> Recipe:
    """Returns a recipe of one phase whose step is one micro-batch.

    batch: clips
    peer:  the step must equal the published step
    """
    given = [
        f"engine.device={device}",
        f"engine.threads={torch.get_num_threads()}",
        f"model.encoder={model}",
        f"masks.group={batch}",
        f"pretrain.steps={steps}",
        f"pretrain.clip={{frames: {frames}, size: {size}}}",
        f"pretrain.global_batch={batch}",
        f"pretrain.micro_batch={batch}",
        f"pretrain.phases=[{{name: all, start_lr: {RATE}}}]",
        "cooldown=null",
    ]
    if device == "cpu":
        given += ["engine.precision=float32", "engine.compile=false"]
    if peer:
        given.append("jepa.mask_token=first")
    return load_recipe(ROOT / "recipes" / "vitg_256.yaml", [*given, *overrides])


# -- the two steps -----------------------------------------------------------------------------------


class Ours:
    """This package's training step."""

    name = "ours"

    def __init__(self, recipe: Recipe, clock: Clock) -> None:
        self.engine: Any = build_engine(recipe.engine, RANKS)
        self.objective: Any = Jepa(stages_of(recipe)["pretrain"], self.engine)
        self.engine.start_optimizer(recipe.optimizer, self.objective.trained)
        clock.watch("target", self.objective.target_encoder)
        clock.watch("context", self.objective.encoder)
        clock.watch("predictor", self.objective.predictor)
        clock.time_method("backward", self.engine, "backward")
        clock.time_method("optimiser", self.engine, "step")
        clock.time_method("EMA", self.objective, "after_step")

    def prepared(self, batch: MicroBatch) -> Callable[[], float]:
        on_device = batch.to(self.engine.device)
        return lambda: training_step(self.objective, self.engine, [on_device], lr=RATE).loss

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.engine.tensors(self.objective.networks, optimizer=True).values())


class Theirs:
    """The published code's training step, with our initial weights."""

    name = "published"

    def __init__(self, checkout: Path, recipe: Recipe, phase: Phase, device: torch.device, clock: Clock) -> None:
        self._published, self._clock = Published(checkout, recipe, phase, device), clock
        self.losses = _same_loss(recipe, self._published, random_batch(recipe, phase, 0))
        gc.collect()  # frees the networks that computed the loss
        if recipe.engine.compile:
            self._published.compile()
        self._published.watched(clock)
        self.held_bytes = self._published.held_bytes

    def prepared(self, batch: MicroBatch) -> Callable[[], float]:
        given = self._published.given(batch)
        return lambda: self._published.step(given, lr=RATE, clock=self._clock)


def _same_loss(recipe: Recipe, published: Published, batch: MicroBatch) -> tuple[float, float]:
    """Loads our initial weights into the published networks; returns both float32 losses.

    Raises UserError where they differ.
    """
    plain = {"kind": "fsdp", "precision": "float32", "compile": False, "attention": "sdpa"}
    engine: Engine = build_engine(recipe.engine.model_copy(update=plain), RANKS)
    objective = Jepa(stages_of(recipe)["pretrain"], engine)
    weights = engine.tensors(objective.networks, optimizer=False)
    published.load({name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()})
    with torch.no_grad():
        ours = float(objective.loss(batch)["loss"])
        theirs = float(published.loss(*published.given(batch), autocast=False))
    if abs(ours - theirs) > SAME_LOSS * abs(theirs):
        raise UserError(
            f"the loss is {ours:.8g} here and {theirs:.8g} there, from the same weights",
            where="--peer",
            fix="a checkout and a recipe that compute the same; else the times would compare different things",
        )
    return ours, theirs


# -- what is printed ---------------------------------------------------------------------------------


def _report(variants: Sequence[Recipe], arguments: argparse.Namespace) -> None:
    cfg = variants[0].engine
    phase = stages_of(variants[0])["pretrain"].phases[0]
    device = process_group.pick_device(cfg, RANKS)
    size = "×".join(map(str, phase.size))
    print(f"{arguments.model}, {phase.frames} frames of {size}, {arguments.batch} clips a step; ", end="")
    print(
        f"{cfg.kind}, {cfg.precision}, activation checkpointing {cfg.activation_checkpointing}; {device_name(device)}"
    )
    product = product_rate(device, torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32, arguments.product)
    print(f"a large matrix product: {product / 1e12:.2f} TFLOP/s; {arguments.steps} steps, medians, ms\n", flush=True)
    heads = ["attention", "compile", "code", *PARTS, "step", "clips/s", "peak GiB", "TFLOP/s", "of a product"]
    nominal = nominal_rate(device)
    if nominal:
        heads.append("of the data sheet")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    notes = []
    for recipe in variants:
        flops = stages_of(recipe)[phase.stage].step_flops(phase)
        clock = Clock(device)
        sides: list[Any] = [Ours(recipe, clock)]
        if arguments.peer is not None:
            sides.append(Theirs(arguments.peer, recipe, phase, device, clock))
        batches = [random_batch(recipe, phase, number) for number in range(arguments.warmup + arguments.steps)]
        rows = timed(sides, batches[: arguments.warmup], batches[arguments.warmup :], clock)
        for side, row in zip(sides, rows, strict=True):
            kernel = sides[0].engine.attention if side.name == "ours" else "its SDPA"
            rate = flops / (row.median / 1000)
            cells = [kernel, "on" if recipe.engine.compile else "off", side.name]
            cells += [f"{row.parts[part]:.1f}" for part in PARTS]
            cells += [f"{row.median:.1f}", f"{arguments.batch / row.median * 1000:.2f}", f"{row.peak:.2f}"]
            cells += [f"{rate / 1e12:.3f}", f"{rate / product:.1%}", *([f"{rate / nominal:.1%}"] if nominal else [])]
            print("| " + " | ".join(cells) + " |", flush=True)
        if arguments.peer is not None:
            notes.append(_compared(recipe, sides, rows))
        del sides
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if notes:
        print("\n" + "\n".join(notes))


def _compared(recipe: Recipe, sides: Sequence[Any], rows: Sequence["Timed"]) -> str:
    ours, theirs = sides[1].losses
    last = ", ".join(f"{row.loss:.6f}" for row in rows)
    return (
        f"{sides[0].engine.attention}, compile {'on' if recipe.engine.compile else 'off'}: the published step takes "
        f"{rows[1].median / rows[0].median:.2f} × ours. From the same weights, float32: loss {ours:.8f} and "
        f"{theirs:.8f}, {abs(ours - theirs) / theirs:.1e} apart; in the last step {last}."
    )


@dataclass(frozen=True)
class Timed:
    """Times of one side.

    parts: milliseconds of the parts of one typical step, so that they add up
    steps: milliseconds of each step
    peak:  GiB
    loss:  of the last step
    """

    parts: dict[str, float]
    steps: list[float]
    peak: float
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.steps)


def timed(
    sides: Sequence[Any], warmup: Sequence[MicroBatch], batches: Sequence[MicroBatch], clock: Clock
) -> list[Timed]:
    """Times each side. The sides alternate, with the same batches.

    warmup:  first batches, which are not timed. The lengths of masks decide what is compiled and which kernels are
             planned, so they must have the masks of the timed batches.
    batches: on a GPU the first and every second one is timed as a whole, the others in parts
    """
    device = sides[0].engine.device
    wholes: list[list[float]] = [[] for _ in sides]
    pieces: list[list[dict[str, float]]] = [[] for _ in sides]
    peaks, losses = [0.0] * len(sides), [0.0] * len(sides)
    for number, batch in enumerate([*warmup, *batches], start=-len(warmup)):
        for index, side in enumerate(sides):
            step = side.prepared(batch)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # Synchronising between parts slows a GPU down, so whole steps are timed without it, alternating with parts.
            parts = device.type == "cpu" or number % 2 == 1

            def keep(step: Callable[[], float] = step, index: int = index) -> None:
                losses[index] = step()

            row = clock.whole(keep, parts=parts)
            if number < 0:
                continue
            others = sum(other.held_bytes() for other in sides if other is not side)
            peaks[index] = max(peaks[index], peak_memory(device, others))
            if parts:
                pieces[index].append(row)
            if device.type == "cpu" or not parts:
                wholes[index].append(row["step"])
    found = []
    for side_wholes, side_pieces, peak, loss in zip(wholes, pieces, peaks, losses, strict=True):
        typical = sorted(side_pieces, key=lambda row: row["step"])[len(side_pieces) // 2]
        found.append(Timed({part: typical.get(part, 0.0) for part in PARTS}, side_wholes, peak, loss))
    return found


def nominal_rate(device: torch.device) -> float | None:
    """Returns the device's dense bf16 FLOPs per second from its data sheet; None where it is unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def random_batch(recipe: Recipe, phase: Phase, step: int) -> MicroBatch:
    slots = range(phase.micro_batch)
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(0, 256, (len(slots), 3, phase.frames, *phase.size), dtype=torch.uint8, generator=generator)
    grid = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet)
    masks = draw_masks(recipe.masks, seed=0, step=step, slots=slots, grid=grid)
    return MicroBatch(clips, masks, step, slots, ("random",) * len(slots))


if __name__ == "__main__":
    run_command(main)
