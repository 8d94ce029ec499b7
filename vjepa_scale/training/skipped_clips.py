"""ledger.jsonl of a run: the decode failures that its results depend on, in addition to recipe, seed and step.

Rows have ``event``:

    substituted  a clip was replaced: stage, and the fields of data/substitution.py's DecodeFailure. Written before the
                 weights of the step change, and replayed on resume: the clip is then replaced without decoding
    stop         the run stopped itself: stage, step, reason, pid. Does not affect results

Only rank 0 writes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import append_jsonl, read_jsonl
from vjepa_scale.data.substitution import TIME_LIMIT, DecodeFailure, Place
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.schema import FaultsConfig

LEDGER = "ledger.jsonl"
_NUMBERS = ("step", "slot", "record")
_NAMED = 4  # clips that an error names


class SkippedClips:
    """A stage's rows of the run's ledger, equal on every rank.

    Creating it is collective: rank 0 reads the file and sends the rows to all.
    """

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.path, self._stage = run_dir / LEDGER, stage
        rows = [row for row in read_jsonl(self.path) if row.get("event") == "substituted" and row.get("stage") == stage]
        names = [field.name for field in fields(DecodeFailure)]
        for row in rows:
            if not all(name in row for name in names) or not all(isinstance(row[name], int) for name in _NUMBERS):
                raise UserError(
                    f"a row of {stage!r} that is not whole: {row}",
                    where=self.path,
                    fix="restore this file from a copy: the results of the run depend on it",
                )
        read = process_group.from_rank_0([{name: row[name] for name in names} for row in rows])
        self._failures: dict[Place, DecodeFailure] = {}
        self._by_step: defaultdict[int, list[DecodeFailure]] = defaultdict(list)
        self._remember(DecodeFailure(**row) for row in read)

    def known(self) -> dict[Place, tuple[str, str]]:
        """Returns the clips to replace without decoding: place -> (cause, detail)."""
        return {place: (failure.cause, failure.detail) for place, failure in self._failures.items()}

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
