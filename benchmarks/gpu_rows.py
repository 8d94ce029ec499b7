"""The measurement of each row of benchmarks/gpu.py, and the process that runs it."""

import contextlib
import functools
import gc
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from clock import Clock, peak_memory, product_rate
from gpu_book import Row, Shape, Switches, Unit
from step import RANKS, RATE, Ours, Theirs, Timed, nominal_rate, random_batch, step_recipe, timed

from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import usable_cores
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.demo.synthetic import World, write_videos
from vjepa_scale.distributed import process_group
from vjepa_scale.model.flops import jepa_step
from vjepa_scale.recipe import Phase, Recipe, stages_of
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.training.step import training_step

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """Sizes and durations of the measurements.

    model:   name of an encoder
    changes: overrides of all recipes
    base:    base switches; each other row changes one of them
    trained: overrides of the killed and resumed recipe; killed_every: its steps between checkpoints
    """

    shapes: tuple[Shape, ...]
    base: Switches
    switches: tuple[Switches, ...]
    of_peer: tuple[Switches, ...]
    steps: int
    saves: int
    videos: int
    video_fps: int
    trained_shape: Shape
    trained_steps: int
    trained: tuple[str, ...]
    model: str = "vit_giant"
    changes: tuple[str, ...] = ()


class Absent(Exception):
    """Something that a row needs is not installed, or was not given."""


class Session:
    """The measuring process: its device, its process group, and its shards.

    folder: a temporary folder
    """

    def __init__(self, device: str, sizes: Sizes, folder: Path, *, toy: bool, peer: Path | None) -> None:
        self.sizes, self.folder, self.toy, self.peer = sizes, folder, toy, peer
        self.device = torch.device(device)
        self.problem = ""  # why the device is no longer usable
        self._started = False

    def recipe(self, unit: Unit, *, steps: int, overrides: Sequence[str] = ()) -> Recipe:
        assert unit.shape is not None
        switches = [f"engine.{key}={str(value).lower()}" for key, value in unit.switches.items()]
        return step_recipe(
            device=self.device.type,
            model=self.sizes.model,
            frames=unit.shape.frames,
            size=unit.shape.size,
            batch=unit.shape.batch,
            steps=steps,
            peer=unit.part == "peer",
            overrides=[*self.sizes.changes, *switches, *overrides],
        )

    def start(self, recipe: Recipe) -> None:
        """Joins a process group of this process only, once."""
        if not self._started:
            process_group.start(RANKS, recipe.engine, rendezvous=self.folder / "rendezvous")
            self._started = True

    @functools.cache  # noqa: B019 (there is one session in a process)
    def product(self, dtype: torch.dtype) -> float:
        """Returns FLOPs per second of a large matrix product."""
        return product_rate(self.device, dtype)

    @functools.cache  # noqa: B019
    def shards(self, frames: int, size: int) -> Path:
        """Returns a folder of shards whose videos have the size in pixels and the length of such clips."""
        videos, shards = (self.folder / f"{what}-{frames}-{size}" for what in ("videos", "shards"))
        seconds = frames / 4 + 1  # 4 frames a second
        world = World(size=size, fps=self.sizes.video_fps, seconds=seconds)
        for _ in write_videos(videos, world, seed=0, train=self.sizes.videos, val=0, workers=usable_cores()):
            pass
        workers = min(usable_cores(), 16)
        make_shards(
            videos / "train", shards, Settings(shard_records=4), workers=workers, progress=lambda *_, **__: None
        )
        return shards

    def speed(self, recipe: Recipe, batches: Sequence[MicroBatch], step_ms: Sequence[float]) -> Row:
        """Returns the columns that follow from the milliseconds of steps on these batches."""
        median, nominal = statistics.median(step_ms), nominal_rate(self.device)
        rate = statistics.mean(flops_of(recipe, batch) for batch in batches) / (median / 1000)
        product = self.product(torch.bfloat16 if recipe.engine.precision == "bfloat16" else torch.float32)
        return {
            **spread(step_ms),
            "clips_per_s": len(batches[0].clips) / median * 1000,
            "tflops": rate / 1e12,
            "mfu_data_sheet": rate / nominal if nominal else None,
            "mfu_product": rate / product,
            "product_tflops": product / 1e12,
        }

    def tidy(self) -> None:
        """Resets global state of the last rows, and checks that the device still works."""
        torch._dynamo.reset()
        gc.collect()
        torch.backends.cudnn.benchmark = False  # the published code's networks set it
        with contextlib.suppress(ImportError):  # older PyTorch has no such registry
            from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

            if current_flash_attention_impl() is not None:  # fa3 and fa4 change it for the whole process
                restore_flash_attention_impl()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.problem = one_line(error)


