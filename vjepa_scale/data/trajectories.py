"""A robot's control log, stored with a record's video: its members, its states in a clip, and statistics.

    KEY.states.npy      float64 [K, 7]   end effector's position (m) and orientation (extrinsic xyz Euler angles, rad),
                                         both in the frame of the robot's base; gripper, 0 open to 1 closed
    KEY.times.npy       float64 [K]      time of each state, in seconds from the first
    KEY.extrinsics.npy  float64 [K, 6]   the camera's position (m) and orientation (as above), in the frame of the base;
                                         some records have none

method.md 8. States have the control log's clock, pictures the video's; second 0 is the same for both.

A picture is on screen from its own time until the next picture's. Likewise, a step's state holds from its time until
the next step's. So the state of the picture at time t is that of the last step at or before t, never a future state
and never a mean of two. Where video and log have one frame per step, state and picture are of the same moment, and
actions are between the poses that the camera saw.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import as_called
from vjepa_scale.core.log import tell
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.video.container import DecodeError

STATE, EXTRINSICS = 7, 6  # numbers per step
MEMBERS = ("states", "times", "extrinsics")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StateLog:
    """States of K steps. states: [K, 7]; times_s: [K], rising from 0; extrinsics: [K, 6], or None."""

    states: Floats
    times_s: Floats
    extrinsics: Floats | None = None


def check_log(log: StateLog) -> StateLog:
    """Returns the log. Raises DecodeError where lengths differ, a value is not finite, or times do not rise from 0."""
    steps = len(log.times_s) if log.times_s.ndim else 0
    arrays = {"states": (log.states, (steps, STATE)), "times": (log.times_s, (steps,))}
    if log.extrinsics is not None:
        arrays["extrinsics"] = (log.extrinsics, (steps, EXTRINSICS))
    for name, (array, shape) in arrays.items():
        if array.shape != shape or array.dtype != np.float64:
            expected = f"float64 {list(shape)}"
            raise DecodeError("shapes disagree", f"{name}: {array.dtype} {list(array.shape)}, not {expected}")
    if steps < 2:
        raise DecodeError("too few steps", f"{steps}")
    for name, (array, _) in arrays.items():
        if not np.isfinite(array).all():
            step = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DecodeError(f"non-finite {name}", f"at step {step} of {steps}")
    falling = np.flatnonzero(np.diff(log.times_s) <= 0)
    if falling.size or log.times_s[0] != 0:
        step = int(falling[0]) + 1 if falling.size else 0
        raise DecodeError("the log's times do not rise", f"at step {step} of {steps}")
    return log


def step_s(times_s: Floats) -> float:
    """Returns the median time from one step to the next, in seconds, so pauses do not count."""
    return float(np.median(np.diff(times_s)))


def check_clocks(duration_s: float, times_s: Floats) -> None:
    """Raises DecodeError where video and log differ in length by more than one step.

    One step is allowed because the duration of the last step is unknown. duration_s: of the video
    """
    lasts = float(times_s[-1]) + step_s(times_s)
    if abs(duration_s - lasts) > step_s(times_s) + 1e-6:
        raise DecodeError(
            "clocks disagree", f"the video lasts {duration_s:.3f} s, the log {lasts:.3f} s ({len(times_s)} steps)"
        )


def read_trajectory(manifest: Manifest, record: int) -> StateLog:
    """Reads the states of a record. Raises UserError where they are invalid, or do not match the video's duration."""
    where = f"{manifest.folder / manifest.shard_of(record).name}: record {manifest.key(record)}"
    if "states.offset" not in manifest.described:
        fix = as_called("make shards with tools/make_shards.py DROID OUT --trajectories droid")
        raise UserError("these shards have no trajectories", where=manifest.folder, fix=fix)
    try:
        found = {name: _array(name, manifest.read(record, name)) for name in MEMBERS if manifest.has(record, name)}
        if missing := {"states", "times"} - set(found):
            raise DecodeError("no trajectory", f"no {' and no '.join(sorted(missing))}")
        log = check_log(StateLog(found["states"], found["times"], found.get("extrinsics")))
        check_clocks(float(manifest.column("duration")[record]), log.times_s)
    except DecodeError as error:
        raise UserError(str(error), where=where, fix="make the shards again") from None
    return log


