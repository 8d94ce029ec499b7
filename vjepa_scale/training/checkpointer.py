"""The checkpoints of a stage in training: when one is due, the facts in its manifest, and which ones to keep."""

import logging

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.evaluations import kept_by_evaluation
from vjepa_scale.checkpoint.manifest import name_of, newest_first, step_of
from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.distributed.process_group import is_main
from vjepa_scale.recipe import Phase
from vjepa_scale.training.setup import Training

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves checkpoints. Every rank creates one and makes the same calls."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._saver = Saver(
            training.stage.checkpoints,
            background=training.stage.recipe.checkpoint.background,
            device=training.engine.device,
        )

    def due(self, phase: Phase, step: int) -> bool:
        """Returns whether one is due after ``step`` steps: every ``checkpoint.every``, and at ends of phases."""
        return step % self._training.stage.recipe.checkpoint.every == 0 or step == phase.end

    def save(self, phase: Phase, step: int) -> None:
        """Starts to write the checkpoint of ``step`` completed steps. The stage's last one is complete on return."""
        training = self._training
        training.log.flush()  # a resume from this checkpoint needs every row before it
        self.collect(wait=True)
        training.log.refuse_if_superseded()
        tensors = training.engine.tensors(training.objective.networks, optimizer=True)
        stage, recipe = training.stage, training.stage.recipe
        manifest = {
            "stage": stage.name,
            "phase": phase.name,
            "first": training.start.first,
            "base": training.start.base,
            "origin": training.origin,
            "drawn": training.order.drawn(step),
            "optimizer_steps": training.engine.optimizer_steps,
            "level": training.guard.state(),
            "rollbacks": len(training.spikes.rollbacks),
            "ends_phase": step == phase.end,
            "fps": recipe.data.fps,
            "frames": phase.frames,
            "size": list(phase.size),
            "attention": training.engine.attention,
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "data": {name: data_set.identity for name, data_set in training.manifests.items()},
            **training.objective.checkpoint_facts(),
        }
        self._saver.save(step, tensors, manifest, are_copies=training.engine.gives_copies)
        if step == training.end:
            self.collect(wait=True)

    def collect(self, *, wait: bool = False) -> None:
        """If a checkpoint has just been completed, records it, and removes the ones that are not kept."""
        if (saved := self._saver.take(wait=wait)) is None:
            return
        step, path = saved
        stage, log = self._training.stage, self._training.log
        try:
            also = kept_by_evaluation(stage) | self._for_a_rollback(step) if is_main() else set()
            store.retain(stage.checkpoints, keep=stage.recipe.checkpoint.keep, also=also)
        except OSError as error:  # of the results: without them the best checkpoint would be removed
            _log.warning("%s: no checkpoint is removed this time: %s", stage.name, error)
        log.event("saved", step=step)
        log.say(f"saved {path}")

    def _for_a_rollback(self, now: int) -> set[str]:
        """Returns the name of the newest good checkpoint, which a rollback would need."""
        cfg = self._training.stage.recipe.guards.spikes
        if cfg.action != "rollback":
            return set()
        saved = {step_of(checkpoint) for checkpoint in newest_first(self._training.stage.checkpoints)}
        good = self._training.spikes.good(saved, now=now, window=cfg.window)
        return set() if good is None else {name_of(good)}
