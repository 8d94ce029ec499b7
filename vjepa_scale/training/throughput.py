"""Speed of training: tokens and FLOPs per second, utilisation, and what of a step is spent waiting."""

import time

import psutil
import torch

from vjepa_scale.core.gpus import peak_of
from vjepa_scale.data.batch import StepBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.training.step import StepResult

_GIGA = 1e9


class Throughput:
    """Counts what a step computes, and divides by its time."""

    def __init__(self, stage: Stage, engine: Engine) -> None:
        self._stage, self._engine = stage, engine
        precision = stage.recipe.engine.precision
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        known = peak_of(torch.cuda.get_device_name(engine.device)) if engine.device.type == "cuda" else None
        self._peak = known if known and dtype == torch.bfloat16 else measured_peak(engine.device, dtype)
        self._clip_flops: dict[tuple[str, int], float] = {}  # by phase and frames

    def counts(self, phase: Phase, batch: StepBatch) -> dict[str, float]:
        """Returns what this rank's part of a step consists of; figures add up over the ranks."""
        found = dict.fromkeys(("tokens", "flops", "clips", "load_s", "load_cpu_s"), 0.0)
        for part in batch:
            clips, frames = len(part.slots), phase.frames_of(part.datasets[0])
            found["tokens"] += clips * self._stage.clip_tokens(phase, frames)
            found["flops"] += clips * self._flops_of(phase, frames)
            found["clips"] += clips
            found["load_s"] += part.load_s
            found["load_cpu_s"] += part.load_cpu_s
        return found

    def _flops_of(self, phase: Phase, frames: int) -> float:
        if (phase.name, frames) not in self._clip_flops:
            self._clip_flops[phase.name, frames] = self._stage.clip_flops(phase, frames)
        return self._clip_flops[phase.name, frames]

    def columns(self, result: StepResult, *, seconds: float, saved_s: float) -> dict[str, float]:
        """Returns columns of metrics.jsonl.

        seconds: of the step, from the end of the last one
        saved_s: that a checkpoint took before it
        """
        counts, ranks = result.counts, len(result.waited_s)
        flops_per_s = counts["flops"] / seconds
        found = {
            "tokens_per_s": counts["tokens"] / seconds,
            "flops_per_s": flops_per_s,
            "mfu": flops_per_s / (self._peak * ranks),
            "waiting": min(1.0, max(result.waited_s) / seconds),
            "saving": saved_s / (saved_s + seconds),
        }
        if counts["load_s"]:  # not of a stage that decodes nothing
            found["decode/seconds"] = counts["load_s"] / counts["clips"]
            found["decode/cores"] = counts["load_cpu_s"] / seconds / ranks
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def memory(device: torch.device, loader_pids: list[int]) -> dict[str, float]:
    """Returns memory of this rank in GB. Pages that loader workers share count in each of them."""
    found = {"memory/process": _resident(psutil.Process().pid) / _GIGA}
    found["memory/loader"] = sum(map(_resident, loader_pids)) / _GIGA
    if device.type == "cuda":
        found["memory/allocated"] = torch.cuda.memory_allocated(device) / _GIGA
        found["memory/reserved"] = torch.cuda.memory_reserved(device) / _GIGA
        found["memory/peak"] = torch.cuda.max_memory_allocated(device) / _GIGA
    return found


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest of some matrix products, for devices whose peak is not known."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(40):  # others use the cores, too: the fastest was alone
        began = time.perf_counter()
        b = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del b
    return 2 * size**3 / best
