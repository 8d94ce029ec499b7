"""What a robot did while it was filmed: the members beside a record's video.

    KEY.states.npy      float64 [K, 7]   end effector's position (m) and orientation (extrinsic xyz Euler angles, rad),
                                         both in the frame of the robot's base; gripper, 0 open to 1 closed
    KEY.times.npy       float64 [K]      when each state was, in seconds from the first
    KEY.extrinsics.npy  float64 [K, 6]   the camera's position (m) and orientation (as above), in the frame of the base;
                                         not every record has it

method.md 8. The states are on the control log's clock, the pictures on the video's: second 0 is the same for both.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
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
        fix = "make shards with tools/make_shards.py DROID OUT --trajectories droid"
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
