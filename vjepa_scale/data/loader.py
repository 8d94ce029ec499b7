"""Loads micro-batches for one rank and one phase, from any step on.

A map-style data set whose index is (step, micro-batch), a list of indices that starts where the run starts,
and PyTorch's DataLoader between them: workers prefetch, results come in order. Nothing has a state, so after a clip
has crashed a worker, new workers start at the rank's current step.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vjepa_scale.core import log
from vjepa_scale.core.errors import OutsideError, PassingError, UserError
from vjepa_scale.core.stacks import answer_with_stacks
from vjepa_scale.core.worker_pool import keep_freed_memory, start_worker, worker_context
from vjepa_scale.data.batch import MicroBatch, StepBatch, load_micro_batch
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.substitution import Known, Place
from vjepa_scale.data.watchdog import Awaited, DecodeStatus, Stuck, WorkerWatchdog
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.limits import item_limit_s
from vjepa_scale.recipe.phases import accumulation

_log = logging.getLogger(__name__)

Index = TypeVar("Index")
Item = TypeVar("Item")

# Exit code of a worker that cannot pass an item on (EX_IOERR).
_NOT_SENT = 74


class PhaseLoader:
    """Iterates over this rank's StepBatch of every step from ``first_step`` to the end of the phase.

    manifests:               by data set name
    dp_rank, dp_world_size:  rank r takes micro-batches r·A … (r+1)·A−1 of each step, A = accumulation
    pin_memory:              for a copy to a GPU that does not block
    known:                   clips that are known not to decode; they are replaced without an attempt
    records:                 for data sets of which the stage draws only some records, these records
    Use it in a ``with`` statement, which ends its workers. A clip that does not decode within
    data.faults.decode_timeout_s is replaced, and reported in its MicroBatch's ``failures``. Raises UserError where a
    shard cannot be read, and where the replacements of a clip do not decode either; PassingError where a worker comes
    no further for data.faults.item_timeout_s while its batch is awaited.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        phase: Phase,
        order: DataOrder,
        manifests: Mapping[str, Manifest],
        dp_rank: int,
        dp_world_size: int,
        first_step: int,
        pin_memory: bool = False,
        known: Known | None = None,
        records: Mapping[str, Ints] | None = None,
    ) -> None:
        assert phase.first <= first_step < phase.end, f"step {first_step} is not in phase {phase.name}"
        self._per_step = accumulation(phase, dp_world_size=dp_world_size)
        mine = range(dp_rank * self._per_step, (dp_rank + 1) * self._per_step)
        self._data, self._pin_memory = stage.recipe.data, pin_memory
        self._item_limit_s, self._manifests = item_limit_s(stage.recipe), manifests
        self._workers = self._data.workers if stage.decodes_clips else 0
        self._indices = _Indices(range(first_step, phase.end), mine)
        self._load = partial(
            load_micro_batch,
            stage,
            phase,
            order,
            dict(manifests),
            records=dict(records or {}),
            prepared=stage.prepared(phase, manifests),
        )
        self._known = dict(known or {})
        self._names = order.names
        self._items: Prefetched[tuple[int, int], MicroBatch] | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        micro_batches = past_lost_clips(self._from, len(self._indices))
        for first in micro_batches:
            yield [first, *(next(micro_batches) for _ in range(self._per_step - 1))]

    def _from(self, given: int, lost: Known) -> "Prefetched[tuple[int, int], MicroBatch]":
        data = self._data
        board = DecodeStatus(self._names, self._workers) if self._workers else None
        if board is None:  # clips are decoded in this process
            keep_freed_memory()
        self._items = Prefetched(
            partial(self._load, known={**self._known, **lost}, timed=board),
            list(islice(self._indices, given, None)) if given else self._indices,
            workers=self._workers,
            prefetch=data.prefetch,
            pin_memory=self._pin_memory,
            board=board,
            limit_s=data.faults.decode_timeout_s,
            item_limit_s=self._item_limit_s,
            file_of=self._file_of,
        )
        return self._items

    def _file_of(self, place: Place) -> Path:
        manifest = self._manifests[place.dataset]
        return manifest.folder / manifest.shard_of(place.record).name

    def worker_pids(self) -> list[int]:
        """Returns the processes that load now; none where clips are decoded in this process."""
        return [] if self._items is None else self._items.worker_pids()

    def close(self) -> None:
        """End the workers."""
        if self._items is not None:
            self._items.close()

    def __enter__(self) -> "PhaseLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ClipsLost(Exception):
    """Some clips have crashed or blocked their workers. clips: place -> (cause, detail)."""

    def __init__(self, clips: Known) -> None:
        self.clips = dict(clips)
        super().__init__(", ".join(map(str, clips)))


