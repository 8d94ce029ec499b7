"""Trains one stage, from its start to its last checkpoint. Every rank runs the same function."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.core.files import write_json
from vjepa_scale.core.log import region
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import StepBatch
from vjepa_scale.data.host_limits import raise_open_files
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.substitution import DecodeFailure
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.process_group import pick_device
from vjepa_scale.eval.observation import Observation
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.run.lock import HELD, stage_lock
from vjepa_scale.run.progress import Progress
from vjepa_scale.run.rank_places import place_of, write_places
from vjepa_scale.training.checkpointer import Checkpointer
from vjepa_scale.training.device_watch import DeviceWatch
from vjepa_scale.training.garbage import SharedCollections
from vjepa_scale.training.out_of_memory import out_of_memory_explained
from vjepa_scale.training.profiling import StepProfiler
from vjepa_scale.training.setup import Training, set_up
from vjepa_scale.training.signals import Interrupt, SavedAndStopped
from vjepa_scale.training.slow_steps import SlowSteps
from vjepa_scale.training.spike_actions import SpikeActions
from vjepa_scale.training.step import (
    NonFiniteLossError,
    StepGradients,
    StepResult,
    apply_gradients,
    compute_gradients,
    skip_step,
)
from vjepa_scale.training.throughput import Throughput, memory

_log = logging.getLogger(__name__)


def train_stage(
    stage: Stage,
    ranks: Ranks,
    *,
    interrupt: Interrupt | None = None,
    progress: Progress | None = None,
) -> None:
    """Trains a stage until its last step is checkpointed. Resumes from its newest checkpoint.

    interrupt: a signal in it makes the stage save and stop after the current step
    progress:  updated with the current step, for failure reports
    Raises UserError for user errors and where ``guards.spikes`` ends the run, NonFiniteLossError by its ``stop``,
    SavedAndStopped after a signal to any rank.
    """
    progress = progress or Progress()
    stage.folder.mkdir(parents=True, exist_ok=True)
    raise_open_files(stage, world_size=ranks.world_size)
    process_group.start(ranks, stage.recipe.engine, rendezvous=stage.folder / "rendezvous")
    try:
        # Half of the timeout: the other ranks wait in a collective meanwhile, which must not time out first.
        with (
            _only_trainer_of(stage.folder, ranks, patience_s=stage.recipe.engine.timeout_s / 2),
            out_of_memory_explained(stage, rank=ranks.rank, progress=progress),
        ):
            _register(stage, ranks)
            _Trainer(set_up(stage, ranks), interrupt or Interrupt(), progress).train()
    except SavedAndStopped:
        process_group.stop()
        raise
    # Not after an error: with NCCL it may wait for peers that wait for this rank, and no rank would report the error.
    process_group.stop()


def _register(stage: Stage, ranks: Ranks) -> None:
    """Rank 0 writes where each rank runs, so that one that dies or hangs can be named. Collective."""
    on_gpu = pick_device(stage.recipe.engine, ranks).type == "cuda"
    places = process_group.from_all(place_of(ranks, pid=os.getpid(), on_gpu=on_gpu))
    if ranks.is_main:
        write_places(stage.folder, ranks.job, places)


@contextmanager
def _only_trainer_of(folder: Path, ranks: Ranks, *, patience_s: float) -> Iterator[None]:
    """Rank 0 holds the stage's lock inside. Every rank raises PassingError if another job holds it.

    patience_s: seconds to wait for another holder to end. After a node failure it may be the job's earlier start, whose
                processes end only when they notice that their peers are gone.
    """
    with stage_lock(folder, patience_s=patience_s) if ranks.is_main else nullcontext(False) as held:
        if not process_group.from_rank_0(held):
            raise PassingError(HELD, where=folder, fix="wait for it, or end it")
        yield


class _Trainer:
    """The loop over phases and steps. All ranks decide together: flags of one rank are reduced with the loss."""

    def __init__(self, training: Training, interrupt: Interrupt, progress: Progress) -> None:
        self.training, self.interrupt, self.progress = training, interrupt, progress
        self.stage, self.recipe = training.stage, training.stage.recipe
        self.objective, self.engine, self.log = training.objective, training.engine, training.log
        self.checkpoints = Checkpointer(training)
        self.spikes = SpikeActions(training, self.checkpoints)
        self.saved_s = 0.0  # that the last checkpoint took, if there was one after the last step
        self.throughput = Throughput(training.stage, training.engine)
        profile, folder, rank = self.recipe.profile, self.stage.folder, training.ranks.rank
        self.profiler = StepProfiler(profile, folder=folder, rank=rank, device=self.engine.device)
        self.slow = SlowSteps(profile, folder=folder, rank=rank, event=self.log.event)
        self.garbage = SharedCollections()
        check = self.recipe.guards.check_devices
        self.devices = DeviceWatch(
            check, device=self.engine.device, dtype=self.engine.compute_type, ranks=training.ranks, log=self.log
        )

    def train(self) -> None:
        start, end = self.training.start, self.training.end
        step = start.step
        if step >= end and self.stage.is_complete(end):
            self.log.say(f"{self.stage.name} is complete at step {end}")
            return
        self.log.begin(start, self.training.phases, attention=self.engine.attention)
        self.devices.check(step)
        with self.slow, self.garbage:
            while step < end:
                step = self._train_phase(next(phase for phase in self.training.phases if phase.end > step), step)
        self.profiler.finish()
        if self.stage.evaluates:
            self._evaluate()
        self.log.event("done", step=end)

    def _train_phase(self, phase: Phase, first: int) -> int:
        """Trains a phase from a step on. Returns the step to go on from: the phase's end, or a checkpoint's."""
        self.progress.enter("evaluation")
        self.objective.before_phase(phase, partial(self._stop_if_asked, first))
        self.log.say(f"{self.stage.name}: {phase.name}, steps {first} to {phase.end - 1}: waiting for the first batch")
        clock = time.perf_counter()
        with self._loader(phase, first) as loader:
            for step, batch in self._steps(range(first, phase.end), loader):
                self.progress.step, self.progress.phase = step, phase.name
                waited_s = time.perf_counter() - clock
                observe = self._observation(step, loader)
                with self._ending_recorded(step):
                    gradients = self._gradients(phase, step, batch, observe, waited_s)
                    spike = self.spikes.met(phase, step, gradients)
                    if spike is not None and spike.to is not None:
                        self.engine.discard_gradients()
                        self.slow.disarm(step, seconds=time.perf_counter() - clock)
                        self.profiler.after(step)
                        self.progress.enter("setup")
                        return self.spikes.roll_back(spike)
                    result = self._updated(phase, step, gradients, skip=spike is not None)
                now = time.perf_counter()
                _log.debug("step %d: load %.4f s, %s", step, waited_s, result.laps)
                self._record(phase, step, result, seconds=now - clock)
                self.slow.disarm(step, seconds=now - clock)
                began = time.perf_counter()
                self.devices.after(step, result.waited_s, seconds=now - clock)
                self.checkpoints.collect()
                if saves := result.stop or self.checkpoints.due(phase, step + 1):
                    with region("save"):
                        self.checkpoints.save(phase, step + 1)
                self.saved_s = time.perf_counter() - began
                self.profiler.after(step)
                self.garbage.after(step, saved=saves)
                clock = now + (time.perf_counter() - began)  # saving, checks and profiles are no part of a step
                if result.stop and step + 1 < self.training.end:
                    self._stop(step + 1)
        return phase.end

    def _steps(self, steps: range, loader: PhaseLoader) -> Iterator[tuple[int, StepBatch]]:
        """Yields each step with its batch. What is measured of a step begins before its batch is loaded."""
        batches = iter(loader)
        self.slow.begin(steps.start)
        for step in steps:
            self.profiler.before(step)
            self.slow.arm(step)
            self.progress.begin(step, first=step == steps.start)
            with region("load"), self.interrupt.ends_wait(f"the data of step {step}"):
                batch = next(batches)
            yield step, batch

    def _observation(self, step: int, loader: PhaseLoader) -> Observation | None:
        """Returns what collects a step's figures, in a step in which they are measured."""
        if step % self.recipe.log.effective_rank_every and step + 1 != self.training.end:
            return None
        observe = Observation(self.stage.data_sets)
        for name, value in memory(self.engine.device, loader.worker_pids()).items():
            observe.add_of_rank(name, value)
        return observe

    def _gradients(
        self, phase: Phase, step: int, batch: StepBatch, observe: Observation | None, waited_s: float
    ) -> StepGradients:
        """Masks, target, context, prediction, loss; reduce. Nothing moves."""
        failures = self.training.skipped.new(failure for part in batch for failure in part.failures)
        gradients = compute_gradients(
            self.objective,
            self.engine,
            batch,
            observe=observe,
            counts=self.throughput.counts(phase, batch),
            waited_s=waited_s,
            stop_asked=self.interrupt.signal is not None,
            collapsed=observe is not None and self.log.collapsed(),
            failures=len(failures),
        )
        if gradients.collapsed:
            raise self.log.collapse()
        if gradients.failures:
            self._enter(phase, step, failures)
        return gradients

    def _updated(self, phase: Phase, step: int, gradients: StepGradients, *, skip: bool) -> StepResult:
        """On all ranks or none: clip, step, EMA."""
        if (weight_decay := phase.weight_decay(step)) is not None:
            self.engine.set_weight_decay(weight_decay)
        if (momentum := phase.ema_momentum(step)) is not None:
            self.objective.ema_momentum = momentum
        lr = phase.lr(step)
        if skip:
            return skip_step(self.objective, self.engine, gradients, lr=lr)
        return apply_gradients(
            self.objective,
            self.engine,
            gradients,
            lr=lr,
            clip_grad_norm=self.stage.optimizer.clip_grad_norm,
        )

    def _loader(self, phase: Phase, first: int) -> PhaseLoader:
        return PhaseLoader(
            stage=self.stage,
            phase=phase,
            order=self.training.order,
            manifests=self.training.manifests,
            dp_rank=self.engine.dp_rank,
            dp_world_size=self.engine.dp_world_size,
            first_step=first,
            pin_memory=self.engine.device.type == "cuda",
            known=self.training.skipped.known(),
            records=self.training.records,
        )

    def _enter(self, phase: Phase, step: int, mine: list[DecodeFailure]) -> None:
        """Writes all ranks' decode failures of a step into the ledger, before any update. Collective."""
        self.log.refuse_if_superseded()  # a later start has read the ledger; a new row would change its next resume
        everyone = [failure for failures in process_group.from_all(mine) for failure in failures]
        # No barrier is needed: rank 0 writes before its step, and every checkpoint needs that step.
        entered = self.training.skipped.enter(
            everyone,
            step=step,
            global_batch=phase.global_batch,
            faults=self.recipe.data.faults,
            write=self.training.ranks.is_main,
        )
        for failure in entered:
            self.log.say(f"replaced: {failure}")
        counts = ", ".join(f"{dataset}: {cause} {n}" for (dataset, cause), n in self.training.skipped.counts().items())
        self.log.say(f"{self.stage.name}: clips replaced so far: {counts}")

    def _record(self, phase: Phase, step: int, result: StepResult, *, seconds: float) -> None:
        if result.lost:
            self.log.say(f"step {step}: {', '.join(result.lost)}: gradient not finite, set to 0")
        weight_decay = phase.weight_decay(step)
        self.log.step(
            {
                "step": step,
                "stage": self.stage.name,
                "phase": phase.name,
                "loss": _or_null(result.loss),
                "lr": result.lr,
                **({} if weight_decay is None else {"weight_decay": weight_decay}),
                "ema": self.objective.ema_momentum,
                **{name: _or_null(value) for name, value in result.parts.items()},
                "grad_norm": _or_null(result.grad_norm),
                **({"skipped": 1} if result.skipped else {}),
                "clips_per_s": phase.global_batch / seconds,
                **self.throughput.columns(result, seconds=seconds, saved_s=self.saved_s),
                "effective_rank": None,
                **self.training.skipped.substituted(step),
            },
            result.measured,
        )

    def _evaluate(self) -> None:
        """Evaluates the objective and writes evaluation.json."""
        self.progress.enter("evaluation")
        found = self.objective.evaluation(self.training.phases, partial(self._stop_if_asked, self.training.end))
        self.log.refuse_if_superseded()
        if found is not None:
            result, lines = found
            origin = {"init_from": self.stage.config.init_from, **self.training.origin}
            write_json(self.stage.evaluation, {"origin": origin, "step": self.training.end, **result})
            self.log.say("\n".join(lines))

    # -- stops -----------------------------------------------------------------------------------------

    @contextmanager
    def _ending_recorded(self, step: int) -> Iterator[None]:
        """If the run stops itself inside, records the reason and completes the checkpoint that is being written."""
        try:
            yield
        except (NonFiniteLossError, UserError) as error:
            self.log.stopped_by(error, step)
            with region("save"):
                self.checkpoints.collect(wait=True)
            raise

    def _stop_if_asked(self, step: int) -> None:
        """Stops after a signal to any rank. Saves nothing, since no step has run since ``step``. Collective."""
        self.progress.beat()
        asked = torch.tensor(float(self.interrupt.signal is not None), device=self.engine.device)
        if self.engine.mean(asked).item() > 0:
            self._stop(step)

    def _stop(self, step: int) -> None:
        self.profiler.finish()  # now, since another rank's exit may end this one
        self.checkpoints.collect(wait=True)
        signal = self.interrupt.signal or "a signal to another rank"
        self.log.event("interrupted", step=step, signal=signal)
        self.log.say(f"{self.stage.name}: stopped by {signal}: saved at step {step}; the same command resumes there")
        process_group.barrier()  # the first exit may end the other ranks, so the history must be complete before
        raise SavedAndStopped(f"{signal}: saved at step {step}")


def _or_null(value: float) -> float | None:
    """Returns what JSON has for a value: it has none for one that is not finite."""
    return value if math.isfinite(value) else None
