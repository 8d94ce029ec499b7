"""metrics.jsonl: one row per step, without gaps over restarts. Only the trainer's rank 0 writes it."""

import logging
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import Any

from vjepa_scale.core.files import append_jsonl, open_atomic, row_of

_log = logging.getLogger(__name__)

Measured = Future[dict[str, float]]


class MetricsLog:
    """Writes a row per step, and logs a line every ``console_every`` steps.

    Resuming at ``step`` removes the rows from that step on, which will be trained again. ``repeated`` is their number.
    seen: is called with each row that has measured columns, after it is written
    kept: is called with each row of earlier attempts that stays
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        last_step: int,
        console_every: int,
        seen: Callable[[dict[str, Any]], None] = lambda row: None,
        kept: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self._path, self._last, self._every, self._seen = path, last_step, console_every, seen
        self._held: deque[tuple[dict[str, Any], Measured | None]] = deque()
        self.repeated = 0
        if not path.exists():
            return
        # Line by line: a run of weeks has hundreds of megabytes.
        with open(path, "rb") as lines, open_atomic(path) as file:
            for line in lines:
                if (row := row_of(line)) is None or not isinstance(row.get("step"), int):
                    continue
                if row["step"] >= step:
                    self.repeated += 1
                    continue
                file.write(line)
                kept(row)

    def write(self, row: dict[str, Any], measured: Measured | None = None) -> None:
        """Appends one row, and logs it if it is due.

        measured: further columns; the row, and all later rows, are held until they are there
        """
        self._held.append((row, measured))
        self.flush(wait=False)

    def flush(self, *, wait: bool = True, patience_s: float | None = None) -> None:
        """Appends the held rows; without ``wait``, up to the first whose measured columns are not there yet.

        patience_s: seconds to wait for each row, which then is written without them; None: no limit
        """
        while self._held:
            row, measured = self._held[0]
            if measured is not None and not wait and not measured.done():
                return
            if measured is not None and patience_s is not None:
                with suppress(FutureTimeout):
                    measured.result(patience_s)
                measured = measured if measured.done() else None
            whole = row if measured is None else row | measured.result()
            self._held.popleft()
            self._append(whole)
            if measured is not None:
                self._seen(whole)

    def _append(self, row: dict[str, Any]) -> None:
        append_jsonl(self._path, row)
        step = row["step"]
        if (step + 1) % self._every == 0 or step + 1 == self._last:
            rank = "" if row["effective_rank"] is None else f"  rank {row['effective_rank']:6.1f}"
            loss, norm = (math.nan if row[name] is None else row[name] for name in ("loss", "grad_norm"))
            of_all = f"{step + 1}/{self._last}".ljust(2 * len(str(self._last)) + 1)  # columns stay below each other
            _log.info(
                f"{row['stage']}/{row['phase']}  step {of_all}  loss {loss:.4f}  "
                f"lr {row['lr']:.2e}  grad {norm:6.3f}{rank}  {row['clips_per_s']:.1f} clips/s"
            )


def touch(path: Path) -> None:
    """Creates an empty file if there is none: an empty ledger records that nothing happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o644))
