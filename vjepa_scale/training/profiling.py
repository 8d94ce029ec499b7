"""Profiles the steps of ``profile.steps``: a trace of PyTorch's profiler, and a table of where the time went.

    RUN/STAGE/profile/steps_A_B/rank_R.trace.json.gz   for Perfetto (ui.perfetto.dev) or chrome://tracing
                                rank_R.table.txt       training/step_table.py; also as .json
                                rank_R.memory.pickle   profile.memory, on CUDA: for pytorch.org/memory_viz

A and B are the steps that this attempt has profiled: a resumed one profiles the rest.
"""

import gzip
import logging
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vjepa_scale.core.errors import reason_of
from vjepa_scale.core.files import parse_json, temporary_beside, write_atomic, write_json
from vjepa_scale.core.log import annotate_by
from vjepa_scale.recipe.log_sections import ProfileConfig
from vjepa_scale.training.step_table import in_words, step_name, table_of

_log = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps of the recipe that are between calls of ``before`` and ``after``.

    folder: of the stage
    Only this rank waits for its files; its peers wait for it in their next collective.
    """

    def __init__(self, cfg: ProfileConfig, *, folder: Path, rank: int, device: torch.device) -> None:
        first, end = cfg.steps if cfg.steps is not None and rank in cfg.ranks else (0, 0)
        self._wanted = range(first, end)
        self._folder, self._rank, self._device = folder / "profile", rank, device
        self._memory = cfg.memory and device.type == "cuda"
        self._profile: profile | None = None
        self._steps: list[int] = []
        self._open: AbstractContextManager[object] | None = None  # the region of the last of them, until it has ended

    def before(self, step: int) -> None:
        """Before the batch of a step is loaded: starts the profiler if it is the first of those that are wanted."""
        if step not in self._wanted:
            return
        if self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
            annotate_by(record_function)
        self._steps.append(step)
        self._open = record_function(step_name(step))
        self._open.__enter__()

    def after(self, step: int) -> None:
        """After a step and its checkpoint: writes the files if it is the last of those that are wanted."""
        self._close()
        if step + 1 not in self._wanted:
            self.finish()

    def finish(self) -> None:
        """Writes the files of the steps so far, if the profiler is at work: training stops before the last one."""
        if self._profile is None:
            return
        self._close()
        running, self._profile = self._profile, None
        annotate_by(None)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels of the last step that are still running
        running.stop()
        folder = self._folder / f"steps_{self._steps[0]}_{self._steps[-1] + 1}"
        began = time.perf_counter()
        try:
            self._write(running, folder)
        except OSError as error:  # training itself does not need them
            _log.warning("the profile is not written: %s: %s", error.filename or folder, reason_of(error))
            return
        except ValueError as error:  # not all names that PyTorch writes into a trace are valid JSON
            _log.warning("%s has no table: its trace is not valid JSON: %s", folder, error)
            return
        _log.info("profiled: %s, written in %.1f s", folder, time.perf_counter() - began)

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _write(self, running: profile, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._rank}"
        trace = folder / f"{name}.trace.json.gz"
        plain = temporary_beside(trace)
        try:
            running.export_chrome_trace(str(plain))
            text = plain.read_bytes()
        finally:
            plain.unlink(missing_ok=True)
        write_atomic(trace, gzip.compress(text, compresslevel=1))
        if self._memory:
            memory_snapshot(folder / f"{name}.memory.pickle")
        table = table_of(parse_json(text))
        write_json(folder / f"{name}.table.json", table)
        write_atomic(folder / f"{name}.table.txt", in_words(table))


def memory_snapshot(path: Path) -> None:
    """Writes CUDA's recorded allocations, with their stacks, for pytorch.org/memory_viz. path: in an existing folder"""
    temporary = temporary_beside(path)
    try:
        torch.cuda.memory._dump_snapshot(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
