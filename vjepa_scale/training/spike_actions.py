"""What is done about a spike (training/spikes.py): the step is skipped, training is rolled back, or the run ends."""

import logging
import math

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.manifest import name_of, newest_first, step_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import append_jsonl
from vjepa_scale.core.log import region
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.optim import TOGETHER
from vjepa_scale.recipe import Phase
from vjepa_scale.run.ledger import Spike
from vjepa_scale.training.checkpointer import Checkpointer
from vjepa_scale.training.setup import Training, load_own, remove_abandoned
from vjepa_scale.training.spikes import GRAD_NORM, LOSS, SpikeError
from vjepa_scale.training.step import StepGradients

_log = logging.getLogger(__name__)

_FIX = (
    "see the clips of these steps in ledger.jsonl; a lower rate from an earlier checkpoint on; or, where the level has "
    "changed for good, a larger guards.spikes.loss_factor or grad_norm_factor (docs/watching.md#spikes)"
)


class SpikeActions:
    """Every rank creates one and makes the same calls with the same values. All methods are collective."""

    def __init__(self, training: Training, checkpoints: Checkpointer) -> None:
        self._training, self._checkpoints = training, checkpoints
        self._cfg = training.stage.recipe.guards.spikes

    def met(self, phase: Phase, step: int, gradients: StepGradients) -> Spike | None:
        """Judges a step before anything moves. Returns a spike that is recorded in the ledger; None: the step is none.

        Raises SpikeError where the run is to end: by ``guards.spikes.action`` or by a bound. A loss or gradient that is
        not finite is no spike with ``stop``: ``apply_gradients`` refuses it.
        """
        training = self._training
        if (known := training.spikes.skipped(step)) is not None:
            training.log.say(f"{training.stage.name}: again, as the ledger says: {known}")
            return known
        training.guard.begin(str((phase.global_batch, phase.size, phase.geometries)))
        values = _judged(gradients)
        if (saw := training.guard.judge(values)) is None:
            return None
        if self._cfg.action == "stop":
            if not all(map(math.isfinite, values.values())):
                return None
            raise SpikeError(f"step {step}: {saw}; nothing moved", where="guards.spikes.action: stop", fix=_FIX)
        rollback, to = self._cfg.action == "rollback", None
        if rollback and not training.spikes.refusal(self._cfg, step, rollback=True):
            to = self._good_checkpoint(step)
            rollback = to is not None
            saw += "" if rollback else "; no good checkpoint to roll back to"
        if refusal := training.spikes.refusal(self._cfg, step, rollback=rollback):
            raise SpikeError(f"step {step}: {saw}; {refusal}; nothing moved", where="guards.spikes", fix=_FIX)
        if to is None:
            spike = Spike(step, "skip", saw)
        else:
            spike = Spike(step, "rollback", saw, to, training.order.behind(to, step + 1))
        self._record(spike, values)
        return spike

    def roll_back(self, spike: Spike) -> int:
        """Restores weights, EMA, optimiser and level of the spike's checkpoint. Returns the step to go on from."""
        training = self._training
        assert spike.to is not None
        remove_abandoned(training.stage.checkpoints, training.spikes)
        training.order.leave_out(spike.to, spike.left_out)
        training.skipped.forget_from(spike.to)
        checkpoint = training.stage.checkpoints / name_of(spike.to)
        manifest = store.read_manifest(checkpoint)
        load_own(checkpoint, manifest, training.engine, training.objective)  # _good_checkpoint has verified it
        training.guard.restore(manifest.get("level", {}))
        training.log.rewind(spike.to)
        return spike.to

    def _good_checkpoint(self, step: int) -> int | None:
        """Returns the step of the newest good checkpoint whose files are whole; None if there is none."""
        with region("save"):  # it may take longer than a step
            self._checkpoints.collect(wait=True)
            return self._whole_checkpoint(step)

    def _whole_checkpoint(self, step: int) -> int | None:
        folder = self._training.stage.checkpoints
        saved = set(process_group.from_rank_0([step_of(checkpoint) for checkpoint in newest_first(folder)]))
        while (found := self._training.spikes.good(saved, now=step, window=self._cfg.window)) is not None:
            try:
                store.verify(folder / name_of(found))
                return found
            except UserError as error:  # equal on all ranks
                _log.warning("%s is not used: %s", folder / name_of(found), error)
                saved.remove(found)
        return None

    def _record(self, spike: Spike, values: dict[str, float]) -> None:
        training = self._training
        training.log.refuse_if_superseded()  # a later start has read the ledger; a new row would change its next resume
        if training.ranks.is_main:
            row = {
                "event": "spike",
                "stage": training.stage.name,
                "step": spike.step,
                "action": spike.action,
                "to": spike.to,
                "saw": spike.saw,
                "left_out": spike.left_out if spike.to is not None else None,
                **{name: value if math.isfinite(value) else None for name, value in values.items()},
                "clips": self._clips(spike.step),
            }
            # No barrier is needed: rank 0 writes before it goes on, and every checkpoint needs rank 0.
            append_jsonl(training.skipped.path, row, durable=True)
            _log.warning("%s: %s", training.stage.name, spike)
        training.log.event("spike", step=spike.step, action=spike.action, to=spike.to, saw=spike.saw)
        training.spikes.add(spike)

    def _clips(self, step: int) -> list[tuple[str, str]]:
        """Returns data set and key of the clip in each slot of the step."""
        training = self._training
        drawn, shown = training.order.batch(step), training.skipped.replacements(step)
        names = [training.order.names[number] for number in drawn.dataset.tolist()]
        records = [shown.get(slot, record) for slot, record in enumerate(drawn.record.tolist())]
        return [(name, training.manifests[name].key(record)) for name, record in zip(names, records, strict=True)]


def _judged(gradients: StepGradients) -> dict[str, float]:
    """Returns the values by which a step is judged.

    Networks with their own settings, as the probes, do not affect each other: one whose gradient is not finite is left
    out alone (``apply_gradients``), and their sums have no level.
    """
    norm = gradients.norms.get(TOGETHER)
    if norm is not None:
        return {LOSS: gradients.loss, GRAD_NORM: norm}
    if math.isfinite(gradients.loss) and any(map(math.isfinite, gradients.norms.values())):
        return {}
    return {LOSS: gradients.loss, GRAD_NORM: math.hypot(*gradients.norms.values())}
