"""The synthetic robot in motion: exploration to learn from, as data in DROID's layout; an environment for actions.

Without inertia: the next state depends on the last one and the action alone. In exploration each of the seven numbers
changes at a rate of its own, redrawn a few times a second, so that what a hand did before tells little of what it
will do: a model has to read the actions.
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

_SETTLING_S = 0.05  # a new rate is taken up within about this time
_LOOKAHEAD_S = 0.1  # what would leave its range so soon turns round
_TRIES = 1000


def explore(world: RobotWorld, seed: int, split: str, index: int) -> Floats:
    """States of trajectory ``index`` of a split, at the world's rate: [steps, 7]."""
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
    """What the environment asks for: a hand to be brought somewhere by a number of actions.

    distance_m: from the start to the goal (only the place differs); radius_m: so near the goal is reached;
    steps: how many actions an episode has
    """

    distance_m: Range = (0.15, 0.25)
    radius_m: float = 0.05
    steps: int = 10


class Robot:
    """Episodes side by side, each in a scene of its own: B arms which take actions, and B goals.

    states, goals: [B, 7] float64. Episodes are drawn by seed and number: none depends on the others.
    """

    def __init__(self, world: RobotWorld, reach: Reach, *, seed: int, episodes: Sequence[int]) -> None:
        self.world, self.reach, self.episodes = world, reach, list(episodes)
        self._scenes = [draw_scene(world, seed, "val", episode) for episode in episodes]
        drawn = [_start_and_goal(world, reach, KeyedRng(seed, "robot episode", episode)) for episode in episodes]
        self.states, self.goals = np.stack([start for start, _ in drawn]), np.stack([goal for _, goal in drawn])

    def step(self, actions: Floats) -> Floats:
        """The states [B, 7] after actions [B, 7]: as told, but a hand moves at most ``step_m`` per axis and keeps
        within the world's range."""
        limit = np.array([self.world.step_m] * 3 + [np.inf] * (STATE - 3))
        low, high = self.world.bounds
        moved = advance(torch.from_numpy(self.states), torch.from_numpy(np.clip(actions, -limit, limit))).numpy()
        self.states = np.clip(moved, low, high)
        return self.states

    def pictures(self, states: Floats | None = None) -> U8:
        """What the cameras see, [B, size, size, 3]: now, or in other states [B, 7] (such as the goals)."""
        states = self.states if states is None else states
        return np.stack([render(scene, state) for scene, state in zip(self._scenes, states, strict=True)])

    @property
    def extrinsics(self) -> Floats:
        """Of the cameras, [B, 6]."""
        return np.stack([scene.extrinsics for scene in self._scenes])

    def distances_m(self) -> Floats:
        """From each hand to its goal, [B]."""
        return np.linalg.norm(self.states[:, :3] - self.goals[:, :3], axis=1)

    def reached(self) -> np.ndarray:
        """Whether each hand is at its goal now, [B]."""
        return self.distances_m() <= self.reach.radius_m


def _start_and_goal(world: RobotWorld, reach: Reach, draws: KeyedRng) -> tuple[Floats, Floats]:
    """Both in the world's range, so far apart, in a direction without preference where the range allows it."""
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
