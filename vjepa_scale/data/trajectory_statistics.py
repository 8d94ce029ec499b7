"""How states and actions of a robot data set are spread: mean, standard deviation, least and largest of each number.

They are the numbers as the network sees them, float32 at the clips' rate, and plain statistics of them: of Euler
angles too, though an arm that points down has a roll of about π and -π in turn, which no plain mean tells. Nothing is
normalised by them (method.md 8 does not); they tell one data set from another, and what a checkpoint has seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import STATE, read_trajectory
from vjepa_scale.data.trajectory_clips import states_at

F64 = npt.NDArray[np.float64]

# The 7 numbers: metres, radians, and 0 open to 1 closed.
NUMBERS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_KINDS = ("states", "actions")
_FIELDS = ("mean", "std", "min", "max")


@dataclass(frozen=True)
class Moments:
    """Of some rows of 7 numbers. squares: sums of squared distances from the mean; all [7], float64."""

    count: int
    mean: F64
    squares: F64
    least: F64
    largest: F64

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> "Moments":
        """Of rows [n, 7], n ≥ 0."""
        array = np.asarray(rows, np.float64)
        if not len(array):
            return cls(0, np.zeros(STATE), np.zeros(STATE), np.full(STATE, np.inf), np.full(STATE, -np.inf))
        mean = array.mean(0)
        return cls(len(array), mean, ((array - mean) ** 2).sum(0), array.min(0), array.max(0))

    def joined(self, other: "Moments") -> "Moments":
        """Of the rows of both: Chan, Golub and LeVeque's formula, which never takes a difference of large sums."""
        count = self.count + other.count
        share = other.count / max(1, count)
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + share * apart,
            self.squares + other.squares + self.count * share * apart**2,
            np.minimum(self.least, other.least),
            np.maximum(self.largest, other.largest),
        )

    def told(self) -> dict[str, Any]:
        """As JSON: count, and 7 numbers for each of mean, std (of all rows: over n), min and max; none of no rows."""
        if not self.count:
            return {"count": 0} | {name: [] for name in _FIELDS}
        values = (self.mean, np.sqrt(self.squares / self.count), self.least, self.largest)
        return {"count": self.count} | {name: value.tolist() for name, value in zip(_FIELDS, values, strict=True)}

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Moments":
        """What ``told`` gave."""
        if not told["count"]:
            return cls.of([])
        mean, std, least, largest = (np.array(told[name], np.float64) for name in _FIELDS)
        return cls(told["count"], mean, told["count"] * std**2, least, largest)


def trajectory_statistics(manifest: Manifest, records: Sequence[int] | npt.NDArray[np.int64], fps: float) -> dict:
    """Statistics of some records, whole, at times k/fps from their start; actions are from each time to the next.

    Returns, ready for JSON, ``fps``, ``records`` and for ``states`` and ``actions`` what ``Moments.told`` gives.
    Holds one record at a time. Raises UserError as ``read_trajectory`` does.
    """
    found = {kind: Moments.of([]) for kind in _KINDS}
    for record in records:
        rows = _rows(manifest, int(record), fps)
        found = {kind: found[kind].joined(Moments.of(rows[kind])) for kind in _KINDS}
    return {"fps": fps, "records": len(records)} | {kind: found[kind].told() for kind in _KINDS}


def log_statistics(states_K7: F64) -> dict:
    """``trajectory_statistics`` of one control log, step by step as it was written down: ``fps`` is None."""
    actions = _actions_between(states_K7)
    return {"fps": None, "records": 1, "states": Moments.of(states_K7).told(), "actions": Moments.of(actions).told()}


def merged(parts: Iterable[dict]) -> dict:
    """The statistics of all records of which the parts have a share each; parts of no records are fine."""
    parts = list(parts)
    rates = {part["fps"] for part in parts}
    assert len(rates) == 1, f"parts at {len(rates)} rates: {sorted(rates)}"
    every = {kind: reduce(Moments.joined, (Moments.read(part[kind]) for part in parts)) for kind in _KINDS}
    records = sum(part["records"] for part in parts)
    return {"fps": rates.pop(), "records": records} | {kind: every[kind].told() for kind in _KINDS}


def _rows(manifest: Manifest, record: int, fps: float) -> dict[str, npt.NDArray[np.float32]]:
    """States [K, 7] and actions [K-1, 7] of a record: as many as its video has time for."""
    count = max(1, int(float(manifest.column("duration")[record]) * fps + 1e-6))
    states = states_at(read_trajectory(manifest, record), np.arange(count) / fps).states
    return {"states": states, "actions": _actions_between(states)}


def _actions_between(states_K7: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The training's own arithmetic, [K-1, 7]: PyTorch's, which the making of other shards does without."""
    import torch

    from vjepa_scale.data.poses import actions_between

    return actions_between(torch.from_numpy(states_K7)).numpy()
