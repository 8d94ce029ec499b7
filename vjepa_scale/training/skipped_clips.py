"""The clips of a stage that were replaced, since they do not decode, from the run's ledger (run/ledger.py)."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import append_jsonl
from vjepa_scale.data.substitution import TIME_LIMIT, DecodeFailure, Place
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.schema import FaultsConfig
from vjepa_scale.run.ledger import LEDGER, not_whole, rows_of, spike_of

_NUMBERS = ("step", "slot", "record")
_NAMED = 4  # clips that an error names


class SkippedClips:
    """A stage's replaced clips, from the run's ledger, equal on every rank.

    Creating it is collective: rank 0 reads the file and sends the rows to all.
    """

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.path, self._stage = run_dir / LEDGER, stage
        read = process_group.read_on_rank_0(self._rows)
        self._failures: dict[Place, DecodeFailure] = {}
        self._by_step: defaultdict[int, list[DecodeFailure]] = defaultdict(list)
        self._remember(DecodeFailure(**row) for row in read)

    def _rows(self) -> list[dict[str, Any]]:
        """Returns the failures that still hold, as the fields of DecodeFailure."""
        names = [field.name for field in fields(DecodeFailure)]
        rows: list[dict[str, Any]] = []
        for row in rows_of(self.path, self._stage):
            if row.get("event") == "substituted":
                if not all(name in row for name in names) or not all(isinstance(row[name], int) for name in _NUMBERS):
                    raise not_whole(row, where=self.path)
                rows.append({name: row[name] for name in names})
            elif row.get("event") == "spike" and (to := spike_of(row, where=self.path).to) is not None:
                rows = [earlier for earlier in rows if earlier["step"] < to]  # its slots show other clips now
        return rows

    def known(self) -> dict[Place, tuple[str, str]]:
        """Returns the clips to replace without decoding: place -> (cause, detail)."""
        return {place: (failure.cause, failure.detail) for place, failure in self._failures.items()}

    def replacements(self, step: int) -> dict[int, int]:
        """Returns the clips of a step that were replaced: slot -> the record that was shown."""
        found = {failure.slot: failure.replacement for failure in self._by_step.get(step, ())}
        return {slot: record for slot, record in found.items() if record is not None}

    def forget_from(self, step: int) -> None:
        """Forgets the failures from this step on: after a rollback its slots show other clips."""
        kept = [failure for failure in self._failures.values() if failure.step < step]
        self._failures, self._by_step = {}, defaultdict(list)
        self._remember(kept)

    def new(self, failures: Iterable[DecodeFailure]) -> list[DecodeFailure]:
        """Returns the failures that are not recorded yet."""
        return [failure for failure in failures if failure.place not in self._failures]

    def substituted(self, step: int) -> dict[str, int]:
        """Returns columns of metrics.jsonl: the clips of a step that were replaced, and failures by cause if any."""
        failures = self._by_step.get(step, [])
        causes = Counter(failure.cause for failure in failures)
        of_causes = {f"substituted/{cause}": count for cause, count in causes.items()}
        return {"substituted": len({failure.slot for failure in failures}), **of_causes}

    def counts(self) -> dict[tuple[str, str], int]:
        """Returns the numbers of replaced clips, by data set and cause."""
        return dict(Counter((failure.dataset, failure.cause) for failure in self._failures.values()).most_common())

    def enter(
        self, failures: Iterable[DecodeFailure], *, step: int, global_batch: int, faults: FaultsConfig, write: bool
    ) -> list[DecodeFailure]:
        """Records all ranks' new failures of a step, durably. Returns them sorted by slot.

        write: whether this is rank 0
        Raises UserError if they are too many. Then nothing is written, and the step does not change the weights: with
        the shards restored, the run resumes as if they had never failed.
        """
        new = sorted(failures, key=lambda failure: failure.slot)
        before = [a for a in self._failures.values() if step - faults.window < a.step <= step]
        recent = new + before[::-1]
        allowed = int(faults.max_rate * global_batch * faults.window + 1e-6)  # 0.29 · 100 is 28.999…
        if len(recent) > allowed:
            raise _too_many(recent, allowed, global_batch, faults)
        if write:
            for failure in new:
                append_jsonl(self.path, {"event": "substituted", "stage": self._stage, **asdict(failure)}, durable=True)
        self._remember(new)
        return new

    def _remember(self, failures: Iterable[DecodeFailure]) -> None:
        for failure in failures:
            if failure.place not in self._failures:
                self._by_step[failure.step].append(failure)
            self._failures[failure.place] = failure


def _too_many(newest_first: list[DecodeFailure], allowed: int, global_batch: int, faults: FaultsConfig) -> UserError:
    count, shown = len(newest_first), newest_first[:_NAMED]
    named = "; ".join(map(str, shown)) + (f"; and {count - len(shown)} more" if count > len(shown) else "")
    clips = "1 clip does" if count == 1 else f"{count} clips do"
    slower = " or a longer data.faults.decode_timeout_s" if any(a.cause == TIME_LIMIT for a in newest_first) else ""
    return UserError(
        f"{clips} not decode; of the {global_batch * faults.window} clips of {faults.window} steps, {allowed} may: "
        f"{named}",
        where="data.faults.max_rate",
        fix=f"restore these shards from a copy, or a higher rate{slower}",
    )
