"""The synthetic robot's exploration, written in DROID's layout (see shards/droid.py), videos and all."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vjepa_scale.core.files import write_json
from vjepa_scale.demo.robot import explore
from vjepa_scale.demo.robot_world import RobotWorld, draw_scene, render
from vjepa_scale.demo.synthetic import encode_mp4, write_whole

SERIAL = "10000001"
_START_MS = 1_700_000_000_000  # logs count from 1970


def write_trajectory(folder: Path, world: RobotWorld, seed: int, split: str, index: int) -> Path:
    """Explore, film and log trajectory ``index`` of a split in folder/<split>/NNNNN."""
    import h5py  # not every data set is of robots

    states, scene = explore(world, seed, split, index), draw_scene(world, seed, split, index)
    path = folder / split / f"{index:05d}"
    videos = path / "recordings" / "MP4"
    videos.mkdir(parents=True)
    (videos / f"{SERIAL}.mp4").write_bytes(encode_mp4(render(scene, states), world.fps, preset="ultrafast"))
    name = f"synthetic+{seed}+{split}+{index:05d}"
    video = f"{split}/{index:05d}/recordings/MP4/{SERIAL}.mp4"
    known = {"uuid": name, "lab": "synthetic", "success": True, "current_task": "explore"}
    # Both names: `left` is what DROID's later exports call the first exterior camera.
    write_json(path / f"metadata_{name}.json", known | {"ext1_mp4_path": video, "left_mp4_path": video})
    arrays = {
        "robot_state/cartesian_position": states[:, :6],
        "robot_state/gripper_position": states[:, 6],
        f"camera_extrinsics/{SERIAL}_left": np.tile(scene.extrinsics, (len(states), 1)),
        "timestamp/robot_state/read_start": _START_MS + np.round(np.arange(len(states)) * 1000 / world.fps).astype(int),
    }
    with h5py.File(path / "trajectory.h5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(f"observation/{key}", data=array, track_times=False)  # no times: equal bytes
    return path


def write_trajectories(out: Path, world: RobotWorld, *, seed: int, train: int, val: int, workers: int) -> Iterator[int]:
    """Write a data set of trajectories into out/{train,val}/NNNNN (see ``synthetic.write_whole``)."""
    about = {"robot": asdict(world), "seed": seed, "train": train, "val": val}
    return write_whole(out, write_trajectory, world, about, workers=workers)
