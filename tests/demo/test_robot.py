"""The synthetic robot: judged by h5py, PyAV and scipy."""

from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.chain import tool
from tests.videos import quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import read_trajectory
from vjepa_scale.demo.robot import SERIAL, Reach, Robot, explore, write_trajectories, write_trajectory
from vjepa_scale.demo.robot_world import RobotWorld, arm_joints, draw_scene, render
from vjepa_scale.shards.make import Settings, make_shards

SMALL = RobotWorld(size=32, seconds=2.0)
WIDTHS = np.ptp(SMALL.bounds, axis=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("robot") / "data"
    assert list(write_trajectories(out, SMALL, seed=3, train=4, val=1, workers=1)) == [1, 2, 3, 4, 5]
    return out


def drawn_states(count: int) -> np.ndarray:
    return SMALL.bounds[0] + WIDTHS * np.random.default_rng(0).uniform(size=(count, 7))


# -- pictures --------------------------------------------------------------------------------------


def test_a_picture_is_a_function_of_the_state_and_every_number_of_it_shows():
    scene, states = draw_scene(SMALL, 0, "train", 0), drawn_states(8)
    together = render(scene, states)
    assert (together.shape, together.dtype) == ((8, 32, 32, 3), np.uint8)
    assert (together[::-1] == render(scene, states[::-1])).all()
    assert (together[5] == render(scene, states[5])).all()
    assert (render(scene, states.reshape(2, 4, 7)) == together.reshape(2, 4, 32, 32, 3)).all()
    for number, width in enumerate(WIDTHS):
        moved = np.tile(SMALL.bounds.mean(axis=0), (2, 1)) + np.outer([-0.5, 0.5], np.eye(7)[number] * width)
        first, second = render(scene, moved).astype(int)
        assert np.abs(first - second).max() > 40, number


def test_pictures_change_the_more_the_further_the_hand_moves():
    changes = []
    for index, state in enumerate(drawn_states(24)):
        away = np.where(state > SMALL.bounds.mean(axis=0), -1, 1) * np.eye(7)[index % 3]
        path = state + np.outer([0, 0.02, 0.06, 0.15], away)
        first, *others = render(draw_scene(SMALL, 0, "train", index), path).astype(float)
        changes.append([np.abs(other - first).mean() for other in others])
    near, middle, far = np.mean(changes, axis=0)
    assert 0.2 < near < 0.6 * middle < 0.6 * far


def test_the_arm_reaches_every_place_in_the_world_and_keeps_its_lengths():
    corners = np.stack(np.meshgrid(*SMALL.bounds.T), -1).reshape(-1, 7)
    states = np.concatenate([corners, drawn_states(100)])
    shoulder, elbow, wrist = arm_joints(states)
    for start, end in ((shoulder, elbow), (elbow, wrist)):
        assert np.linalg.norm(end - start, axis=1) == pytest.approx(0.38, abs=1e-9)
    hand = Rotation.from_euler("xyz", states[:, 3:6]).apply([0, 0, -0.15])
    assert np.allclose(wrist + hand, states[:, :3])


def test_the_extrinsics_tell_where_the_hand_is_seen():
    """What a closing gripper changes lies around the fingers' tips, where a pinhole at the extrinsics sees them."""
    world = RobotWorld(size=96, z=(0.2, 0.35))
    scene = draw_scene(world, 0, "val", 0)
    camera = Rotation.from_euler("xyz", scene.extrinsics[3:])
    for state in world.bounds[0] + np.ptp(world.bounds, axis=0) * np.random.default_rng(1).uniform(size=(6, 7)):
        seen = camera.inv().apply(state[:3] - scene.extrinsics[:3])
        column, row = 96 * (world.focal * seen[:2] / seen[2] + 0.5)
        opened, closed = render(scene, np.stack([np.r_[state[:6], 0], np.r_[state[:6], 1]])).astype(int)
        rows, columns = np.nonzero(np.abs(opened - closed).max(axis=-1) > 90)  # more than a shadow changes
        assert len(rows) > 10
        assert np.hypot(rows.mean() - row, columns.mean() - column) < 8


# -- motion ----------------------------------------------------------------------------------------


def test_exploration_stays_in_range_at_its_rates_and_visits_all_of_it():
    paths = np.stack([explore(SMALL, 0, "train", index) for index in range(64)])
    assert paths.shape == (64, 30, 7)
    low, high = SMALL.bounds
    assert ((paths >= low) & (paths <= high)).all()
    speeds = np.abs(np.diff(paths, axis=1)) * SMALL.fps
    assert (speeds <= SMALL.rates + 1e-9).all()
    assert (speeds.mean((0, 1)) > 0.2 * SMALL.rates).all()
    shares = (paths.reshape(-1, 7) - low) / WIDTHS
    counts = np.stack([np.histogram(share, bins=4, range=(0, 1))[0] for share in shares.T])
    assert (counts > 0.1 * len(shares)).all(), counts


def test_steps_move_the_arm_as_scipy_says():
    robot = Robot(SMALL, Reach(), seed=0, episodes=range(6))
    draw = np.random.default_rng(0)
    robot.states = SMALL.bounds.mean(axis=0) + 0.1 * WIDTHS * draw.uniform(-1, 1, size=(6, 7))
    for _ in range(3):
        before = robot.states.copy()
        actions = draw.uniform(-1, 1, size=(6, 7)) * [0.02, 0.02, 0.02, 0.02, 0.02, 0.1, 0.1]
        after = robot.step(actions)
        turned = Rotation.from_euler("xyz", actions[:, 3:6]) * Rotation.from_euler("xyz", before[:, 3:6])
        assert np.allclose(after[:, :3], before[:, :3] + actions[:, :3])
        assert np.allclose(after[:, 3:6], turned.as_euler("xyz"))
        assert np.allclose(after[:, 6], before[:, 6] + actions[:, 6])


def test_steps_are_limited_and_end_at_the_edge_of_the_world():
    robot = Robot(SMALL, Reach(), seed=0, episodes=range(4))
    before = robot.states.copy()
    after = robot.step(np.tile([9, -9, 0.01, 0, 0, 0, 9], (4, 1)))
    expected = before[:, :3] + [SMALL.step_m, -SMALL.step_m, 0.01]
    assert np.allclose(after[:, :3], np.clip(expected, *SMALL.bounds[:, :3]))
    assert (after[:, 6] == 1).all()
    for _ in range(20):
        robot.step(np.full((4, 7), -1.0))
    assert (robot.states[:, [0, 1, 2, 6]] == SMALL.bounds[0, [0, 1, 2, 6]]).all()
    assert ((robot.states >= SMALL.bounds[0]) & (robot.states <= SMALL.bounds[1])).all()


def test_episodes_depend_on_seed_and_number_alone():
    reach = Reach(distance_m=(0.15, 0.25))
    robot = Robot(SMALL, reach, seed=5, episodes=range(40))
    alone, other = (Robot(SMALL, reach, seed=seed, episodes=[7]) for seed in (5, 6))
    assert (alone.states == robot.states[[7]]).all()
    assert (alone.goals == robot.goals[[7]]).all()
    assert (alone.pictures() == robot.pictures()[[7]]).all()
    assert not np.isclose(alone.states, other.states).any()
    assert ((robot.distances_m() >= 0.15) & (robot.distances_m() <= 0.25)).all()
    assert (robot.states[:, 3:] == robot.goals[:, 3:]).all()
    assert not robot.reached().any()
    goals = robot.pictures(robot.goals)
    robot.states = robot.goals.copy()
    assert robot.reached().all()
    assert (robot.pictures() == goals).all()


def test_goals_further_apart_than_the_world_are_refused():
    with pytest.raises(UserError, match="apart"):
        Robot(SMALL, Reach(distance_m=(2.0, 3.0)), seed=0, episodes=[0])


# -- files -----------------------------------------------------------------------------------------


def test_files_hold_what_was_done_in_droids_layout(written):
    folder = written / "train" / "00002"
    states = explore(SMALL, 3, "train", 2)
    with h5py.File(folder / "trajectory.h5") as file:
        assert (file["observation/robot_state/cartesian_position"][()] == states[:, :6]).all()
        assert (file["observation/robot_state/gripper_position"][()] == states[:, 6]).all()
        camera = file[f"observation/camera_extrinsics/{SERIAL}_left"][()]
        assert (camera == draw_scene(SMALL, 3, "train", 2).extrinsics).all()
        assert camera.shape == (30, 6)
        clock = file["observation/timestamp/robot_state/read_start"][()]
        assert np.abs((clock - clock[0]) / 1000 - np.arange(30) / 15).max() < 0.001
    with av.open(str(folder / "recordings" / "MP4" / f"{SERIAL}.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 15)
        filmed = np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(stream)])
    expected = render(draw_scene(SMALL, 3, "train", 2), states).astype(float)
    apart = np.abs(filmed[:, None] - expected).mean((2, 3, 4))  # of every picture from every step's
    assert (np.abs(apart.argmin(axis=1) - np.arange(30)) <= 1).all()
    assert np.diag(apart).mean() < 0.7 * np.diag(apart, 2).mean()


def test_shards_take_all_of_them_and_give_the_states_back(written, tmp_path):
    summary = make_shards(written / "train", tmp_path, Settings(trajectories="droid"), workers=1, progress=quiet)
    assert (summary.clips, sum(summary.rejected.values())) == (4, 0)
    manifest = Manifest.open(tmp_path)
    logs = sorted((read_trajectory(manifest, record).states for record in range(4)), key=lambda states: states[0, 0])
    done = sorted((explore(SMALL, 3, "train", index) for index in range(4)), key=lambda states: states[0, 0])
    assert np.array_equal(logs, done)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(written, tmp_path):
    again, other = (write_trajectory(tmp_path / str(seed), SMALL, seed, "train", 1) for seed in (3, 4))
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) == 3
    for file in files:
        assert (again / file).read_bytes() == (written / "train" / "00001" / file).read_bytes()
    assert not (other / "metadata_synthetic+3+train+00001.json").exists()
    for file in files[1:]:
        assert not (other / file).exists() or (other / file).read_bytes() != (again / file).read_bytes()
    assert (explore(SMALL, 3, "train", 1) != explore(SMALL, 3, "val", 1)).any()


def test_the_tool_writes_the_robots_world_whole(tmp_path):
    out = tmp_path / "a"
    counts = ("--trajectories", 2, "--val-trajectories", 1)
    tool("make_synthetic", out, "--robot", *counts, "--size", 32, "--seconds", 1, "--workers", 1)
    folders = sorted(str(path.parent.relative_to(out)) for path in out.rglob("trajectory.h5"))
    assert folders == ["train/00000", "train/00001", "val/00000"]
    assert not list(tmp_path.glob(".*"))


def test_a_data_set_that_is_there_is_left_alone_and_another_refused(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert list(write_trajectories(written, SMALL, seed=3, train=4, val=1, workers=1)) == [5]
    with pytest.raises(UserError, match="something else"):
        next(write_trajectories(written, SMALL, seed=4, train=4, val=1, workers=1))
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="even"):
        next(write_trajectories(tmp_path / "out", RobotWorld(size=33), seed=0, train=1, val=0, workers=1))
