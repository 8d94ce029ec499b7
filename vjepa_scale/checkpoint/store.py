"""The checkpoints of a stage: written completely or not at all; damage is detected before training starts from one.

    <run>/<stage>/checkpoints/
      step_00000100/          the state after 100 completed steps
        __0_0.distcp          the tensors' shards, a file per rank (PyTorch DCP)
        __1_0.distcp
        __0.sha256            checksums of every chunk of a tensor in them, which readers verify
        .metadata             DCP's index: which tensor is where
        manifest.json         step, recipe, counts …, size and SHA-256 of all files above, its own checksum
      step_00000200/
      .step_00000300.tmp/     being written; unfinished if its writer is dead
      step_00000200.damaged/  found damaged and set aside (manifest.py), until the step is saved again

``save``, ``find_latest``, ``find_last``, ``verify`` and ``load`` are collective where a process group exists: every
rank calls them, and gets the same result or the same error. Without a process group they are local.
"""

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from vjepa_scale.checkpoint.dcp import CheckpointReader, ChunkWriter, write_chunk_checksums
from vjepa_scale.checkpoint.manifest import (
    MANIFEST,
    aside,
    describe_file,
    name_of,
    newest_first,
    newest_name,
    problems,
    read_manifest,
    refuse_older,
    write_manifest,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import remove_dir, replace_dir, restore_dir
from vjepa_scale.core.log import Laps
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.process_group import from_all, from_rank_0, is_main

__all__ = [
    "MANIFEST",
    "LoadReport",
    "find_last",
    "find_latest",
    "load",
    "newest_name",
    "read_manifest",
    "remove_unfinished",
    "retain",
    "save",
    "verify",
]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_planners = itertools.count()
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(tmp|replaced|removing)")


# -- writing -----------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    manifest: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    planner: SavePlanner | None = None,
) -> Path:
    """Writes the checkpoint of ``step`` completed steps; returns its folder, complete and on disk.

    tensors:  plain ones (equal on all ranks) or DTensors, by canonical name
    manifest: further JSON values for the manifest
    group:    a separate group of all processes, for saves in the background (see saver.py)
    planner:  from ``planner()``, one for all saves of the same tensors

    Replaces a checkpoint of the same step (from before a restart, or damaged). Raises OSError on all ranks where one of
    them cannot write its part, and removes the partial checkpoint.
    """
    rank, world_size = process_group.rank(), process_group.world_size()
    final = folder / name_of(step)
    temporary = folder / f".{final.name}.tmp"

    def begin() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()

    def describe() -> dict[str, Any]:
        shards = sorted(temporary.glob(f"__{rank}_*.distcp"))
        checksums, described = write_chunk_checksums(temporary, rank, shards, writer.places)
        for path in [checksums, temporary / ".metadata"] if rank == 0 else [checksums]:
            described[path.name] = describe_file(path)
        return described

    def publish() -> None:
        if rank == 0:
            files = {name: description for part in parts for name, description in part.items()}
            mesh = _mesh_of(tensors)
            write_manifest(temporary, step=step, world_size=world_size, mesh=mesh, files=files, extra=manifest)
            _publish(temporary, final)

    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    writer = ChunkWriter(temporary)
    laps = Laps()
    try:
        _on_all(begin, group)
        laps.lap("begin")
        with _causes():
            dcp.save(detached, storage_writer=writer, planner=planner, process_group=group)
        laps.lap("write")
        parts = _on_all(describe, group)
        laps.lap("checksums")
        _on_all(publish, group)
        laps.lap("publish")
    except OSError:
        if rank == 0:  # the disk may be full: free the space of the partial checkpoint
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if _log.isEnabledFor(logging.DEBUG):
        written = sum(description["bytes"] for part in parts for description in part.values())
        _log.debug("%s: %d bytes of all ranks: %s", final, written, laps)
    return final


def planner() -> SavePlanner:
    """Returns a planner that plans where each shard goes, and caches the plan: for 512 ranks it takes rank 0 27 s.

    PyTorch caches plans by the planner's class. Each planner here gets a new class, because another stage in this
    process, or the process that this one was forked from, has other tensors and ranks.
    """
    own = type(f"Planner{next(_planners)}Of{os.getpid()}", (dcp.DefaultSavePlanner,), {})
    made: SavePlanner = own(enable_plan_caching=True)
    return made


