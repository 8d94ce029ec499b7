"""What a robot did while it was filmed: the members beside a record's video; its states in a clip; their statistics.

    KEY.states.npy      float64 [K, 7]   end effector's position (m) and orientation (extrinsic xyz Euler angles, rad),
                                         both in the frame of the robot's base; gripper, 0 open to 1 closed
    KEY.times.npy       float64 [K]      when each state was, in seconds from the first
    KEY.extrinsics.npy  float64 [K, 6]   the camera's position (m) and orientation (as above), in the frame of the base;
                                         not every record has it

method.md 8. The states are on the control log's clock, the pictures on the video's: second 0 is the same for both.

A picture is on screen from its own time until the next one's, and so it is with the log: a step's state holds from
its time until the next step's. So the state beside the picture shown at time t is that of the last step at or before
t, never one of the future and never a mean of two: states and pictures are of the same moment wherever video and log
have one frame per step, and actions between them are of the poses that the camera saw.
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
    """The log, if its arrays are of one length and finite and its times rise from 0. Raises DecodeError."""
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
    """The usual time from one step to the next, in seconds (pauses do not count)."""
    return float(np.median(np.diff(times_s)))


def check_clocks(duration_s: float, times_s: Floats) -> None:
    """Refuse a video that does not end with its log, to one step: no one knows how long the last step was.

    duration_s: of the video. Raises DecodeError.
    """
    lasts = float(times_s[-1]) + step_s(times_s)
    if abs(duration_s - lasts) > step_s(times_s) + 1e-6:
        raise DecodeError(
            "clocks disagree", f"the video lasts {duration_s:.3f} s, the log {lasts:.3f} s ({len(times_s)} steps)"
        )


def read_trajectory(manifest: Manifest, record: int) -> StateLog:
    """The states beside a record's video. Raises UserError where they are not sound, or not on the video's clock."""
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
    """A .npy member; never a pickle. Raises DecodeError."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise DecodeError("unreadable array", f"{name}: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray):  # an .npz
        raise DecodeError("unreadable array", f"{name}: not one array")
    return array


# -- the states of a clip --------------------------------------------------------------------------

F32 = npt.NDArray[np.float32]

# Times are sums of floats: one this close before a step counts as that step. Shards are made with the same.
_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class TrajectoryClip:
    """What a robot was at the K pictures of a clip.

    states: [K, 7], extrinsics: [K, 6] or None, as data/trajectories.py has them; steps: [K], their numbers in the log
    """

    states: F32
    extrinsics: F32 | None
    steps: npt.NDArray[np.int64]


def states_at(log: StateLog, times_s: npt.ArrayLike) -> TrajectoryClip:
    """The states at times of a clip, in seconds into the video, which are the log's.

    The clip has to lie inside its video (``long_enough``): no time may be past the end of the log's last step, or of
    the one more step by which ``check_clocks`` lets a video outlast it.
    """
    times = np.asarray(times_s, np.float64)
    end_s = float(log.times_s[-1]) + 2 * step_s(log.times_s)
    inside = times.min() > -_TOLERANCE_S and times.max() < end_s + _TOLERANCE_S
    assert inside, f"a clip from {times.min():.3f} s to {times.max():.3f} s in a log of {end_s:.3f} s"
    steps = np.searchsorted(log.times_s, times + _TOLERANCE_S, side="right") - 1
    extrinsics = None if log.extrinsics is None else log.extrinsics[steps].astype(np.float32)
    return TrajectoryClip(log.states[steps].astype(np.float32), extrinsics, steps)


def trajectory_clip(manifest: Manifest, ref: ClipRef) -> TrajectoryClip:
    """The states beside the pictures of a clip of a record. Raises UserError as ``read_trajectory`` does."""
    return states_at(read_trajectory(manifest, ref.record), ref.times_s)


def long_enough(manifest: Manifest, *, frames: int, fps: float) -> npt.NDArray[np.int64]:
    """Numbers of the records whose video lasts for a window of frames/fps seconds, ascending.

    Others would repeat their last picture while the log stands still. Raises UserError where no record is left.
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


# -- statistics: how states and actions of a data set are spread -----------------------------------
#
# Of the numbers as the network sees them, float32 at the clips' rate, and plain: of Euler angles too, though an arm
# that points down has a roll of about π and -π in turn, which no plain mean tells. Nothing is normalised by them
# (method.md 8 does not); they tell one data set from another, and what a checkpoint has seen.

# The 7 numbers: metres, radians, and 0 open to 1 closed.
NUMBERS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_KINDS = ("states", "actions")
_FIELDS = ("mean", "std", "min", "max")


@dataclass(frozen=True)
class Moments:
    """Of some rows of 7 numbers. squares: sums of squared distances from the mean; all [7], float64."""

    count: int
    mean: Floats
    squares: Floats
    least: Floats
    largest: Floats

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


def log_statistics(states_K7: Floats) -> dict:
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
