"""The records of an attempt at a stage: events, a row per step, log lines. Every rank calls it; rank 0 writes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import append_jsonl, keep_reserve, write_atomic
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import Phase, Stage, recipe_yaml
from vjepa_scale.run.events import History
from vjepa_scale.run.ledger import LEDGER
from vjepa_scale.run.metrics import Measured, MetricsLog
from vjepa_scale.run.rank_places import node_name
from vjepa_scale.training.collapse_watch import CollapseWatch, Sign
from vjepa_scale.training.start import Start

_log = logging.getLogger(__name__)

_PATIENCE_S = 30.0


class SupersededError(RuntimeError):
    """A later start of the same stage is running; this one must not write anything more."""


class AttemptLog:
    """Records one attempt. Files are written from ``begin`` on; ``say`` only logs."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self._stage, self._ranks = stage, ranks
        self._history = History(stage.folder)
        self._metrics: MetricsLog | None = None  # of rank 0, from ``begin`` on
        self._watch: CollapseWatch | None = None  # likewise
        self._restarts = 0
        self._steps = range(0)  # of the stage, likewise

    def begin(self, start: Start, phases: Sequence[Phase], *, attention: str) -> None:
        """Opens rank 0's history and metrics files, and writes the ``started`` row. attention: the kernel in use"""
        if not self._ranks.is_main:
            return
        stage = self._stage
        keep_reserve(stage.folder)
        stage.evaluation.unlink(missing_ok=True)  # it is of probes that this attempt replaces
        of_run = Path(stage.recipe.run.dir) / "recipe.yaml"
        for path in (stage.folder / "recipe.yaml", *([] if of_run.exists() else [of_run])):  # no launcher wrote it
            write_atomic(path, recipe_yaml(stage.recipe))
        self._steps = range(phases[0].first, phases[-1].end)
        watch, self._metrics = self._open_metrics(start.step)
        self._restarts = sum(row["event"] == "started" for row in self._history.rows())
        self.event(
            "started",
            job_id=self._ranks.job_id,
            host=node_name(),
            world_size=self._ranks.world_size,
            kind=start.kind,
            step=start.step,
            repeated=self._metrics.repeated,
            attention=attention,
        )
        self.say(f"{stage.name}: attention by {attention}")
        for sign in watch.standing():
            self._tell(sign, start.step - 1)

    def _open_metrics(self, step: int) -> tuple[CollapseWatch, MetricsLog]:
        """Returns the metrics of the steps before ``step``, to which rows are appended, and what has watched them."""
        stage, steps = self._stage, self._steps
        watch = self._watch = CollapseWatch(stage.recipe.guards, first=steps.start, steps=len(steps))
        metrics = MetricsLog(
            stage.folder / "metrics.jsonl",
            step=step,
            last_step=steps.stop,
            console_every=stage.recipe.log.every,
            seen=self._judge,
            kept=watch.replay,
        )
        return watch, metrics

    def rewind(self, step: int) -> None:
        """Removes the rows of the steps from ``step`` on, which are trained again."""
        if self._metrics is not None:
            self._metrics.flush()
            _, self._metrics = self._open_metrics(step)

    def event(self, event: str, **values: object) -> None:
        """Appends a row to history.jsonl."""
        if self._ranks.is_main:
            self._history.add(event, job=self._ranks.job, **values)

    def step(self, row: dict[str, Any], measured: Measured | None = None) -> None:
        """Appends a row to metrics.jsonl, and logs a line every ``log.every`` steps. measured: columns for later"""
        if self._metrics is not None:
            self._metrics.write(row | {"restarts": self._restarts}, measured)

    def flush(self) -> None:
        """Waits for the values of held rows, and writes these rows."""
        if self._metrics is not None:
            self._metrics.flush()

    def collapsed(self) -> bool:
        """Returns whether the figures of earlier steps tell of a collapse that the run must stop at.

        Of all earlier steps, so that a run stops at the same step each time. False on ranks other than 0.
        """
        if self._metrics is None or self._stage.recipe.guards.collapse != "stop":
            return False
        self._metrics.flush()
        return bool(self._watch and self._watch.standing())

    def collapse(self) -> UserError:
        """Returns the error to stop with. Collective."""
        signs = process_group.from_rank_0("; ".join(map(str, self._watch.standing())) if self._watch else "")
        return UserError(
            f"{self._stage.name} has collapsed: {signs}",
            where="guards.collapse: stop",
            fix="docs/watching.md#collapse says what each figure means; guards.collapse=warn goes on",
        )

    def _judge(self, row: dict[str, Any]) -> None:
        assert self._watch is not None
        for sign in self._watch.judge(row):
            self._tell(sign, row["step"])

    def _tell(self, sign: Sign, step: int) -> None:
        if self._stage.recipe.guards.collapse == "off":
            return
        self.event("collapse", column=sign.column, value=sign.value, limit=sign.limit, step=step)
        _log.warning("%s: a sign of collapse: %s (docs/watching.md#collapse)", self._stage.name, sign)

    def say(self, text: str) -> None:
        """Logs a line on rank 0."""
        if self._ranks.is_main:
            _log.info(text)

    def stopped_by(self, error: Exception, step: int) -> None:
        """Records that the run stopped itself in this step: writes the held rows and the reason."""
        if self._metrics is not None:
            self._metrics.flush(patience_s=_PATIENCE_S)  # the device may be what has failed
        if self._ranks.is_main:
            row = {
                "event": "stop",
                "stage": self._stage.name,
                "step": step,
                "kind": type(error).__name__,
                "reason": str(error),
                "pid": os.getpid(),
            }
            append_jsonl(Path(self._stage.recipe.run.dir) / LEDGER, row, durable=True)

    def refuse_if_superseded(self) -> None:
        """Raises SupersededError if the stage has been started again: Slurm has given up this node. Collective."""
        started = [row for row in self._history.rows() if row["event"] == "started"] if self._ranks.is_main else []
        job = process_group.from_rank_0(started[-1]["job"] if started else None)
        if job != self._ranks.job:
            raise SupersededError(
                f"{self._stage.name} has been started again, as job {job}: this one, {self._ranks.job}, ends"
            )