class Prefetched(Generic[Index, Item]):
    """``load(index)`` for every index, in order, prefetched by worker processes (0: computed in this process).

    board:   status of the workers' decoding; a worker that decodes one clip for longer than ``limit_s`` s is killed
    item_limit_s: of a worker that comes no further while its item is awaited; then raises PassingError
    file_of: returns the file of a clip, for that error
    A UserError in a worker is raised here unchanged, without the worker's traceback. With a board, raises ClipsLost
    where clips have ended workers; all other workers are ended too.
    """

    def __init__(
        self,
        load: Callable[[Index], Item],
        indices: Iterable[Index],
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool = False,
        board: DecodeStatus | None = None,
        limit_s: float = float("inf"),
        item_limit_s: float = float("inf"),
        file_of: Callable[[Place], Path] | None = None,
    ) -> None:
        assert isinstance(indices, Sized), "indices must have a length and be iterable more than once"
        self._iterator: Iterator[Any] | None = None
        self._board, self._limit_s, self._item_limit_s, self._file_of = board, limit_s, item_limit_s, file_of
        self._waits = False
        self._watch: WorkerWatchdog | None = None
        # One item of the DataLoader is a whole micro-batch, so it does no batching.
        self._loader: DataLoader[Item | UserError] = DataLoader(
            _Items(load),
            batch_size=None,
            sampler=indices,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=partial(_start_loader_worker, log.current()) if workers else None,
            multiprocessing_context=worker_context(__name__) if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader draws a seed from the process's global generator
        )

    def __iter__(self) -> Iterator[Item]:
        self._iterator = iterator = iter(self._loader)
        if self._board is not None:
            self._watch = WorkerWatchdog(
                self._board,
                list(iterator._workers),  # type: ignore[attr-defined]
                limit_s=self._limit_s,
                awaited=self._awaited,
                item_limit_s=self._item_limit_s,
            )
        while True:
            try:
                self._waits = True
                item = next(iterator)
            except StopIteration:
                return
            except Exception:  # DataLoader raises many types, also when the connection to a dead worker breaks
                if (stuck := self._watch.stuck if self._watch is not None else None) is not None:
                    self.close(at_once=True)
                    raise self._stuck_error(stuck) from None
                if lost := self._watch.lost() if self._watch is not None else None:
                    self.close()
                    raise ClipsLost(lost) from None
                if (explained := _explained(iterator._workers)) is not None:  # type: ignore[attr-defined]
                    self.close()
                    raise explained from None
                raise
            except BaseException:  # a signal has ended the wait
                self.close(at_once=True)
                raise
            finally:
                self._waits = False
            if isinstance(item, UserError):
                self.close()
                raise item
            yield item

    def _awaited(self) -> Awaited | None:
        """Of the thread of the watchdog. DataLoader gives items in order, and knows who loads each."""
        iterator: Any = self._iterator
        if not self._waits or iterator is None:
            return None
        number = iterator._rcvd_idx
        task = iterator._task_info.get(number)
        return None if task is None else Awaited(number, task[0])

    def _stuck_error(self, stuck: Stuck) -> PassingError:
        pins = "; if it has nothing to do, the thread that pins memory hangs" if self._loader.pin_memory else ""
        return PassingError(
            f"{stuck}{pins}",
            where=self._file_of(stuck.last) if self._file_of is not None and stuck.last is not None else None,
            fix="if its file server does not answer, another attempt may succeed; data.faults.item_timeout_s is the "
            "limit",
        )

    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in getattr(self._iterator, "_workers", ())]

    def close(self, *, at_once: bool = False) -> None:
        """Ends the workers.

        at_once: kills them first, since some hang: DataLoader waits 10 s for each, and its SIGTERM is blocked in them
        """
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        # DataLoader has no close(). Deleting its iterator ends workers only if nothing else refers to it.
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            workers = list(self._iterator._workers)  # type: ignore[union-attr]
            for worker in workers if at_once else ():
                worker.kill()
            shutdown()
            for worker in workers:  # a worker that hangs in a decoder may not react to SIGTERM
                if worker.is_alive():
                    worker.kill()
        self._iterator = None


def past_lost_clips(start: Callable[[int, Known], Prefetched[Any, Item]], count: int) -> Iterator[Item]:
    """Yields ``count`` items in order, and starts new workers each time that clips have ended the old ones.

    start: (number of items so far, clips lost so far) -> the loader of the remaining items
    """
    lost: dict[Place, tuple[str, str]] = {}
    given = 0
    while given < count:
        items = start(given, lost)
        try:
            for item in items:
                given += 1
                yield item
        except ClipsLost as gone:
            lost |= gone.clips
        finally:
            items.close()


class _Items(Dataset[Item | UserError], Generic[Index, Item]):
    """Returns a UserError as a value, because DataLoader would wrap an exception in a page of traceback."""

    def __init__(self, load: Callable[[Index], Item]) -> None:
        self._load = load

    def __getitem__(self, index: Index) -> Item | UserError:
        try:
            return self._load(index)
        except UserError as error:
            return error


class _Indices:
    """The indices (step, micro-batch) of a phase's steps and a rank's micro-batches, in order."""

    def __init__(self, steps: range, micro_batches: range) -> None:
        self._steps, self._micro_batches = steps, micro_batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, number) for step in self._steps for number in self._micro_batches)

    def __len__(self) -> int:
        return len(self._steps) * len(self._micro_batches)


def _as_is(item: Item) -> Item:
    return item


def _start_loader_worker(rank: log.Process, number: int) -> None:
    start_worker(rank.worker(number))
    queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    answer_with_stacks(f"loader worker {number}")
    keep_freed_memory()


def _explained(workers: Sequence[BaseProcess]) -> UserError | None:
    """Returns why the first worker that has ended has ended, where that is known."""
    for number, worker in enumerate(workers):
        worker.join(0.25)  # its connection may close before its exit status is available
        if worker.exitcode == _NOT_SENT:
            return PassingError(
                "a loader worker cannot pass a batch on through shared memory; its error is in the log",
                where="/dev/shm",
                fix="free space there, or use fewer data.workers or a smaller data.prefetch",
            )
        if worker.exitcode == -signal.SIGKILL:
            return OutsideError(
                f"loader worker {number} (pid {worker.pid}) was ended by SIGKILL",
                where="data.workers",
                fix="if the node's memory was full, use fewer, or a smaller data.prefetch",
            )
    return None


def _end_unsent(error: Exception, item: object) -> None:
    """Ends a worker whose item cannot be sent, since shared memory is full, say.

    multiprocessing only prints the error and drops the item, for which the rank would wait for ever.
    """
    _log.error(f"an item cannot be sent: {error}")
    os._exit(_NOT_SENT)