def _array(name: str, data: bytes) -> npt.NDArray[np.float64]:
    """Reads a .npy member; refuses pickles. Raises DecodeError."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise DecodeError("unreadable array", f"{name}: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray):  # an .npz
        raise DecodeError("unreadable array", f"{name}: not one array")
    return array


# -- the states of a clip --------------------------------------------------------------------------

F32 = npt.NDArray[np.float32]

# Times are sums of floats: a time this close before a step counts as that step. Making shards uses the same value.
_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class TrajectoryClip:
    """A robot's states at the K pictures of a clip.

    states: [K, 7], extrinsics: [K, 6] or None, as in StateLog; steps: [K], their indices in the log
    """

    states: F32
    extrinsics: F32 | None
    steps: npt.NDArray[np.int64]


def states_at(log: StateLog, times_s: npt.ArrayLike) -> TrajectoryClip:
    """Returns the states at the times of a clip, in seconds; video and log share second 0.

    The clip must be inside its video (``long_enough``): no time may be past the end of the log's last step, plus the
    one step by which ``check_clocks`` allows a video to be longer.
    """
    times = np.asarray(times_s, np.float64)
    end_s = float(log.times_s[-1]) + 2 * step_s(log.times_s)
    inside = times.min() > -_TOLERANCE_S and times.max() < end_s + _TOLERANCE_S
    assert inside, f"a clip from {times.min():.3f} s to {times.max():.3f} s in a log of {end_s:.3f} s"
    steps = np.searchsorted(log.times_s, times + _TOLERANCE_S, side="right") - 1
    extrinsics = None if log.extrinsics is None else log.extrinsics[steps].astype(np.float32)
    return TrajectoryClip(log.states[steps].astype(np.float32), extrinsics, steps)


def trajectory_clip(manifest: Manifest, ref: ClipRef) -> TrajectoryClip:
    """Returns the states at the pictures of a clip. Raises UserError as ``read_trajectory`` does."""
    return states_at(read_trajectory(manifest, ref.record), ref.times_s)


def long_enough(manifest: Manifest, *, frames: int, fps: float) -> npt.NDArray[np.int64]:
    """Returns the indices of the records whose video has at least frames/fps seconds, ascending.

    A shorter video would repeat its last picture without states for it. Raises UserError where no record is left.
    """
    durations = manifest.column("duration")
    found = np.flatnonzero(durations >= frames / fps - _TOLERANCE_S)
    if not found.size:
        longest = float(durations.max())
        raise UserError(
            f"no record lasts for a clip of {frames} frames at {fps:g} a second, {frames / fps:.3f} s: "
            f"the longest lasts {longest:.3f} s",
            where=manifest.folder,
            fix=f"ask for a clip of {longest:.3f} s at most: fewer frames, or more a second",
        )
    return found.astype(np.int64)


# -- statistics of the states and actions of a data set --------------------------------------------
#
# Computed from the network's inputs: float32, at the clips' rate. Euler angles are treated as plain numbers, though the
# roll of an arm that points down alternates between π and -π, so that its mean says little. Nothing is normalised by
# these statistics (method.md 8); they identify a data set, and the data that a checkpoint was trained on.

# The 7 numbers of a state: metres, radians, and the gripper, 0 open to 1 closed.
NUMBERS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_KINDS = ("states", "actions")
_FIELDS = ("mean", "std", "min", "max")


@dataclass(frozen=True)
class Moments:
    """Moments of rows of 7 numbers. squares: sums of squared distances from the mean; all [7], float64."""

    count: int
    mean: Floats
    squares: Floats
    least: Floats
    largest: Floats

    @classmethod
    def of(cls, rows: npt.ArrayLike) -> "Moments":
        """Returns the moments of rows [n, 7], n ≥ 0."""
        array = np.asarray(rows, np.float64)
        if not len(array):
            return cls(0, np.zeros(STATE), np.zeros(STATE), np.full(STATE, np.inf), np.full(STATE, -np.inf))
        mean = array.mean(0)
        return cls(len(array), mean, ((array - mean) ** 2).sum(0), array.min(0), array.max(0))

    def joined(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of rows, by Chan, Golub and LeVeque's formula, which avoids cancellation."""
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

    def as_json(self) -> dict[str, Any]:
        """Returns JSON: count, and lists of 7 for mean, std (over n), min and max; the lists are empty for no rows."""
        if not self.count:
            return {"count": 0} | {name: [] for name in _FIELDS}
        values = (self.mean, np.sqrt(self.squares / self.count), self.least, self.largest)
        return {"count": self.count} | {name: value.tolist() for name, value in zip(_FIELDS, values, strict=True)}

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Moments":
        """Returns the moments that ``as_json`` wrote."""
        if not content["count"]:
            return cls.of([])
        mean, std, least, largest = (np.array(content[name], np.float64) for name in _FIELDS)
        return cls(content["count"], mean, content["count"] * std**2, least, largest)


