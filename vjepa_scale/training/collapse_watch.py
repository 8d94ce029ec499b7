"""Judges the figures of a collapse: beyond its limit for some measurements in a row, a figure is a sign of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vjepa_scale.recipe.guard_sections import LIMITS, GuardsConfig


@dataclass(frozen=True)
class Sign:
    """A column that has gone beyond its limit. since: the step of the first of these measurements"""

    column: str
    value: float
    limit: float
    since: int

    def __str__(self) -> str:
        side = "above" if LIMITS[self.column].above else "below"
        return f"{self.column} is {self.value:.3g}, {side} {self.limit:g} since step {self.since}"


class CollapseWatch:
    """Counts measurements beyond limits. Rank 0 has the figures, so it alone judges.

    first, steps: the first global step of the stage, and its number of steps
    """

    def __init__(self, guards: GuardsConfig, *, first: int, steps: int) -> None:
        self._patience, self._first, self._steps = guards.patience, first, steps
        limits = {column: limit.value for column, limit in LIMITS.items()} | guards.limits
        self._limits = {column: limit for column, limit in limits.items() if limit is not None}
        # Step and value of the measurements in a row, by column.
        self._beyond: dict[str, list[tuple[int, float]]] = {column: [] for column in self._limits}

    def judge(self, row: Mapping[str, Any]) -> list[Sign]:
        """Returns the signs that the figures of one measured row complete. A sign is returned once in a row."""
        found = []
        for column, limit in self._limits.items():
            value = row.get(column)
            if value is None or not LIMITS[column].holds(row["step"] - self._first, self._steps):
                continue
            beyond = self._beyond[column]
            if not LIMITS[column].is_passed(value, limit):
                beyond.clear()
                continue
            beyond.append((row["step"], value))
            del beyond[self._patience + 1 : -1]  # the first ones and the last
            if len(beyond) == self._patience:
                found.append(self._sign(column))
        return found

    def replay(self, row: Mapping[str, Any]) -> None:
        """Judges a row of an earlier attempt, if its step was measured."""
        if "update_ratio" in row:
            self.judge(row)

    def standing(self) -> list[Sign]:
        """Returns the signs that the last measurements have not taken back."""
        return [self._sign(column) for column, beyond in self._beyond.items() if len(beyond) >= self._patience]

    def _sign(self, column: str) -> Sign:
        (since, _), (_, value) = self._beyond[column][0], self._beyond[column][-1]
        return Sign(column, value, self._limits[column], since)
