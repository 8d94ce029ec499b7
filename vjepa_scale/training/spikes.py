"""Spikes: steps whose loss or gradient norm is not finite, or far above the level of the steps before them.

``SpikeGuard`` judges the reduced values of a step before the step changes anything, so all ranks decide the same.
``SpikeLog`` has the run's spikes, from the ledger's rows, and what follows from them: which steps a resume skips again,
which clips are left out, which checkpoints are good. Both depend on steps alone. Neither imports PyTorch.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.guard_sections import SpikesConfig
from vjepa_scale.run.ledger import Spike

LOSS, GRAD_NORM = "loss", "grad_norm"
FEWEST = 32  # steps whose median and deviation mean something
COUNTED_STEPS = 1000  # of the bounds
_NAMED = 3  # spikes that an error names
_SIGMA = 1.4826  # of a normal distribution, divided by its MAD


class SpikeError(UserError):
    """The run ends itself at a spike: guards.spikes says so, or there are more than it allows."""


class SpikeGuard:
    """The level of loss and gradient norm in the last steps that were no spikes.

    state: of a checkpoint, from ``state``
    """

    def __init__(self, cfg: SpikesConfig, state: Mapping[str, Any] | None = None) -> None:
        self._factors = {LOSS: cfg.loss_factor, GRAD_NORM: cfg.grad_norm_factor}
        self._deviations, self._fewest = cfg.deviations, min(FEWEST, cfg.window)
        self._logs = {name: deque[float](maxlen=cfg.window) for name in self._factors}
        self._kind = ""
        self.restore(state or {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` has returned; from nothing, if it is empty."""
        self._kind = str(state.get("kind", ""))
        for name, logs in self._logs.items():
            logs.clear()
            logs.extend(state.get(name, ()))

    def state(self) -> dict[str, Any]:
        """Returns the level, as JSON. It is exact: floats are written with all their digits."""
        return {"kind": self._kind, **{name: list(logs) for name, logs in self._logs.items()}}

    def begin(self, kind: str) -> None:
        """The next steps are of this kind. The level is of one kind: another batch or clip size has another one."""
        if kind != self._kind:
            self.restore({"kind": kind})

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Returns in words why these values are a spike; None if they are none, and then they belong to the level.

        values: of LOSS and GRAD_NORM those that have a level. One that is not positive has none, but must be finite
        """
        if lost := [f"{_NAMES[name]} is {value}" for name, value in values.items() if not math.isfinite(value)]:
            return ", ".join(lost)
        found = []
        for name, value in values.items():
            level = self._level(name)
            if level is not None and value > level[1]:
                found.append(f"{_NAMES[name]} is {value:.4g}, above {level[1]:.4g} (median {level[0]:.4g})")
        if not found:
            for name, value in values.items():
                if value > 0:
                    self._logs[name].append(math.log(value))
        return " and ".join(found) or None

    def _level(self, name: str) -> tuple[float, float] | None:
        """Returns the median of a value, and the limit above it; None if there are too few steps to tell."""
        logs = self._logs[name]
        if self._deviations is None or len(logs) < self._fewest:
            return None
        median = statistics.median(logs)
        deviation = _SIGMA * statistics.median(abs(log - median) for log in logs)
        above = max(self._deviations * deviation, math.log(self._factors[name]))
        return math.exp(median), math.exp(min(median + above, 700.0))  # exp(710) is no float


_NAMES = {LOSS: "the loss", GRAD_NORM: "the gradient norm"}


class SpikeLog:
    """All spikes of a stage, in the order in which they were met.

    After a rollback the steps from its checkpoint on are trained again, with other clips: what was skipped there
    before no longer counts.
    """

    def __init__(self, spikes: Iterable[Spike] = ()) -> None:
        self.all: list[Spike] = []
        self._skipped: dict[int, Spike] = {}  # of the steps as they are now
        self._tried: list[Spike] = []  # rollbacks to checkpoints as they are now
        for spike in spikes:
            self.add(spike)

    def add(self, spike: Spike) -> None:
        self.all.append(spike)
        if spike.to is None:
            self._skipped[spike.step] = spike
        else:
            to = spike.to
            self._skipped = {step: skipped for step, skipped in self._skipped.items() if step < to}
            self._tried = [before for before in self._tried if before.to is not None and before.to <= to] + [spike]

    @property
    def rollbacks(self) -> list[Spike]:
        return [spike for spike in self.all if spike.to is not None]

    def skipped(self, step: int) -> Spike | None:
        """Returns the recorded spike of a step that was skipped, which a resume skips again."""
        return self._skipped.get(step)

    def left_out(self) -> list[tuple[int, Mapping[str, int]]]:
        """Returns, for each rollback in order, the step that it went to and the clips that are left out from there."""
        return [(spike.to, spike.left_out) for spike in self.all if spike.to is not None]

    def is_abandoned(self, step: int, rollbacks: int) -> bool:
        """Returns whether a rollback has left a checkpoint behind. rollbacks: of the run when it was saved"""
        return any(step > spike.to for spike in self.rollbacks[rollbacks:] if spike.to is not None)

    def good(self, checkpoints: Collection[int], *, now: int, window: int) -> int | None:
        """Returns the newest of these checkpoints, by steps, that is good at step ``now``; None if none is.

        One that was saved within ``window`` steps after a spike is good only after these steps. One from which the run
        has rolled back is not good for another rollback before they have passed.
        """

        def is_good(step: int) -> bool:
            suspect = [spike.step for spike in self._skipped.values() if spike.step < step]
            suspect += [spike.step for spike in self._tried if spike.to == step]
            return all(now >= spike + window for spike in suspect)

        return max((step for step in checkpoints if step <= now and is_good(step)), default=None)

    def refusal(self, cfg: SpikesConfig, step: int, *, rollback: bool) -> str | None:
        """Returns the bound that one more skip or rollback at ``step`` would break, in words; None: it is allowed."""
        if rollback:
            recent = [spike for spike in self.rollbacks if spike.step > step - COUNTED_STEPS and spike.counts]
            return _bound("rollbacks", recent, cfg.rollbacks, f"rollbacks in {COUNTED_STEPS} steps")
        row: list[Spike] = []
        while (before := self._skipped.get(step - 1 - len(row))) is not None and before.counts:
            row.append(before)
        recent = [spike for spike in self._skipped.values() if spike.step > step - COUNTED_STEPS and spike.counts]
        return _bound("in_a_row", row[::-1], cfg.in_a_row, "steps in a row were skipped") or _bound(
            "per_1000", recent, cfg.per_1000, f"of {COUNTED_STEPS} steps were skipped"
        )


def _bound(key: str, spikes: Sequence[Spike], allowed: int, what: str) -> str | None:
    if len(spikes) < allowed:
        return None
    return f"{len(spikes)} {what} (guards.spikes.{key}: {allowed}): {'; '.join(map(str, spikes[-_NAMED:]))}"