def trajectory_statistics(manifest: Manifest, records: Sequence[int] | npt.NDArray[np.int64], fps: float) -> dict:
    """Returns statistics of whole records, at times k/fps from their start; actions are from each time to the next.

    The result is JSON: ``fps``, ``records``, and ``Moments.as_json`` for ``states`` and ``actions``.
    Holds one record in memory at a time; each begins the time limit of set-up anew. Raises UserError as
    ``read_trajectory`` does.
    """
    found = {kind: Moments.of([]) for kind in _KINDS}
    for record in records:
        tell("setup")
        rows = _rows(manifest, int(record), fps)
        found = {kind: found[kind].joined(Moments.of(rows[kind])) for kind in _KINDS}
    return {"fps": fps, "records": len(records)} | {kind: found[kind].as_json() for kind in _KINDS}


def log_statistics(states_K7: Floats) -> dict:
    """Returns ``trajectory_statistics`` of one control log at the log's own steps; ``fps`` is None."""
    actions = _actions_between(states_K7)
    moments = {"states": Moments.of(states_K7), "actions": Moments.of(actions)}
    return {"fps": None, "records": 1} | {kind: found.as_json() for kind, found in moments.items()}


def merged(parts: Iterable[dict]) -> dict:
    """Merges statistics of disjoint parts of the records; a part may have no records."""
    parts = list(parts)
    rates = {part["fps"] for part in parts}
    assert len(rates) == 1, f"parts at {len(rates)} rates: {sorted(rates)}"
    every = {kind: reduce(Moments.joined, (Moments.read(part[kind]) for part in parts)) for kind in _KINDS}
    records = sum(part["records"] for part in parts)
    return {"fps": rates.pop(), "records": records} | {kind: every[kind].as_json() for kind in _KINDS}


def _rows(manifest: Manifest, record: int, fps: float) -> dict[str, npt.NDArray[np.float32]]:
    """Returns states [K, 7] and actions [K-1, 7] of a record, for the whole length of its video."""
    count = max(1, int(float(manifest.column("duration")[record]) * fps + 1e-6))
    states = states_at(read_trajectory(manifest, record), np.arange(count) / fps).states
    return {"states": states, "actions": _actions_between(states)}


def _actions_between(states_K7: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns actions [K-1, 7] by training's code. Imports PyTorch here: making other shards does not need it."""
    import torch

    from vjepa_scale.data.poses import actions_between

    return actions_between(torch.from_numpy(states_K7)).numpy()
