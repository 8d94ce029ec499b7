"""Reads DROID's layout on disk, one folder per trajectory, as its authors describe it:

    metadata_<uuid>.json          `<view>_mp4_path` of each view (wrist, ext1, ext2, left, right), and much else
    trajectory.h5                 observation/robot_state/{cartesian_position [K, 6], gripper_position [K]}
                                  observation/camera_extrinsics/<serial>_left [K, 6]
                                  observation/timestamp/… [K]
    recordings/MP4/<serial>.mp4   about one frame per step, at the camera's nominal rate

Both files are untrusted (see data.md). Only the last name of a path in the metadata is used, and only plain arrays
inside the HDF5 file are read: a link in it could lead to any file of this machine.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.files import parse_json
from vjepa_scale.data.trajectories import EXTRINSICS, STATE, StateLog, check_log
from vjepa_scale.video.container import DecodeError

if TYPE_CHECKING:
    import h5py

METADATA, LOG, VIDEOS = "metadata_*.json", "trajectory.h5", "recordings/MP4"
NOMINAL_HZ = 15.0
_MAX_STEPS = 10**6  # 18 hours; a larger count is damage, and would fill the memory
_MP4_PATH = "_mp4_path"
_KEPT = ("uuid", "lab", "success", "current_task")
# Sources of a log's times, best first: datasets to sum, and the seconds per unit. The first two have the clock of the
# computer that also timed the cameras, the last has the robot's.
_CLOCKS = (
    (("observation/timestamp/robot_state/read_start", 1e-3),),
    (("observation/timestamp/control/step_start", 1e-3),),
    (
        ("observation/timestamp/robot_state/robot_timestamp_seconds", 1.0),
        ("observation/timestamp/robot_state/robot_timestamp_nanos", 1e-9),
    ),
)


@dataclass(frozen=True)
class View:
    """A camera's recording. video: the file's name in recordings/MP4; known: metadata that records keep."""

    video: str
    serial: str
    known: dict[str, Any]


def read_view(folder: Path, view: str) -> View:
    """Reads the metadata of a trajectory for one view. Raises DecodeError, and OSError."""
    found = sorted(folder.glob(METADATA))
    if len(found) != 1 or not found[0].is_file():
        names = ", ".join(path.name for path in found)
        raise DecodeError("no metadata", f"there are {names}" if names else f"no {METADATA}")
    try:
        known = parse_json(found[0].read_bytes())
    except ValueError as error:
        raise DecodeError("no metadata", f"{found[0].name} is not JSON: {error}") from None
    if not isinstance(known, dict):
        raise DecodeError("no metadata", f"{found[0].name} is no JSON object")
    paths = {key.removesuffix(_MP4_PATH): value for key, value in known.items() if key.endswith(_MP4_PATH)}
    views = sorted(name for name, value in paths.items() if isinstance(value, str) and value)
    if view not in views:
        raise DecodeError("no such view", f"{view}; there are {', '.join(views) or 'none'}")
    name = PurePosixPath(paths[view]).name
    if name in ("", "..") or "\0" in name:
        raise DecodeError("no such view", f"{view}: {paths[view]!r} is no path of a video")
    return View(name, name.partition(".")[0], {key: known[key] for key in _KEPT if key in known})


def read_log(folder: Path, serial: str) -> tuple[StateLog, str]:
    """Reads states, times and extrinsics of a camera, and the name of the clock. Raises DecodeError, and OSError."""
    import h5py  # needed for robot data only

    path = folder / LOG
    if not path.is_file():  # reading a pipe would block
        raise DecodeError("no trajectory.h5", "not a file" if path.exists() else "")
    path.open("rb").close()  # raises OSError here, so that it is not mistaken for damage
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _read_log(file, serial)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise DecodeError("unreadable HDF5", " ".join(str(error).split())) from None


def _read_log(file: "h5py.File", serial: str) -> tuple[StateLog, str]:
    position = _required(file, "observation/robot_state/cartesian_position", STATE - 1)
    gripper = _required(file, "observation/robot_state/gripper_position", 1)
    extrinsics = _array(file, f"observation/camera_extrinsics/{serial}_left", EXTRINSICS)
    steps = {"cartesian_position": len(position), "gripper_position": len(gripper)}
    times, clock = np.arange(len(position)) / NOMINAL_HZ, f"nominal {NOMINAL_HZ:g} Hz"
    for parts in _CLOCKS:
        counts = [(_array(file, name, 1), unit) for name, unit in parts]
        if all(count is not None for count, _ in counts):
            times = sum(((count - count[:1]) * unit for count, unit in counts if count is not None), np.zeros(1))[:, 0]
            clock = parts[0][0]
            steps[clock] = len(times)
            break
    if extrinsics is not None:
        steps["camera_extrinsics"] = len(extrinsics)
    if len(set(steps.values())) > 1:
        raise DecodeError("shapes disagree", ", ".join(f"{name} has {count} steps" for name, count in steps.items()))
    return check_log(StateLog(np.concatenate([position, gripper], axis=1), times, extrinsics)), clock


def _required(file: "h5py.File", name: str, width: int) -> npt.NDArray[np.float64]:
    array = _array(file, name, width)
    if array is None:
        raise DecodeError("missing in trajectory.h5", name)
    return array


def _array(file: "h5py.File", name: str, width: int) -> npt.NDArray[Any] | None:
    """Reads a dataset of numbers as [K, width], or None; [K] is read as a width of 1. Raises DecodeError."""
    import h5py

    node: Any = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group):
            return None
        link = node.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise DecodeError("a link in trajectory.h5", f"{name}: {part} is a {type(link).__name__}, not followed")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        return None
    if node.external is not None or node.is_virtual:
        raise DecodeError("a link in trajectory.h5", f"{name} is kept in other files, which are not read")
    if node.dtype.kind not in "fiu" or (node.shape[1:] != (width,) and (width, len(node.shape)) != (1, 1)):
        raise DecodeError("shapes disagree", f"{name}: {node.dtype} {list(node.shape)}, not numbers [K, {width}]")
    if node.shape[0] > _MAX_STEPS:
        raise DecodeError("shapes disagree", f"{name}: {node.shape[0]} steps")
    array = np.asarray(node[()])
    # Keeps integers, because times are differences of large integers.
    return array.reshape(len(array), width).astype(np.int64 if array.dtype.kind in "iu" and width == 1 else np.float64)
