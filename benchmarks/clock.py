"""Measurements for benchmarks/step.py: parts of a step, rate of a matrix product, peak memory."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Clock:
    """Milliseconds by part of one step. On a GPU, parts are only valid with a synchronisation between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.waits = True
        self.ms: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self._device.type == "cuda" and self.waits:
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def watch(self, part: str, module: nn.Module) -> None:
        """Times a module as a part, including the gathering of its weights in the engine's hooks."""
        began: list[float] = []
        module.register_forward_pre_hook(lambda *_: began.append(self.now()), prepend=True)

        def end(*_: Any) -> None:
            self.ms[part] += self.now() - began.pop()

        module.register_forward_hook(end)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside, began = sum(self.ms.values()), self.now()
            result = function(*args, **kwargs)
            self.ms[part] += self.now() - began - (sum(self.ms.values()) - inside)  # excludes parts inside this one
            return result

        return run

    def time_method(self, part: str, owner: object, name: str) -> None:
        """Times the calls of a method as a part."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))

    def whole(self, step: Callable[[], object], *, parts: bool) -> dict[str, float]:
        """Times one step, in parts if requested; synchronises the device at both ends."""
        self.ms.clear()
        self.waits = True
        began = self.now()
        self.waits = parts
        step()
        self.waits = True
        whole = self.now() - began
        return {**self.ms, "rest": whole - sum(self.ms.values()), "step": whole} if parts else {"step": whole}


def product_rate(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """Returns FLOPs per second of a large square matrix product: the best of five.

    n: rows; default: 8192 on a GPU, 1536 on a CPU
    """
    n = n or (8192 if device.type == "cuda" else 1536)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    clock, best = Clock(device), float("inf")
    for _ in range(6):
        began = clock.now()
        a @ b
        best = min(best, clock.now() - began)
    return 2 * n**3 / (best / 1000)


def peak_memory(device: torch.device, others: int) -> float:
    """Returns peak GiB: on a GPU of one side's step, without the other's tensors; on a CPU of the whole process."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - others) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
