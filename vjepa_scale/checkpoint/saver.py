"""Writes checkpoints in the background: training waits only for a copy of the tensors.

At most one save is in flight: the next one waits for it. A thread runs ``store.save`` with a separate process group, so
that its collectives never mix with those of training. A checkpoint that is unfinished after a kill is a temporary
folder, which the next start removes.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from vjepa_scale.checkpoint import store
from vjepa_scale.core.errors import PassingError, reason_of
from vjepa_scale.core.log import Laps

_log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class Saver:
    """Writes a stage's checkpoints. Collective: every rank constructs one and makes the same calls.

    background: False: ``save`` returns after the checkpoint is written
    device:     this rank's device, with the tensors
    """

    def __init__(self, folder: Path, *, background: bool, device: torch.device = _CPU) -> None:
        self._folder, self._background = folder, background
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # The current GPU is a property of each thread: a new thread would use GPU 0, and wait for a stream of it.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint-saver", initializer=begin)
        self._planner = store.planner()
        self._copies: dict[str, Tensor] = {}  # the memory is kept from save to save
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._in_flight: tuple[int, Future[Path]] | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], manifest: dict[str, Any], *, are_copies: bool = False
    ) -> None:
        """Starts to write the checkpoint of ``step`` completed steps. Requires that ``take`` returned the one before.

        are_copies: the tensors are in CPU memory and will not change, so they need no copy
        """
        assert self._in_flight is None, "one save in flight at most: take() the one before"
        laps = Laps()
        content = self._copied(tensors) if self._background and not are_copies else tensors
        if _log.isEnabledFor(logging.DEBUG):
            laps.lap("copy")
            held = sum(_local(tensor).nbytes for tensor in content.values())
            _log.debug("checkpoint of step %d: %d bytes of this rank: %s", step, held, laps)
        future = self._thread.submit(
            store.save, self._folder, step, content, manifest, group=self._group, planner=self._planner
        )
        self._in_flight = step, future
        if not self._background:
            future.exception()  # waits; take() raises the error

    def take(self, *, wait: bool) -> tuple[int, Path] | None:
        """Returns step and folder of a finished save, once; None while there is none.

        wait: wait for the save in flight
        Raises PassingError where the checkpoint could not be written.
        """
        if self._in_flight is None or not (wait or self._in_flight[1].done()):
            return None
        (step, future), self._in_flight = self._in_flight, None
        try:
            return step, future.result()
        except OSError as error:
            raise PassingError(
                f"the checkpoint of step {step} cannot be written: {reason_of(error)}",
                where=self._folder,
                fix="the one before it is whole; with space and permission there, the same launch goes on from it",
            ) from None

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies the tensors' current values to CPU memory."""
        copies = {name: self._copy(name, tensor.detach()) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = _local(tensor)
        held = self._copies.get(name)
        if held is None or held.shape != local.shape or held.dtype != local.dtype:
            held = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._copies[name] = held
        held.copy_(local, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return held
        return DTensor.from_local(
            held, self._on_cpu(tensor.device_mesh), tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )

    def _on_cpu(self, mesh: DeviceMesh) -> DeviceMesh:
        """Returns a CPU mesh of the same processes; with the GPU's mesh, a DTensor would move its shard back there."""
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
