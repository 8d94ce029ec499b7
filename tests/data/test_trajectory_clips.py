"""States beside pictures: judged by the numbers that the pictures themselves show."""

import json

import numpy as np
import pytest

from tests.data.droid import HZ, STEPS
from tests.data.robots import PLAIN, UNEVEN, robots
from tests.videos import number_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.clips import ClipRef, decode_ref, window
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import StateLog, long_enough, read_trajectory, states_at, trajectory_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return robots(tmp_path_factory.mktemp("robots"))


def record_of(manifest: Manifest, name: str) -> int:
    folders = [json.loads(manifest.read(r, "json"))["trajectory"]["folder"] for r in range(manifest.records)]
    return folders.index(name)


@pytest.mark.parametrize("name", ["even0", PLAIN, UNEVEN])
def test_states_are_of_the_step_that_the_picture_shows(name: str, made: Manifest) -> None:
    """At random times, at all times of the log, and in windows as they are drawn."""
    record = record_of(made, name)
    log = read_trajectory(made, record)
    draw = np.random.default_rng(0)
    duration = float(made.column("duration")[record])
    asked = [tuple(log.times_s.tolist()), tuple(np.sort(draw.uniform(0, duration, size=60)).tolist())]
    asked += [window(made, record, float(draw.uniform()), fps=5, frames=4) for _ in range(5)]
    asked.append(window(made, record, 0.0, fps=HZ / 3, frames=4))
    for times_s in asked:
        ref = ClipRef(0, 0, "robots", record, times_s, 5)
        shown = [number_of(picture) for picture in decode_ref(made, ref)]
        clip = trajectory_clip(made, ref)
        assert clip.steps.tolist() == shown
        assert clip.states.dtype == np.float32
        assert np.array_equal(clip.states, log.states[shown].astype(np.float32))
        if name == PLAIN:
            assert clip.extrinsics is None
        else:
            assert log.extrinsics is not None
            assert np.array_equal(clip.extrinsics, log.extrinsics[shown].astype(np.float32))
    assert clip.states.shape == (4, 7)


def log_of(times_s: list[float]) -> StateLog:
    times = np.array(times_s)
    return StateLog(np.arange(7.0 * len(times)).reshape(-1, 7), times)


def test_the_last_step_at_or_before_a_time() -> None:
    log = log_of([0.0, 0.1, 0.2, 0.6, 0.7])  # a pause after the third
    asked = {0.0: 0, 0.0999: 0, 0.1: 1, 0.1 + 0.1 + 0.1 - 0.1: 2, 0.3: 2, 0.5999: 2, 0.6: 3, 0.7: 4, 0.79: 4}
    assert states_at(log, list(asked)).steps.tolist() == list(asked.values())
    assert states_at(log, [0.2 - 5e-7]).steps.tolist() == [2], "sums of floats fall a little short"
    assert states_at(log, [0.2 - 1e-4]).steps.tolist() == [1]


def test_a_time_outside_the_log_is_a_mistake_of_ours() -> None:
    log = log_of([0.0, 0.1, 0.2])
    assert states_at(log, [0.399]).steps.tolist() == [2], "a video may outlast its log by a step"
    for outside in ([0.1, 0.41], [-0.01, 0.1], [float("nan")]):
        with pytest.raises(AssertionError, match=r"in a log of 0\.400 s"):
            states_at(log, outside)


def test_records_that_are_long_enough(made: Manifest) -> None:
    durations = np.array(made.column("duration"))
    assert sorted(np.round(durations, 2).tolist()) == [1.0, 3.0, 3.0, 3.0, 3.28]
    assert long_enough(made, frames=4, fps=4).tolist() == [0, 1, 2, 3, 4], "exactly as long is enough"
    assert long_enough(made, frames=STEPS, fps=HZ).tolist() == np.flatnonzero(durations > 2).tolist()
    assert long_enough(made, frames=46, fps=HZ).tolist() == [record_of(made, UNEVEN)]
    assert long_enough(made, frames=4, fps=4).dtype == np.int64
    with pytest.raises(UserError, match=r"16 frames at 4 a second, 4\.000 s.*longest lasts 3\.276 s") as caught:
        long_enough(made, frames=16, fps=4)
    assert str(caught.value).startswith(f"{made.folder}: ")


def test_a_window_of_the_shortest_record_fits(made: Manifest) -> None:
    for record in long_enough(made, frames=4, fps=4).tolist():
        for draw in (0.0, 1 - 1e-9):
            times_s = window(made, record, draw, fps=4, frames=4)
            assert trajectory_clip(made, ClipRef(0, 0, "robots", record, times_s, 4)).states.shape == (4, 7)


def test_a_data_set_without_trajectories(shards: Manifest) -> None:
    with pytest.raises(UserError, match="no trajectories"):
        trajectory_clip(shards, ClipRef(0, 0, "videos", 0, (0.0, 0.1), 10))
