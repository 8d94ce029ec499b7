"""Small trajectories in DROID's layout on disk, written with h5py and PyAV."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.videos import encoded

STEPS, HZ = 45, 15
SERIALS = {"wrist": "18026681", "ext1": "22008760", "ext2": "24400334"}
POSITION, GRIPPER = "observation/robot_state/cartesian_position", "observation/robot_state/gripper_position"
EXTRINSICS = f"observation/camera_extrinsics/{SERIALS['ext1']}_left"
READ_START = "observation/timestamp/robot_state/read_start"


def world(steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
    """What the robot and the cameras did, by the HDF5's names."""
    draw = np.random.default_rng(seed)
    return {
        "observation/robot_state/cartesian_position": draw.normal(size=(steps, 6)),
        "observation/robot_state/gripper_position": draw.uniform(size=steps),
        "observation/robot_state/joint_positions": draw.normal(size=(steps, 7)),
        **{f"observation/camera_extrinsics/{serial}_left": draw.normal(size=(steps, 6)) for serial in SERIALS.values()},
    }


def jittered_ms(steps: int = STEPS) -> np.ndarray:
    """Milliseconds since 1970 of a log that is meant to run at 15 Hz, with a pause of 0.3 s in it."""
    gaps = np.random.default_rng(1).integers(60, 74, size=steps - 1)
    gaps[steps // 2] += 300
    return 1_697_000_000_000 + np.concatenate([[0], np.cumsum(gaps)])


def write(
    folder: Path, arrays: dict[str, np.ndarray], video: bytes | None, *, view: str = "ext1", **metadata: Any
) -> Path:
    """A trajectory's folder. video: of the view; the other views' are not there."""
    (folder / "recordings" / "MP4").mkdir(parents=True, exist_ok=True)
    paths = {f"{name}_mp4_path": f"success/2023/x/recordings/MP4/{serial}.mp4" for name, serial in SERIALS.items()}
    known = {"uuid": f"Lab+{folder.name}", "lab": "Lab", "success": True, "user": "A Person", **paths}
    known |= {"left_mp4_path": paths["ext1_mp4_path"], "right_mp4_path": None} | metadata
    (folder / f"metadata_Lab+{folder.name}.json").write_text(json.dumps(known))
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    if video is not None:
        (folder / "recordings" / "MP4" / f"{SERIALS[view]}.mp4").write_bytes(video)
    return folder


def good(folder: Path, seed: int = 0, steps: int = STEPS, **changes: Any) -> Path:
    """A sound one, at 15 frames a second and 15 steps; changes: other arrays of the HDF5."""
    return write(folder, world(steps, seed) | changes, encoded(steps, rate=HZ, gop=5 + seed))
