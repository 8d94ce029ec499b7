"""Reads the files of one stage: its history, metrics, checkpoints, and the reports of its ranks."""

import time
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.evaluations import in_words, results_of
from vjepa_scale.checkpoint.manifest import MANIFEST, newest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import row_of
from vjepa_scale.monitor.states import BestCheckpoint, LastError, StageStatus
from vjepa_scale.recipe import Stage
from vjepa_scale.run.events import Attempt, History, Row, attempts, device_in_words
from vjepa_scale.run.failures import worst_failure
from vjepa_scale.run.ledger import LEDGER, read_spikes

# As many of the last steps say how fast it goes; their rows fit in the last TAIL_BYTES of metrics.jsonl.
RECENT_STEPS = 50
TAIL_BYTES = 64 * 1024


class StageFiles:
    """A stage's files, read once.

    rows:      of its history since its last launch; all if there was none
    submitted: the first of them, if it was launched
    attempts:  in these rows
    cancelled: the row, if this launch was cancelled
    report:    a rank's report of an attempt whose end is in no row
    status:    with the values that are read directly from the files
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.folder, self.now = stage, stage.folder, time.time()
        history = History(self.folder)
        self.rows = history.since_submission()
        self._all_rows = history.rows()
        self.submitted: Row | None = next((row for row in self.rows if row["event"] == "submitted"), None)
        self.cancelled: Row | None = next((row for row in self.rows if row["event"] == "cancelled"), None)
        self.attempts = attempts(self.rows)
        self.report = self._report()
        self.status = StageStatus(stage.name)
        self._read_launch()
        self._read_checkpoint()
        self._read_steps()
        self.status.signs = self._signs()
        self.status.stragglers = self._stragglers()
        self.status.spikes = self._spikes()
        self.status.error = self._error()

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def finished(self) -> bool:
        """Is its last checkpoint there, and of a probe stage its result?"""
        last = self.status.last_step
        if last is None or self.status.checkpoint_step != last:
            return False
        return self.stage.is_complete(last)

    @property
    def ended_by_error(self) -> bool:
        """Was its last error the end of its last attempt?"""
        failed = [row for row in self._all_rows if row["event"] == "failed"]
        return self.report is not None or bool(failed and self.last is not None and self.last.end == failed[-1])

    def _read_launch(self) -> None:
        status = self.status
        if self.submitted is not None:
            launch = self.submitted.get("launch")
            status.cluster, status.submitted = self.submitted["cluster"], self.submitted["time"]
            status.launch = None if launch is None else Path(str(launch)).name
        # Slurm's job keeps its id; locally every attempt has one of its own.
        having = [row for row in self.rows if row["event"] in ("submitted", "started", "requeued") and "job_id" in row]
        if having:
            status.job_id = str(having[0 if status.cluster == "slurm" else -1]["job_id"])
            log = self.stage.logs / f"{status.job_id}_0_log.out"
            status.log = str(log) if log.exists() else None

    def _read_checkpoint(self) -> None:
        status = self.status
        found = newest(self.stage.checkpoints)
        if found is not None:
            checkpoint, manifest = found
            status.checkpoint, status.checkpoint_step = checkpoint.name, manifest["step"]
            status.checkpoint_age_s = max(0.0, self.now - _changed(checkpoint / MANIFEST))
            status.first = manifest["first"]
        else:
            begun = [row["step"] for row in self._all_rows if row["event"] == "started" and row["kind"] != "resume"]
            status.first = begun[-1] if begun else self._planned_first()
        if status.first is not None:
            status.last_step = self.stage.phases_from(status.first)[-1].end
        status.best = self._best()

    def _best(self) -> BestCheckpoint | None:
        results = results_of(self.stage)
        if (best := results.best) is None:
            return None
        values = {key: best.get(key) for key in ("knn", "linear", "effective_rank", "held_out_loss")}
        return BestCheckpoint(best["checkpoint"], best["step"], in_words(best), len(results.rows), **values)

    def _planned_first(self) -> int | None:
        before = self.stage.config.continue_from
        if before is None:
            return 0
        if before not in self.stage.earlier:
            return None  # of a checkpoint elsewhere: known when the stage has begun
        return StageFiles(self.stage.earlier[before]).status.last_step

    def _signs(self) -> list[str]:
        """The signs of a collapse since the last start: an earlier attempt's may have been of steps trained again."""
        rows = self.rows
        begun = max((index for index, row in enumerate(rows) if row["event"] == "started"), default=0)
        return [
            f"{row['column']} {row['value']:.3g} (limit {row['limit']:g}) at step {row['step']}"
            for row in rows[begun:]
            if row["event"] == "collapse"
        ]

    def _spikes(self) -> str | None:
        """The stage's spikes in words; None without any."""
        try:
            spikes = read_spikes(self.folder.parent / LEDGER, self.stage.name)
        except UserError:  # a resume names the row
            return None
        back = sum(spike.to is not None for spike in spikes)
        return f"{len(spikes)} ({back} rolled back), the last: {spikes[-1]}" if spikes else None

    def _stragglers(self) -> list[str]:
        """The ranks that hold up the others, since the last start: the last row about each of their problems."""
        begun = max((index for index, row in enumerate(self.rows) if row["event"] == "started"), default=0)
        last = {(row["rank"], row["problem"]): row for row in self.rows[begun:] if row["event"] == "device"}
        return [device_in_words(row) for row in last.values() if not row["over"]]

    def _read_steps(self) -> None:
        """Step, loss and pace, from the end of metrics.jsonl."""
        status, path = self.status, self.folder / "metrics.jsonl"
        rows = _last_rows(path)[-RECENT_STEPS:]
        started = self.last.started if self.last is not None else None
        if started is not None:
            written = _changed(path) if rows else 0.0
            status.idle_s = max(0.0, self.now - max(written, started["time"]))
            status.no_step_yet = written <= started["time"]
        if not rows:
            status.step = status.checkpoint_step
            return
        last = rows[-1]
        status.step, status.loss = last["step"] + 1, last["loss"]
        # One geometry only; and not an attempt's first step, which waits for the loader, if there is another.
        same = [row for row in rows if row["phase"] == last["phase"] and row["clips_per_s"] > 0]
        later = [row for row in same if started is None or row["step"] != started["step"]] or same
        batch = {phase.name: phase.global_batch for phase in self.stage.phases}.get(last["phase"])
        if later and batch:
            status.step_s = sum(batch / row["clips_per_s"] for row in later) / len(later)
            status.clips_per_s = batch / status.step_s

    # -- errors ----------------------------------------------------------------------------------------

    def _error(self) -> LastError | None:
        """The last ``failed`` row; or, where an attempt ended before it was written, a rank's own report."""
        if self.report is not None:
            return self.report
        failed = [row for row in self._all_rows if row["event"] == "failed"]
        return self._error_of(failed[-1], failed[-1]["time"]) if failed else None

    def _report(self) -> LastError | None:
        if self.last is None:
            if self.submitted is None:
                return None
            # It failed before training: the rest of the name is not known.
            job = str(self.submitted["job_id"]) + (".*" if self.submitted["cluster"] == "slurm" else "")
        elif is_over(self.last) or self.last.started is None:
            return None
        else:
            job = self.last.started["job"]
        try:
            failure = worst_failure(self.stage.failures, job)
        except UserError:  # a report that cannot be read says nothing
            return None
        if failure is None or (self.submitted and _changed(Path(failure["report"])) < self.submitted["time"]):
            return None
        return self._error_of(failure, _changed(Path(failure["report"])))

    def _error_of(self, row: dict[str, Any], when: float) -> LastError:
        """A ``failed`` row or a rank's report."""
        return LastError(
            kind=row["kind"],
            message=row["message"],
            rank=row["rank"],
            step=row["step"],
            log=self._here(row["log"], self.stage.logs),
            report=self._here(row["report"], self.stage.failures),
            time=when,
            user_error=row["user_error"],
        )

    def _here(self, recorded: str | None, folder: Path) -> str | None:
        """The present path of a recorded one: the run may have been moved."""
        if recorded is None:
            return None
        here = folder / Path(recorded).name
        return str(here if here.exists() or not Path(recorded).exists() else recorded)


def is_over(attempt: Attempt) -> bool:
    """Does the history have its end? It may run for a moment after ``cancelled``."""
    return attempt.end is not None or any(row["event"] != "cancelled" for row in attempt.later)


def _changed(path: Path) -> float:
    """When a file was last written; 0 if it has just been removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of a JSON-lines file, which may have one for each of a million steps."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        content = file.read()
    whole = content if size <= TAIL_BYTES else content.partition(b"\n")[2]
    rows = (row_of(line) for line in whole.splitlines(keepends=True))
    return [row for row in rows if row is not None and _is_of_a_step(row)]


def _is_of_a_step(row: dict[str, Any]) -> bool:
    """Does it have the values that are read here? Other lines are left out, like incomplete ones."""
    kinds: dict[str, Any] = {"step": int, "phase": str, "loss": (int, float, type(None)), "clips_per_s": (int, float)}
    return all(key in row and isinstance(row[key], kind) for key, kind in kinds.items())