def _mesh_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of processes along each dimension of the mesh that the tensors are sharded over."""
    for tensor in tensors.values():
        if isinstance(tensor, DTensor) and (names := tensor.device_mesh.mesh_dim_names):
            return dict(zip(names, tensor.device_mesh.shape, strict=True))
    return {}


def _publish(temporary: Path, final: Path) -> None:
    replace_dir(temporary, final)
    damaged = final.with_name(f"{final.name}.damaged")
    if damaged.exists():
        shutil.rmtree(damaged)


def retain(folder: Path, *, keep: int, also: Collection[str] = ()) -> None:
    """Removes all but the ``keep`` newest checkpoints, on rank 0; other ranks return at once.

    also: names of further ones to keep
    Keeps ends of phases (``ends_phase`` in the manifest), and checkpoints whose manifest cannot be read, because they
    may be ends of phases.
    """
    if not is_main():
        return
    for checkpoint in newest_first(folder)[keep:]:
        if checkpoint.name in also:
            continue
        try:
            manifest = read_manifest(checkpoint)
        except UserError:
            continue
        if not manifest.get("ends_phase"):
            remove_dir(checkpoint)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed writer left. Called by the one process that will write here, before it starts."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if not (leftover := _LEFTOVER.fullmatch(path.name)):
            continue
        if leftover[1] == "replaced":
            restore_dir(folder / path.name[1:].partition(".")[0])
        if leftover[1] == "tmp":
            _log.warning(f"{path} is an unfinished checkpoint: removed")
        if path.exists():
            shutil.rmtree(path)


# -- finding -----------------------------------------------------------------------------------------


def find_latest(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose files are all undamaged; None if there are no checkpoints.

    Logs a warning for each newer, damaged one. Raises UserError if there are checkpoints and none is good.
    """
    # Only rank 0 lists the folder: on a shared file system, ranks may see a rename at different times.
    checkpoints = from_rank_0(newest_first(folder))
    for checkpoint in checkpoints:
        found = _problems(checkpoint)
        if not found:
            return checkpoint
        if is_main():
            named = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
            _log.warning(f"checkpoint {checkpoint} is damaged and not used: {named}")
    if checkpoints:
        raise UserError(
            f"none of {len(checkpoints)} checkpoints is good (they are named above)",
            where=folder,
            fix="restore one from a copy, or move the folder away to start again on purpose",
        )
    return None


def find_last(folder: Path) -> Path | None:
    """Returns ``find_latest``. Raises UserError where a newer checkpoint is damaged, instead of using an older one."""
    saved = from_rank_0(newest_first(folder) + aside(folder))  # listed first: a running job may save another one
    found = find_latest(folder)
    refuse_older(found, saved, where=folder)
    return found


def verify(checkpoint: Path) -> None:
    """Raises UserError naming what is wrong with a checkpoint, if anything is."""
    if found := _problems(checkpoint):
        raise UserError("; ".join(found[:4]), where=checkpoint, fix="use another checkpoint, or restore this one")


def _problems(checkpoint: Path) -> list[str]:
    """Returns what is wrong with a checkpoint, equal on all ranks; each rank checks its share of the files."""
    rank, world_size = process_group.rank(), process_group.world_size()
    own = problems(checkpoint, rank=rank, world_size=world_size)
    return sorted({problem for part in from_all(own) for problem in part})


# -- loading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """Result of a load. ``missing`` is always empty; ``unexpected`` has the names that the caller allowed to skip."""

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.matched} tensors matched, {len(self.missing)} missing, {len(self.unexpected)} left out"


def load(
    checkpoint: Path, tensors: Mapping[str, Tensor], *, allow_unexpected: tuple[str, ...] = (), check: bool = True
) -> LoadReport:
    """Fills ``tensors``, plain or DTensors of any sharding, in place from a checkpoint.

    allow_unexpected: prefixes of names that may be in the checkpoint and not in ``tensors``
    check:            verify the files first; False for a caller that has just done so

    Raises UserError, before anything is changed, where names, shapes or dtypes differ in any way.
    """
    if check:
        verify(checkpoint)
    reader = CheckpointReader(checkpoint)
    stored = reader.tensors()
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    missing = sorted(tensors.keys() - stored.keys())
    unexpected = sorted(stored.keys() - tensors.keys())
    refused = [name for name in unexpected if not name.startswith(allow_unexpected)]
    matching = sorted(stored.keys() & tensors.keys())
    other = [name for name in matching if stored[name] != wanted[name]]
    if missing or refused or other:
        examples = [
            *(f"{name} is missing" for name in missing[:3]),
            *(f"{name} is unexpected" for name in refused[:3]),
            *(f"{name} is {_form(*stored[name])}, not {_form(*wanted[name])}" for name in other[:3]),
        ]
        raise UserError(
            f"{len(matching) - len(other)} tensors match, {len(missing)} missing, {len(refused)} unexpected, "
            f"{len(other)} of another shape or dtype: {'; '.join(examples)}",
            where=checkpoint,
            fix="give a checkpoint of the same model and optimizer",
        )
    reader.fill({name: tensor.detach() for name, tensor in tensors.items()})
    return LoadReport(len(matching), unexpected=tuple(unexpected))


@contextmanager
def _causes() -> Iterator[None]:
    """DCP wraps the errors of all ranks in one exception; this raises its cause."""
    try:
        yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, UserError | OSError):
                raise cause from None
        raise


def _form(shape: Any, dtype: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# -- all ranks together --------------------------------------------------------------------------------


def _on_all(act: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Runs ``act`` on every rank and returns all results on every rank; raises the OSError of one rank on all."""
    failed: OSError | None = None
    own: list[T] = []
    try:
        own.append(act())
    except OSError as error:
        failed = error
    every = from_all((own, failed), group=group)
    for _, theirs in every:
        if theirs is not None:
            raise theirs
    return [value for values, _ in every for value in values]
