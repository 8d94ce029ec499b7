"""The synthetic robot: training data of exploration, in DROID's layout; and an environment that executes actions.

There is no inertia: the next state depends only on the last one and the action. In exploration each of the seven
numbers changes at its own rate, redrawn a few times a second. So past motion says little about future motion, and a
model has to use the actions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import write_json
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.poses import advance
from vjepa_scale.data.trajectories import STATE, Floats
from vjepa_scale.demo.robot_world import Range, RobotWorld, draw_scene, render
from vjepa_scale.demo.synthetic import SPLITS, U8, encode_mp4, write_whole

_SETTLING_S = 0.05  # time constant of a change of rate
_LOOKAHEAD_S = 0.1  # a number that would leave its range within this time reverses
_TRIES = 1000


def explore(world: RobotWorld, seed: int, split: str, index: int) -> Floats:
    """Returns the states of trajectory ``index`` of a split, at the world's rate: [steps, 7]."""
    draws = KeyedRng(seed, "robot path", SPLITS.index(split), index)
    low, high = world.bounds
    state, rate, aim = low + (high - low) * draws.uniforms(STATE), np.zeros(STATE), np.zeros(STATE)
    left, second = np.zeros(STATE), 1 / world.fps
    taken_up = 1 - np.exp(-second / _SETTLING_S)
    states = np.empty((world.steps, STATE))
    for k in range(world.steps):
        states[k] = state
        due = left <= 0
        ways, times = 2 * draws.uniforms(STATE) - 1, world.hold[0] + np.ptp(world.hold) * draws.uniforms(STATE)
        aim, left = np.where(due, world.rates * ways, aim), np.where(due, times, left) - second
        ahead = state + _LOOKAHEAD_S * aim
        aim = np.where(ahead < low, np.abs(aim), np.where(ahead > high, -np.abs(aim), aim))
        rate = rate + taken_up * (aim - rate)
        state = np.clip(state + second * rate, low, high)
    return states


@dataclass(frozen=True)
class Reach:
    """The task of the environment: move the hand to a goal with a number of actions.

    distance_m: from start to goal (only the position differs); radius_m: the goal is reached within this distance;
    steps: actions per episode
    """

    distance_m: Range = (0.15, 0.25)
    radius_m: float = 0.05
    steps: int = 10


class Robot:
    """A batch of B episodes, each with its own scene, arm and goal.

    states, goals: [B, 7] float64. Episodes are drawn by seed and number, independently of each other.
    """

    def __init__(self, world: RobotWorld, reach: Reach, *, seed: int, episodes: Sequence[int]) -> None:
        self.world, self.reach, self.episodes = world, reach, list(episodes)
        self._scenes = [draw_scene(world, seed, "val", episode) for episode in episodes]
        drawn = [_start_and_goal(world, reach, KeyedRng(seed, "robot episode", episode)) for episode in episodes]
        self.states, self.goals = np.stack([start for start, _ in drawn]), np.stack([goal for _, goal in drawn])

    def step(self, actions: Floats) -> Floats:
        """Returns the states [B, 7] after actions [B, 7].

        A hand moves at most ``step_m`` per axis, and stays within the world's range.
        """
        limit = np.array([self.world.step_m] * 3 + [np.inf] * (STATE - 3))
        low, high = self.world.bounds
        moved = advance(torch.from_numpy(self.states), torch.from_numpy(np.clip(actions, -limit, limit))).numpy()
        self.states = np.clip(moved, low, high)
        return self.states

    def pictures(self, states: Floats | None = None) -> U8:
        """Renders the cameras' pictures, [B, size, size, 3], of the current or other states [B, 7] (such as goals)."""
        states = self.states if states is None else states
        return np.stack([render(scene, state) for scene, state in zip(self._scenes, states, strict=True)])

    @property
    def extrinsics(self) -> Floats:
        """Returns the poses of the cameras, [B, 6]."""
        return np.stack([scene.extrinsics for scene in self._scenes])

    def distances_m(self) -> Floats:
        """Returns the distance from each hand to its goal, [B]."""
        return np.linalg.norm(self.states[:, :3] - self.goals[:, :3], axis=1)

    def reached(self) -> np.ndarray:
        """Returns whether each hand is at its goal now, [B]."""
        return self.distances_m() <= self.reach.radius_m


def _start_and_goal(world: RobotWorld, reach: Reach, draws: KeyedRng) -> tuple[Floats, Floats]:
    """Draws start and goal in the world's range at the task's distance, in a uniform direction as the range allows."""
    low, high = world.bounds
    for _ in range(_TRIES):
        start, goal = low + (high - low) * draws.uniforms(STATE), low + (high - low) * draws.uniforms(STATE)
        goal[3:] = start[3:]
        if reach.distance_m[0] <= np.linalg.norm(goal - start) <= reach.distance_m[1]:
            return start, goal
    fix = f"the hand's range is {(high - low)[:3].tolist()} m"
    raise UserError(f"no start and goal are {reach.distance_m} m apart", where="Reach.distance_m", fix=fix)


# -- exploration in DROID's layout (shards/droid.py), videos and all -------------------------------


SERIAL = "10000001"
_START_MS = 1_700_000_000_000  # logs count from 1970


def write_trajectory(folder: Path, world: RobotWorld, seed: int, split: str, index: int) -> Path:
    """Writes video and log of trajectory ``index`` of a split to folder/<split>/NNNNN."""
    import h5py  # needed for robot data only

    states, scene = explore(world, seed, split, index), draw_scene(world, seed, split, index)
    path = folder / split / f"{index:05d}"
    videos = path / "recordings" / "MP4"
    videos.mkdir(parents=True)
    (videos / f"{SERIAL}.mp4").write_bytes(encode_mp4(render(scene, states), world.fps, preset="ultrafast"))
    name = f"synthetic+{seed}+{split}+{index:05d}"
    video = f"{split}/{index:05d}/recordings/MP4/{SERIAL}.mp4"
    known = {"uuid": name, "lab": "synthetic", "success": True, "current_task": "explore"}
    # Both names, because DROID's later exports call the first exterior camera `left`.
    write_json(path / f"metadata_{name}.json", known | {"ext1_mp4_path": video, "left_mp4_path": video})
    arrays = {
        "robot_state/cartesian_position": states[:, :6],
        "robot_state/gripper_position": states[:, 6],
        f"camera_extrinsics/{SERIAL}_left": np.tile(scene.extrinsics, (len(states), 1)),
        "timestamp/robot_state/read_start": _START_MS + np.round(np.arange(len(states)) * 1000 / world.fps).astype(int),
    }
    with h5py.File(path / "trajectory.h5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(f"observation/{key}", data=array, track_times=False)  # times would change the bytes
    return path


def write_trajectories(out: Path, world: RobotWorld, *, seed: int, train: int, val: int, workers: int) -> Iterator[int]:
    """Writes a data set of trajectories to out/{train,val}/NNNNN (see ``synthetic.write_whole``)."""
    about = {"robot": asdict(world), "seed": seed, "train": train, "val": val}
    return write_whole(out, write_trajectory, world, about, workers=workers)
