"""metrics.jsonl: one row per step, without gaps over restarts. Only the trainer's rank 0 writes it."""

import json
import logging
import os
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vjepa_scale.core.files import append_jsonl, read_jsonl, write_atomic

_log = logging.getLogger(__name__)


class MetricsLog:
    """Writes a row per step, and logs a line every ``console_every`` steps.

    Resuming at ``step`` removes the rows from that step on, which will be trained again. ``repeated`` is their number.
    """

    def __init__(self, path: Path, *, step: int, last_step: int, console_every: int) -> None:
        self._path, self._last, self._every = path, last_step, console_every
        self._held: deque[dict[str, Any]] = deque()
        rows = [row for row in read_jsonl(path) if isinstance(row.get("step"), int)]
        kept = [row for row in rows if row["step"] < step]
        self.repeated = len(rows) - len(kept)
        if path.exists():
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, and logs it if it is due.

        A value may be a Future: the row, and all later rows, are held until it has a result.
        """
        self._held.append(row)
        self.flush(wait=False)

    def flush(self, *, wait: bool = True) -> None:
        """Appends the held rows; without ``wait``, up to the first row whose value has no result yet."""
        while self._held:
            futures = [value for value in self._held[0].values() if isinstance(value, Future)]
            if not wait and not all(future.done() for future in futures):
                return
            row = self._held.popleft()
            self._append({key: value.result() if isinstance(value, Future) else value for key, value in row.items()})

    def _append(self, row: dict[str, Any]) -> None:
        append_jsonl(self._path, row)
        step = row["step"]
        if (step + 1) % self._every == 0 or step + 1 == self._last:
            rank = "" if row["effective_rank"] is None else f"  rank {row['effective_rank']:6.1f}"
            of_all = f"{step + 1}/{self._last}".ljust(2 * len(str(self._last)) + 1)  # columns stay below each other
            _log.info(
                f"{row['stage']}/{row['phase']}  step {of_all}  loss {row['loss']:.4f}  "
                f"lr {row['lr']:.2e}  grad {row['grad_norm']:6.3f}{rank}  {row['clips_per_s']:.1f} clips/s"
            )


def touch(path: Path) -> None:
    """Creates an empty file if there is none: an empty ledger records that nothing happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o644))
