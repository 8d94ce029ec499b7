"""One stage, from its start to its last checkpoint. The same function on every rank."""

import os
import time
from pathlib import Path

import torch

from vjepa_scale.checkpoint import store
from vjepa_scale.core.files import append_jsonl, write_atomic
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.parallel import process_group
from vjepa_scale.parallel.fsdp import FsdpEngine
from vjepa_scale.parallel.optim import build_optimizer, get_optimizer_steps, optimizer_tensors, set_optimizer_steps
from vjepa_scale.recipe import Phase, Recipe, recipe_yaml
from vjepa_scale.training.lock import only_trainer_of
from vjepa_scale.training.metrics import MetricsLog, touch
from vjepa_scale.training.start import (
    Start,
    checkpoints_folder,
    data_order,
    find_start,
    open_data,
    stage_folder,
    stage_phases,
)
from vjepa_scale.training.step import NonFiniteLossError, training_step


def train_stage(recipe: Recipe, stage_name: str, ranks: Ranks) -> None:
    """Train a stage until its last step is checkpointed. Resumes by itself.

    Raises UserError for what a user can mend, NonFiniteLossError where the loss is not a number.
    """
    folder = stage_folder(recipe, stage_name)
    folder.mkdir(parents=True, exist_ok=True)
    process_group.start(ranks, recipe.engine, rendezvous=folder / "rendezvous")
    try:
        with only_trainer_of(folder, ranks):
            _Trainer(recipe, stage_name, ranks).run()
    finally:
        process_group.stop()


class _Trainer:
    def __init__(self, recipe: Recipe, stage_name: str, ranks: Ranks) -> None:
        self.recipe, self.stage_name, self.ranks = recipe, stage_name, ranks
        self.engine = FsdpEngine(recipe.engine, ranks)
        self.folder = stage_folder(recipe, stage_name)
        self.checkpoints = checkpoints_folder(recipe, stage_name)
        if ranks.is_main:
            store.remove_unfinished(self.checkpoints)
            touch(Path(recipe.run.dir) / "ledger.jsonl")
        process_group.barrier()
        self.manifests = open_data(recipe)
        self.start = find_start(recipe, stage_name, self.manifests)
        self.phases = stage_phases(recipe, stage_name, self.start)
        self.end = self.phases[-1].end
        self.order = data_order(recipe, self.manifests, self.phases, self.start.base)
        self.objective = Jepa(recipe, self.engine)
        named = [
            (f"{prefix}.{name}", parameter)
            for prefix, network in self.objective.trained.items()
            for name, parameter in network.named_parameters()
        ]
        self.named_parameters = named
        self.optimizer = build_optimizer(recipe.optimizer, named)
        self._restore(self.start)

    def run(self) -> None:
        if self.start.step >= self.end:
            self._say(f"{self.stage_name} is complete at step {self.end}")
            return
        if self.ranks.is_main:
            write_atomic(self.folder / "recipe.yaml", recipe_yaml(self.recipe))
        log = (
            MetricsLog(
                self.folder / "metrics.jsonl",
                step=self.start.step,
                last_step=self.end,
                console_every=self.recipe.log.every,
            )
            if self.ranks.is_main
            else None
        )
        for phase in self.phases:
            if phase.end > self.start.step:
                self._run_phase(phase, log)

    def _run_phase(self, phase: Phase, log: MetricsLog | None) -> None:
        first = max(phase.first, self.start.step)
        loader = PhaseLoader(
            recipe=self.recipe,
            phase=phase,
            order=self.order,
            manifests=self.manifests,
            dp_rank=self.engine.dp_rank,
            dp_world_size=self.engine.dp_world_size,
            first_step=first,
            pin_memory=self.engine.device.type == "cuda",
        )
        clock = time.perf_counter()
        with loader:
            for step, batch in zip(range(first, phase.end), loader, strict=True):
                lr = phase.lr(step)
                try:
                    result = training_step(
                        self.objective,
                        self.engine,
                        self.optimizer,
                        batch,
                        lr=lr,
                        clip_grad_norm=self.recipe.optimizer.clip_grad_norm,
                        measure_rank=step % self.recipe.log.effective_rank_every == 0 or step + 1 == self.end,
                    )
                except NonFiniteLossError as error:
                    self._record_stop(step, error)
                    raise
                now = time.perf_counter()
                if log is not None:
                    log.write(
                        {
                            "step": step,
                            "stage": self.stage_name,
                            "phase": phase.name,
                            "loss": result.loss,
                            "lr": lr,
                            "ema": self.objective.ema_momentum,
                            "grad_norm": result.grad_norm,
                            "clips_per_s": phase.global_batch / (now - clock),
                            "effective_rank": result.effective_rank,
                        }
                    )
                clock = now
                if (step + 1) % self.recipe.checkpoint.every == 0 or step + 1 == phase.end:
                    self._save(phase, step + 1)
                    clock = time.perf_counter()

    # -- checkpoints -------------------------------------------------------------------------------

    def _network_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, network in self.objective.networks.items()
            for name, tensor in network.state_dict().items()
        }

    def _save(self, phase: Phase, step: int) -> None:
        tensors = {**self._network_tensors(), **optimizer_tensors(self.optimizer, self.named_parameters)}
        manifest = {
            "stage": self.stage_name,
            "phase": phase.name,
            "first": self.start.first,
            "base": self.start.base,
            "drawn": self.order.drawn(step),
            "optimizer_steps": get_optimizer_steps(self.optimizer),
            "ends_phase": step == phase.end,
            "fps": self.recipe.data.fps,
            "frames": phase.frames,
            "size": list(phase.size),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "data": {name: manifest.identity for name, manifest in self.manifests.items()},
        }
        path = store.save(self.checkpoints, step, tensors, manifest)
        store.retain(self.checkpoints, keep=self.recipe.checkpoint.keep)
        self._say(f"saved {path}")

    def _restore(self, start: Start) -> None:
        if start.checkpoint is None:
            self._say(f"{self.stage_name} starts fresh")
            return
        tensors = self._network_tensors()  # of files that find_start has just verified
        if start.kind == "init":
            report = store.load(start.checkpoint, tensors, allow_unexpected=("optimizer.",), check=False)
        else:
            tensors |= optimizer_tensors(self.optimizer, self.named_parameters)
            report = store.load(start.checkpoint, tensors, check=False)
            set_optimizer_steps(self.optimizer, store.read_manifest(start.checkpoint)["optimizer_steps"])
        self._say(f"{self.stage_name}: {start.kind} from {start.checkpoint} at step {start.step}: {report}")

    # -- reports -----------------------------------------------------------------------------------

    def _record_stop(self, step: int, error: NonFiniteLossError) -> None:
        if self.ranks.is_main:
            row = {"event": "stop", "stage": self.stage_name, "step": step, "reason": str(error), "pid": os.getpid()}
            append_jsonl(Path(self.recipe.run.dir) / "ledger.jsonl", row, durable=True)

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)