def flops_of(recipe: Recipe, batch: MicroBatch) -> int:
    """Returns the model FLOPs of a step on a micro-batch with its masks."""
    frames, height, width = batch.clips.shape[2:]
    tokens = frames // recipe.model.tubelet * (height // recipe.model.patch) * (width // recipe.model.patch)
    lengths = [(pair.context.shape[1], pair.target.shape[1]) for pair in batch.masks]
    return len(batch.clips) * jepa_step(recipe.model, tokens, lengths)


def spread(values_ms: Sequence[float]) -> Row:
    """Returns median and quartiles, milliseconds."""
    low, _, high = statistics.quantiles(values_ms, n=4, method="inclusive") if len(values_ms) > 1 else [*values_ms] * 3
    return {"median_ms": statistics.median(values_ms), "low_ms": low, "high_ms": high}


# -- tests -------------------------------------------------------------------------------------------


def measure_tests(session: Session, unit: Unit) -> list[Row]:
    report = session.folder / "tests.xml"
    chosen = ["-m", "gpu"] if session.device.type == "cuda" else [str(ROOT / "tests" / "model" / "test_attention.py")]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    words += [f"--junit-xml={report}", *chosen]
    with in_a_group(words) as process:
        stdout, _ = process.communicate()
    if "No module named pytest" in stdout:
        raise Absent("pytest is not installed")
    if not report.exists():
        raise RuntimeError(f"pytest ended with {process.returncode}: {stdout[-200:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    facts = {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, "failed tests": names}
    row: Row = {"name": unit.names[0], "facts": facts}
    if process.returncode != 0:
        row |= {"state": "failed", "reason": f"pytest ended with {process.returncode}"}
    return [row]


@contextmanager
def in_a_group(words: Sequence[object]) -> Iterator["subprocess.Popen[str]"]:
    """Runs a command in the repository's root in its own process group, which is ended on exit."""
    process = subprocess.Popen(
        list(map(str, words)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# -- the step, and the published step ----------------------------------------------------------------


def measure_step(session: Session, unit: Unit) -> list[Row]:
    recipe = session.recipe(unit, steps=session.sizes.steps)
    session.start(recipe)
    (phase,) = stages_of(recipe)["pretrain"].phases
    clock = Clock(session.device)
    sides: list[Any] = [Ours(recipe, clock)]
    if unit.part == "peer":
        assert session.peer is not None
        sides.append(Theirs(session.peer, recipe, phase, session.device, clock))
    batches = [random_batch(recipe, phase, number) for number in range(session.sizes.steps)]
    # On a GPU each step is timed twice: as a whole, then in parts.
    times = 2 if session.device.type == "cuda" else 1
    found = timed(sides, batches, [batch for batch in batches for _ in range(times)], clock)
    rows = []
    for side, times_ms in zip(sides, found, strict=True):
        kernel = side.engine.attention if side.name == "ours" else "its SDPA"
        facts: Row = {"kernel": kernel}
        if side.name == "published":
            ours, theirs = side.losses
            facts["× our time"] = times_ms.median / found[0].median
            facts["same weights, float32: losses differ by"] = abs(ours - theirs) / theirs
        if len(sides) == 2:
            facts["loss of the last step"] = times_ms.loss
        rows.append({"name": side.name, **_step_row(session, recipe, batches, times_ms), "facts": facts})
    return rows


def _step_row(session: Session, recipe: Recipe, batches: Sequence[MicroBatch], found: Timed) -> Row:
    whole = sum(found.parts.values())
    return {
        **session.speed(recipe, batches, found.steps),
        "peak_gib": found.peak,
        "shares": {part: ms / whole for part, ms in found.parts.items()},
    }


def no_peer(_: Session, __: Unit) -> list[Row]:
    raise Absent("no checkout of https://github.com/facebookresearch/vjepa2: --peer FOLDER")


# -- the loader --------------------------------------------------------------------------------------

LOADER_ROWS = ("clips that are ready", "fed by the loader", "the loader alone")


def measure_loader(session: Session, unit: Unit) -> list[Row]:
    """Measures the same batches in three ways. Times only batches after the prefetched ones are used up."""
    assert unit.shape is not None
    shards = session.shards(unit.shape.frames, unit.shape.size)
    workers = min(16, usable_cores())
    wanted = [f"data.sets={{videos: {{path: '{shards}'}}}}", f"data.workers={workers}", "data.lanes=2"]
    ahead = workers * session.recipe(unit, steps=1).data.prefetch
    recipe = session.recipe(unit, steps=2 * ahead, overrides=wanted)
    session.start(recipe)
    (phase,) = stages_of(recipe)["pretrain"].phases

    with _loaded(session, recipe, phase, shards) as batches:
        fetched = [next(batches) for _ in range(ahead)]
        began = time.perf_counter()
        fetched = list(batches)  # the rest has the same masks
        alone_s = time.perf_counter() - began
    clips = len(fetched) * phase.global_batch

    clock = Clock(session.device)
    clock.waits = False
    ours = Ours(recipe, clock)
    ready = [batch.to(session.device) for batch in fetched]
    _run(ours, iter(ready))
    _reset_peak(session)
    of_ready = _run(ours, iter(ready))
    with _loaded(session, recipe, phase, shards) as batches:
        _run(ours, (next(batches) for _ in range(ahead)))
        of_loader = _run(ours, batches)
    waited = sum(wait for _, wait in of_loader) / sum(ms for ms, _ in of_loader)
    peak = peak_memory(session.device, 0)
    return [
        {"name": LOADER_ROWS[0], **session.speed(recipe, fetched, [ms for ms, _ in of_ready]), "peak_gib": peak},
        {
            "name": LOADER_ROWS[1],
            **session.speed(recipe, fetched, [ms for ms, _ in of_loader]),
            "peak_gib": peak,
            "facts": {"share waited for data": waited, "workers": workers, "cores": usable_cores()},
        },
        {
            "name": LOADER_ROWS[2],
            "median_ms": 1000 * alone_s / len(fetched),
            "clips_per_s": clips / alone_s,
            "facts": {"workers": workers, "video": f"{unit.shape.size} px at {session.sizes.video_fps} fps"},
        },
    ]


@contextmanager
def _loaded(session: Session, recipe: Recipe, phase: Phase, shards: Path) -> Iterator[Iterator[MicroBatch]]:
    """Yields the micro-batches of all steps, from shards, as in the trainer."""
    manifest = Manifest.open(shards)
    order = DataOrder(seed=0, sets=[("videos", manifest.records_per_shard)], phases=[phase], lanes=recipe.data.lanes)
    with PhaseLoader(
        stage=stages_of(recipe)["pretrain"],
        phase=phase,
        order=order,
        manifests={"videos": manifest},
        dp_rank=0,
        dp_world_size=1,
        first_step=phase.first,
        pin_memory=session.device.type == "cuda",
    ) as loader:
        yield (micro_batch for step in loader for micro_batch in step)


def _run(ours: Ours, batches: Iterator[MicroBatch]) -> list[tuple[float, float]]:
    """Trains on each batch; returns milliseconds of each step, including the wait for its batch, and of that wait.

    Synchronises the device only where the trainer does: once per step, for the loss.
    """
    found = []
    began = time.perf_counter()
    for batch in batches:
        fetched = time.perf_counter()
        training_step(ours.objective, ours.engine, [batch], lr=RATE)
        ended = time.perf_counter()
        found.append((1000 * (ended - began), 1000 * (fetched - began)))
        began = ended
    return found


def _reset_peak(session: Session) -> None:
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


# -- saves -------------------------------------------------------------------------------------------

SAVE_ROWS = ("step without a save", "what training waits for a save", "step while files are written")


def measure_save(session: Session, unit: Unit) -> list[Row]:
    recipe = session.recipe(unit, steps=session.sizes.steps)
    session.start(recipe)
    (phase,) = stages_of(recipe)["pretrain"].phases
    clock = Clock(session.device)
    clock.waits = False
    ours = Ours(recipe, clock)
    batches = [random_batch(recipe, phase, number).to(session.device) for number in range(session.sizes.steps)]
    _run(ours, iter(batches))
    _reset_peak(session)
    alone = [ms for ms, _ in _run(ours, iter(batches))]
    folder = session.folder / "checkpoints"
    saver = Saver(folder, background=True, device=session.device)
    held: list[float] = []
    during: list[float] = []
    written_s: list[float] = []
    for number in range(session.sizes.saves + 1):
        if session.device.type == "cuda":
            torch.cuda.synchronize()  # else the save waits for the step before it
        began = time.perf_counter()
        saver.save(number, ours.engine.tensors(ours.objective.networks, optimizer=True), {})
        held.append(1000 * (time.perf_counter() - began))
        began = time.perf_counter()
        while True:
            during += [ms for ms, _ in _run(ours, iter(batches[len(during) % len(batches) :][:1]))]
            if saver.take(wait=False) is not None:
                break
        written_s.append(time.perf_counter() - began)
        shutil.rmtree(folder)  # a checkpoint of ViT-g has 17 GB
    size = sum(t.nbytes for t in ours.engine.tensors(ours.objective.networks, optimizer=True).values()) / 1e9
    facts = {"GB": size, "seconds until it is written": statistics.median(written_s), "first save, ms": held[0]}
    return [
        {"name": SAVE_ROWS[0], **session.speed(recipe, batches, alone), "peak_gib": peak_memory(session.device, 0)},
        {"name": SAVE_ROWS[1], **spread(held[1:]), "facts": facts},  # the first save allocates the copies
        {"name": SAVE_ROWS[2], **session.speed(recipe, batches, during), "facts": {"steps": len(during)}},
    ]


def one_line(error: Exception) -> str:
    """Returns an error in one line."""
    words = " ".join(str(error).split())
    shown = words if len(words) <= 300 else f"{words[:300]} …"
    return shown if isinstance(error, UserError) else f"{type(error).__name__}: {shown}"
