"""Evaluates the checkpoints of a stage that have no result yet, and appends rows to its evaluations.jsonl.

One process at a time evaluates a stage: it holds ``RUN/STAGE/.evaluate.lock``. A killed evaluation has written nothing;
the next one does it again.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from vjepa_scale.checkpoint.evaluations import Row, add_row, in_words, not_evaluated
from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import file_lock
from vjepa_scale.core.installed import command
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.evaluate_section import EvaluateConfig

_log = logging.getLogger(__name__)

LOCK = ".evaluate.lock"


class StageEvaluator:
    """Evaluates checkpoints of one stage, newest first, because the newest one tells most.

    device: as in PyTorch; None: a GPU if there is one
    Clips are decoded, and PyTorch is imported, at the first checkpoint.
    """

    def __init__(self, stage: Stage, config: EvaluateConfig, *, device: str | None) -> None:
        self._stage, self._config, self._device = stage, config, device
        self._evaluate: Callable[[Path], Row] | None = None
        self._failed: set[str] = set()
        self._said: set[str] = set()

    def evaluate_due(self, *, patience_s: float) -> int:
        """Evaluates what is due and has no result, also what is saved meanwhile. Returns the number of failures."""
        return self.evaluate(lambda: not_evaluated(self._stage, self._config, only_due=True), patience_s=patience_s)

    def evaluate(self, choose: Callable[[], Sequence[Path]], *, patience_s: float) -> int:
        """Evaluates the first checkpoint of ``choose()``, then asks again, until it returns none.

        patience_s: seconds to wait for another evaluation of the stage
        A checkpoint that cannot be evaluated is left out, with a warning for each cause. Returns their number. Raises
        UserError where another process evaluates the stage, or where the data cannot be used.
        """
        if not self._next(choose):
            return 0
        with file_lock(self._stage.folder / LOCK, patience_s=patience_s) as held:
            if not held:
                raise UserError("another process evaluates this stage", where=self._stage.folder, fix="wait for it")
            failures = 0
            while checkpoint := self._next(choose):
                failures += not self._evaluated(checkpoint)
            return failures

    def _next(self, choose: Callable[[], Sequence[Path]]) -> Path | None:
        return next((checkpoint for checkpoint in choose() if checkpoint.name not in self._failed), None)

    def _evaluated(self, checkpoint: Path) -> bool:
        if self._evaluate is None:
            self._evaluate = self._set_up()
        try:
            row = self._evaluate(checkpoint)
        except Exception as error:  # noqa: BLE001 (memory, damage, decoding: the next checkpoint may do)
            self._failed.add(checkpoint.name)
            if not checkpoint.exists():
                _log.info(f"{self._stage.name}: {checkpoint.name} was removed before it was evaluated")
                return True
            self._warn(checkpoint, error)
            return False
        add_row(self._stage, row)
        _log.info(f"{self._stage.name}: {checkpoint.name}: {in_words(row)} ({row['seconds']:.0f} s)")
        return True

    def _set_up(self) -> Callable[[Path], Row]:
        from vjepa_scale.inference.evaluation import CheckpointEvaluation
        from vjepa_scale.inference.model import usable_device

        return CheckpointEvaluation(self._stage, self._config, usable_device(self._device)).evaluate

    def _warn(self, checkpoint: Path, error: Exception) -> None:
        if isinstance(error, UserError):
            why = error.what
        else:
            why = f"{type(error).__name__}: {reason_of(error) if isinstance(error, OSError) else error}"
        why = " ".join(why.split())
        if why not in self._said:
            self._said.add(why)
            run = self._stage.recipe.run.dir
            _log.warning(
                f"{self._stage.name}: {checkpoint.name} cannot be evaluated: {why}; later: "
                f"{command('evaluate')} {run} --stage {self._stage.name}"
            )
