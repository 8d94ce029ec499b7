"""One stage, from its start to its last checkpoint. The same function on every rank."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.core.files import append_jsonl, keep_reserve, write_atomic, write_json
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.host_limits import check_limits, raise_open_files
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.selection import keeps_tokens, kept_records
from vjepa_scale.data.substitution import DecodeFailure
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.eval.attentive_probe import ProbeEvaluation, table
from vjepa_scale.eval.probe_rounds import keep_tokens
from vjepa_scale.objective.build import build_objective
from vjepa_scale.objective.probe import Probes
from vjepa_scale.recipe import Phase, Recipe, recipe_yaml, resolve_phases
from vjepa_scale.recipe.folders import checkpoints_folder, evaluation_file, stage_folder
from vjepa_scale.run.events import History
from vjepa_scale.run.failures import Progress
from vjepa_scale.run.lock import HELD, stage_lock
from vjepa_scale.run.metrics import MetricsLog, touch
from vjepa_scale.training.evaluated import is_evaluated
from vjepa_scale.training.initial import load_initial
from vjepa_scale.training.load_weights import load_foreign
from vjepa_scale.training.preflight import data_order, open_data
from vjepa_scale.training.signals import Interrupt, SavedAndStopped
from vjepa_scale.training.skipped_clips import NAME, Ledger
from vjepa_scale.training.start import Start, find_start, origin_of
from vjepa_scale.training.statistics import action_statistics
from vjepa_scale.training.step import NonFiniteLossError, training_step
from vjepa_scale.video.decode import TORCHCODEC
from vjepa_scale.video.torchcodec import import_torchcodec


class SupersededError(RuntimeError):
    """A later start of the same stage has taken over; this one must write nothing more."""


def train_stage(
    recipe: Recipe,
    stage_name: str,
    ranks: Ranks,
    *,
    interrupt: Interrupt | None = None,
    progress: Progress | None = None,
) -> None:
    """Train a stage until its last step is checkpointed. Resumes by itself.

    interrupt: asks for a save and a stop after the current step
    progress:  kept up to date, for whoever reports a failure
    Raises UserError for what a user can mend, NonFiniteLossError where the loss is not a number,
    SavedAndStopped where a rank was interrupted.
    """
    folder = stage_folder(recipe, stage_name)
    folder.mkdir(parents=True, exist_ok=True)
    raise_open_files(recipe, world_size=ranks.world_size)
    process_group.start(ranks, recipe.engine, rendezvous=folder / "rendezvous")
    try:
        # Half, so that the other ranks, who wait for the answer in a collective, do not run out of time first.
        with _only_trainer_of(folder, ranks, patience_s=recipe.engine.timeout_s / 2):
            _Trainer(recipe, stage_name, ranks, interrupt or Interrupt(), progress or Progress()).run()
    except SavedAndStopped:
        process_group.stop()
        raise
    # Not after an error: with NCCL it may wait for peers that wait for us, and nobody would report anything.
    process_group.stop()


@contextmanager
def _only_trainer_of(folder: Path, ranks: Ranks, *, patience_s: float) -> Iterator[None]:
    """Rank 0 holds the stage's lock inside; every rank raises PassingError where another job holds it.

    patience_s: how long the holder has to end. After a node failure it may be our own predecessor, whose processes end
                only when they notice that their peers are gone.
    """
    with stage_lock(folder, patience_s=patience_s) if ranks.is_main else nullcontext(False) as held:
        if not process_group.from_rank_0(held):
            raise PassingError(HELD, where=folder, fix="wait for it, or end it")
        yield


class _Trainer:
    def __init__(self, recipe: Recipe, stage_name: str, ranks: Ranks, interrupt: Interrupt, progress: Progress) -> None:
        self.recipe, self.stage_name, self.ranks = recipe, stage_name, ranks
        self.interrupt, self.progress = interrupt, progress
        self.engine = build_engine(recipe.engine, ranks)
        self.folder = stage_folder(recipe, stage_name)
        self.checkpoints = checkpoints_folder(recipe, stage_name)
        self.history = History(self.folder)
        self.saver = Saver(self.checkpoints, background=recipe.checkpoint.background, device=self.engine.device)
        if ranks.is_main:
            store.remove_unfinished(self.checkpoints)
            touch(Path(recipe.run.dir) / NAME)
        check_limits(recipe, stage_name, ranks_on_node=ranks.local_world_size)
        if recipe.data.decoder == TORCHCODEC:
            import_torchcodec()  # now, not in the first worker
        process_group.barrier()
        self.manifests = open_data(recipe, stage_name)
        self.start = find_start(recipe, stage_name, self.manifests)
        self.origin = origin_of(self.start)  # now: that checkpoint may be removed while this stage trains
        self.ledger = Ledger(Path(recipe.run.dir), stage_name)
        self.phases = resolve_phases(recipe, stage_name, first=self.start.first)
        self.end = self.phases[-1].end
        self.kept = kept_records(recipe, self.phases, self.manifests)
        self.statistics = action_statistics(recipe, self.start, self.phases, self.manifests, self.kept, ranks)
        self.order = data_order(recipe, self.manifests, self.phases, self.start.base, self.kept)
        self.objective = build_objective(recipe, stage_name, self.engine, self.manifests)
        self.engine.start_optimizer(
            recipe.optimizer_of(stage_name), self.objective.trained, self.objective.settings, self.objective.unreached
        )
        self._restore(self.start)
        self.kept_geometry: object = None  # of the clips whose tokens are kept

    def run(self) -> None:
        if self.start.step >= self.end and is_evaluated(self.recipe, self.stage_name, step=self.end):
            self._say(f"{self.stage_name} is complete at step {self.end}")
            return
        log = self._begin() if self.ranks.is_main else None
        for phase in self.phases:
            if phase.end > self.start.step:
                self._run_phase(phase, log)
        if isinstance(self.objective, Probes):
            self._evaluate(self.objective)
        self._note("done", step=self.end)

    def _begin(self) -> MetricsLog:
        """Rank 0's books of this attempt."""
        keep_reserve(self.folder)
        evaluation_file(self.recipe, self.stage_name).unlink(missing_ok=True)  # of probes that this one replaces
        of_run = Path(self.recipe.run.dir) / "recipe.yaml"
        for path in (self.folder / "recipe.yaml", *([] if of_run.exists() else [of_run])):  # no launcher wrote it
            write_atomic(path, recipe_yaml(self.recipe))
        log = MetricsLog(
            self.folder / "metrics.jsonl",
            step=self.start.step,
            last_step=self.end,
            console_every=self.recipe.log.every,
        )
        self._note(
            "started",
            job_id=self.ranks.job_id,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            world_size=self.ranks.world_size,
            kind=self.start.kind,
            step=self.start.step,
            repeated=log.repeated,
            attention=self.engine.attention,
        )
        self._say(f"{self.stage_name}: attention by {self.engine.attention}")
        return log

    def _run_phase(self, phase: Phase, log: MetricsLog | None) -> None:
        first = max(phase.first, self.start.step)
        if isinstance(self.objective, Probes) and keeps_tokens(self.recipe, phase):
            self._keep_tokens(self.objective, phase)
        loader = PhaseLoader(
            recipe=self.recipe,
            phase=phase,
            order=self.order,
            manifests=self.manifests,
            dp_rank=self.engine.dp_rank,
            dp_world_size=self.engine.dp_world_size,
            first_step=first,
            pin_memory=self.engine.device.type == "cuda",
            known=self.ledger.known(),
            kept=self.kept,
        )
        clock = time.perf_counter()
        with loader:
            batches = iter(loader)
            for step in range(first, phase.end):
                self.progress.step = step
                batch, lr = next(batches), phase.lr(step)
                accidents = self.ledger.new(accident for part in batch for accident in part.accidents)
                try:
                    result = training_step(
                        self.objective,
                        self.engine,
                        batch,
                        lr=lr,
                        clip_grad_norm=self.recipe.optimizer_of(self.stage_name).clip_grad_norm,
                        measure_rank=step % self.recipe.log.effective_rank_every == 0 or step + 1 == self.end,
                        stop_asked=self.interrupt.signal is not None,
                        accidents=len(accidents),
                        settle=partial(self._settle, phase, step, accidents),
                    )
                except (NonFiniteLossError, UserError) as error:
                    if log is not None:
                        log.flush()
                    self._record_stop(step, error)
                    self._take_saved(wait=True)
                    raise
                now = time.perf_counter()
                if result.lost:
                    self._say(f"step {step}: {', '.join(result.lost)}: gradient not finite, not learned from")
                if log is not None:
                    log.write(
                        {
                            "step": step,
                            "stage": self.stage_name,
                            "phase": phase.name,
                            "loss": result.loss,
                            "lr": lr,
                            "ema": self.objective.ema_momentum,
                            **result.parts,
                            "grad_norm": result.grad_norm,
                            "clips_per_s": phase.global_batch / (now - clock),
                            "effective_rank": result.effective_rank,
                            "substituted": self.ledger.substituted(step),
                        }
                    )
                clock = now
                self._take_saved()
                if result.stop or (step + 1) % self.recipe.checkpoint.every == 0 or step + 1 == phase.end:
                    if log is not None:
                        log.flush()  # who resumes there finds every row before it
                    self._save(phase, step + 1)
                    clock = time.perf_counter()
                if result.stop and step + 1 < self.end:
                    self._stop(step + 1)

    def _keep_tokens(self, probes: Probes, phase: Phase) -> None:
        """Those of a phase's training clips, unless the phase before saw the same of them."""
        geometry = phase.geometries, phase.size
        if self.kept_geometry != geometry:
            stop = partial(self._stop_if_asked, max(phase.first, self.start.step))
            probes.kept = keep_tokens(
                self.recipe, probes.encode, self.engine, self.manifests, self.kept, phase, self.ranks, stop
            )
            self._say(f"{self.stage_name}: the tokens of {len(probes.kept)} clips are kept: steps do not encode them")
        self.kept_geometry = geometry

    def _settle(self, phase: Phase, step: int, mine: list[DecodeFailure]) -> None:
        """All ranks' accidents of a step into the ledger."""
        self._refuse_if_superseded()  # a row that the successor has not read would change the run at its next resume
        everyone = [accident for accidents in process_group.from_all(mine) for accident in accidents]
        # No barrier behind it: rank 0's step, and with it every checkpoint, comes after its writing.
        entered = self.ledger.enter(
            everyone,
            step=step,
            global_batch=phase.global_batch,
            faults=self.recipe.data.faults,
            write=self.ranks.is_main,
        )
        for accident in entered:
            self._say(f"replaced: {accident}")
        counts = ", ".join(f"{dataset}: {cause} {n}" for (dataset, cause), n in self.ledger.counts().items())
        self._say(f"{self.stage_name}: clips replaced so far: {counts}")

    def _evaluate(self, probes: Probes) -> None:
        """What the probes are worth, into evaluation.json."""
        evaluation = ProbeEvaluation(
            self.recipe,
            probes,
            self.engine,
            self.manifests,
            self.kept,
            self.phases[-1],
            partial(self._stop_if_asked, self.end),
        )
        peak_lr = max(max(phase.start_lr, phase.final_lr) for phase in self.phases)
        result = evaluation.result(step=self.end, peak_lr=peak_lr)
        self._refuse_if_superseded()
        if result is not None:
            origin = {"init_from": self.recipe.stages()[self.stage_name].init_from, **self.origin}
            write_json(evaluation_file(self.recipe, self.stage_name), {"origin": origin, **result})
            self._say("\n".join(table(result)))

    def _stop_if_asked(self, step: int) -> None:
        """Between steps: nothing is to be saved that was not saved at this one."""
        asked = torch.tensor(float(self.interrupt.signal is not None), device=self.engine.device)
        if self.engine.mean(asked).item() > 0:
            self._stop(step)

    # -- checkpoints -------------------------------------------------------------------------------

    def _save(self, phase: Phase, step: int) -> None:
        self._take_saved(wait=True)
        self._refuse_if_superseded()
        tensors = self.engine.tensors(self.objective.networks, optimizer=True)
        manifest = {
            "stage": self.stage_name,
            "phase": phase.name,
            "first": self.start.first,
            "base": self.start.base,
            "origin": self.origin,
            "drawn": self.order.drawn(step),
            "optimizer_steps": self.engine.optimizer_steps,
            "ends_phase": step == phase.end,
            "fps": self.recipe.data.fps,
            "frames": phase.frames,
            "size": list(phase.size),
            "attention": self.engine.attention,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "data": {name: manifest.identity for name, manifest in self.manifests.items()},
            **({"trajectories": self.statistics} if self.statistics else {}),
        }
        self.saver.save(step, tensors, manifest, are_copies=self.engine.gives_copies)
        if step == self.end:
            self._take_saved(wait=True)

    def _take_saved(self, *, wait: bool = False) -> None:
        """Note the checkpoint that is complete now, if one is."""
        if (saved := self.saver.take(wait=wait)) is None:
            return
        step, path = saved
        store.retain(self.checkpoints, keep=self.recipe.checkpoint.keep)
        self._note("saved", step=step)
        self._say(f"saved {path}")

    def _refuse_if_superseded(self) -> None:
        """A start of this stage after ours (its node was given up, yet lives) is the one that counts."""
        last = [row for row in self.history.rows() if row["event"] == "started"][-1] if self.ranks.is_main else None
        job = process_group.from_rank_0(last and last["job"])
        if job != self.ranks.job:
            raise SupersededError(
                f"{self.stage_name} has been started again, as job {job}: this one, {self.ranks.job}, ends"
            )

    def _restore(self, start: Start) -> None:
        if start.checkpoint is None:
            self._say(f"{self.stage_name} starts fresh")
            return
        tensors = self.engine.tensors(self.objective.networks, optimizer=start.kind != "init")
        if start.foreign:
            report = load_foreign(self.recipe, self.stage_name, start.checkpoint, tensors)
            self.engine.optimizer_steps = start.step
        elif start.kind == "init":
            report = str(load_initial(self.recipe, self.stage_name, start.checkpoint, tensors))
        else:
            report = str(store.load(start.checkpoint, tensors, check=False))  # find_start has just verified the files
            self.engine.optimizer_steps = store.read_manifest(start.checkpoint)["optimizer_steps"]
        self.engine.restore(self.objective.networks, tensors)
        self._say(f"{self.stage_name}: {start.kind} from {start.checkpoint} at step {start.step}: {report}")
        then = store.read_manifest(start.checkpoint).get("attention") if start.kind == "resume" else None
        if then not in (None, self.engine.attention):
            self._say(f"attention was by {then}, now by {self.engine.attention}: equal in the method, not to the bit")

    # -- reports -----------------------------------------------------------------------------------

    def _stop(self, step: int) -> None:
        self._take_saved(wait=True)
        signal = self.interrupt.signal or "a signal to another rank"
        self._note("interrupted", step=step, signal=signal)
        self._say(f"{self.stage_name}: {signal} obeyed: saved at step {step}, to go on from there")
        process_group.barrier()  # the first to exit may have the others ended; the history must be written by then
        raise SavedAndStopped(f"{signal}: saved at step {step}")

    def _note(self, event: str, **values: object) -> None:
        if self.ranks.is_main:
            self.history.add(event, job=self.ranks.job, **values)

    def _record_stop(self, step: int, error: Exception) -> None:
        if self.ranks.is_main:
            row = {"event": "stop", "stage": self.stage_name, "step": step, "reason": str(error), "pid": os.getpid()}
            append_jsonl(self.ledger.path, row, durable=True)

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)
