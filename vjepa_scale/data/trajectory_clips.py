"""The states that belong to a clip's pictures, and which records are long enough to be clipped at all.

A picture is on screen from its own time until the next one's, and so it is with the log: a step's state holds from
its time until the next step's. So the state beside the picture shown at time t is that of the last step at or before
t, never one of the future and never a mean of two: states and pictures are of the same moment wherever video and log
have one frame per step, and actions between them are of the poses that the camera saw.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.clips import ClipRef
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import StateLog, read_trajectory, step_s

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
