"""One robot trajectory in DROID's layout: judged by what h5py and PyAV wrote, and by PyAV decoding in order."""

import os
import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest

from tests.data.droid import (
    EXTRINSICS,
    GRIPPER,
    HZ,
    POSITION,
    READ_START,
    SERIALS,
    STEPS,
    good,
    jittered_ms,
    world,
    write,
)
from tests.videos import encoded, number_of
from vjepa_scale.shards.droid import read_log, read_view
from vjepa_scale.shards.trajectories import Found, members, probe_trajectory, retimed_video
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip


def probe(folder: Path, *, view: str = "left", retime: bool = False) -> Found:
    return probe_trajectory(folder.parent, folder.name, view=view, retime=retime)


def reason(folder: Path, **asked: Any) -> tuple[str, str]:
    with pytest.raises(DecodeError) as caught:
        probe(folder, **asked)
    return caught.value.reason, caught.value.detail


def file_sum(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    summed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return path.stat().st_size, summed.stdout.split()[0]


def shown(data: bytes) -> tuple[list[float], list[np.ndarray]]:
    """Time and picture of every frame, by PyAV in order."""
    with av.open(BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        start = container.streams.video[0].start_time or 0
        return [float((f.pts - start) * f.time_base) for f in frames], [f.to_ndarray(format="rgb24") for f in frames]


# -- one trajectory -------------------------------------------------------------------------------


def test_members_are_what_the_robot_did(tmp_path: Path) -> None:
    arrays = world() | {READ_START: np.round(1.697e12 + np.arange(STEPS) * 1000 / HZ).astype(np.int64)}
    folder = write(tmp_path / "a", arrays, encoded(STEPS, rate=HZ))
    found = probe(folder)
    beside = members(tmp_path, found.trajectory)
    made = {name: np.load(BytesIO(data), allow_pickle=False) for name, data in beside.items()}
    assert list(made) == ["states", "times", "extrinsics"]
    assert made["states"].dtype == np.float64
    assert np.array_equal(made["states"][:, :6], arrays["observation/robot_state/cartesian_position"])
    assert np.array_equal(made["states"][:, 6], arrays["observation/robot_state/gripper_position"])
    assert np.array_equal(made["extrinsics"], arrays[f"observation/camera_extrinsics/{SERIALS['ext1']}_left"])
    assert made["times"] == pytest.approx((arrays[READ_START] - arrays[READ_START][0]) / 1000, abs=1e-9)
    assert (found.trajectory.view, found.trajectory.serial) == ("left", SERIALS["ext1"])
    assert (found.trajectory.steps, found.trajectory.logged, found.trajectory.clock) == (STEPS, STEPS, READ_START)
    assert found.trajectory.retimed is None
    assert found.path == f"a/recordings/MP4/{SERIALS['ext1']}.mp4"
    assert (found.size, found.sha256) == file_sum(tmp_path / found.path)
    assert found.known == {"uuid": "Lab+a", "lab": "Lab", "success": True}, "and no person's name"


@pytest.mark.parametrize(
    ("stamps", "clock"),
    [
        ({}, "nominal 15 Hz"),
        ({"control/step_start": "ms"}, "observation/timestamp/control/step_start"),
        ({"robot_state/read_start": "ms", "control/step_start": "other"}, READ_START),
        (
            {"robot_state/robot_timestamp_seconds": "s", "robot_state/robot_timestamp_nanos": "ns"},
            "observation/timestamp/robot_state/robot_timestamp_seconds",
        ),
        ({"robot_state/robot_timestamp_seconds": "s"}, "nominal 15 Hz"),
    ],
    ids=["none", "step start", "read start first", "robot's", "half of the robot's"],
)
def test_times_are_the_logs_own_where_it_has_them(stamps: dict[str, str], clock: str, tmp_path: Path) -> None:
    nanos = 1_697_000_000_900_000_000 + np.arange(STEPS) * 70_000_000
    units = {"ms": nanos // 10**6, "other": nanos // 10**5, "s": nanos // 10**9, "ns": nanos % 10**9}
    arrays = world() | {f"observation/timestamp/{name}": units[unit] for name, unit in stamps.items()}
    log, found = read_log(write(tmp_path / "a", arrays, None), SERIALS["ext1"])
    assert found == clock
    expected = np.arange(STEPS) * (1 / 15 if "nominal" in clock else 0.07)
    assert log.times_s == pytest.approx(expected, abs=1e-9)


def test_a_camera_without_extrinsics_is_a_record_without_them(tmp_path: Path) -> None:
    arrays = world()
    del arrays[f"observation/camera_extrinsics/{SERIALS['ext1']}_left"]
    found = probe(write(tmp_path / "a", arrays, encoded(STEPS, rate=HZ)))
    assert not found.trajectory.extrinsics
    assert set(members(tmp_path, found.trajectory)) == {"states", "times"}


def test_the_last_step_has_no_picture_where_the_video_is_one_frame_short(tmp_path: Path) -> None:
    arrays = world()
    found = probe(write(tmp_path / "a", arrays, encoded(STEPS - 1, rate=HZ)))
    assert (found.trajectory.steps, found.trajectory.logged) == (STEPS - 1, STEPS)
    states = np.load(BytesIO(members(tmp_path, found.trajectory)["states"]))
    assert np.array_equal(states[:, :6], arrays["observation/robot_state/cartesian_position"][:-1])


# -- the broken -----------------------------------------------------------------------------------


def _without(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in arrays.items() if key != name}


BROKEN_LOGS = {
    "no gripper": (lambda a: _without(a, GRIPPER), "missing in trajectory.h5", GRIPPER),
    "no group": (lambda a: {"action/x": np.zeros(3)}, "missing in trajectory.h5", POSITION),
    "a group for an array": (
        lambda a: _without(a, GRIPPER) | {f"{GRIPPER}/x": np.zeros(3)},
        "missing in trajectory.h5",
        GRIPPER,
    ),
    "short gripper": (lambda a: a | {GRIPPER: np.zeros(40)}, "shapes disagree", "gripper_position has 40 steps"),
    "short clock": (lambda a: a | {READ_START: np.arange(44)}, "shapes disagree", "read_start has 44 steps"),
    "wide pose": (lambda a: a | {POSITION: np.zeros((STEPS, 7))}, "shapes disagree", "[45, 7], not numbers [K, 6]"),
    "text": (lambda a: a | {GRIPPER: np.array([b"x"] * STEPS)}, "shapes disagree", "|S1 [45]"),
    "short extrinsics": (lambda a: a | {EXTRINSICS: np.zeros((9, 6))}, "shapes disagree", "extrinsics has 9 steps"),
    "one step": (lambda a: {name: array[:1] for name, array in a.items()}, "too few steps", "1"),
    "nan": (
        lambda a: a | {POSITION: np.where(np.arange(STEPS)[:, None] == 7, np.nan, a[POSITION])},
        "non-finite states",
        "at step 7 of 45",
    ),
    "inf extrinsics": (lambda a: a | {EXTRINSICS: np.full((STEPS, 6), np.inf)}, "non-finite extrinsics", "at step 0"),
    "nan times": (lambda a: a | {READ_START: np.full(STEPS, np.nan)}, "non-finite times", "at step 0"),
    "times fall": (
        lambda a: a | {READ_START: np.where(np.arange(STEPS) == 5, 3, np.arange(STEPS))},
        "the log's times do not rise",
        "at step 5 of 45",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_LOGS)
def test_a_broken_log_is_named(kind: str, tmp_path: Path) -> None:
    change, expected, detail = BROKEN_LOGS[kind]
    found = reason(write(tmp_path / "a", change(world()), encoded(STEPS, rate=HZ)))
    assert found[0] == expected
    assert detail in found[1]


def test_a_damaged_trajectory_is_named(tmp_path: Path) -> None:
    folder = good(tmp_path / "a")
    saved = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    metadata, video = next(folder.glob("metadata_*")), folder / "recordings" / "MP4" / f"{SERIALS['ext1']}.mp4"

    def after(path: Path, content: bytes | None, **asked: Any) -> tuple[str, str]:
        path.unlink() if content is None else path.write_bytes(content)
        found = reason(folder, **asked)
        path.write_bytes(saved[path])
        return found

    log = folder / "trajectory.h5"
    assert after(log, None) == ("no trajectory.h5", "")
    assert after(log, b"not HDF5")[0] == "unreadable HDF5"
    assert after(log, saved[log][: len(saved[log]) // 2])[0] == "unreadable HDF5"
    assert after(metadata, None) == ("no metadata", "no metadata_*.json")
    assert after(metadata, b"{")[0] == "no metadata"
    assert after(metadata, b"[1]")[0] == "no metadata"
    assert after(video, None) == ("no video", f"recordings/MP4/{SERIALS['ext1']}.mp4")
    assert after(video, saved[video][:-900])[0] in ("does not decode to the end", "unreadable")
    assert reason(folder, view="top") == ("no such view", "top; there are ext1, ext2, left, wrist")
    assert reason(folder, view="right")[0] == "no such view"
    assert reason(folder, view="wrist")[0] == "no video"
    log.unlink()
    os.mkfifo(log)
    assert reason(folder) == ("no trajectory.h5", "not a file")
    log.unlink()
    log.write_bytes(saved[log])
    (folder / "metadata_2.json").write_text("{}")
    assert reason(folder)[0] == "no metadata"


@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "..", "recordings/MP4/..", "a\0b.mp4", "/"])
def test_a_path_in_the_metadata_leads_nowhere_else(path: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", world(), encoded(4), left_mp4_path=path)
    assert reason(folder)[0] in ("no video", "no such view")
    if path.endswith("passwd"):
        assert read_view(folder, "left").video == "passwd", "the name in the folder of videos, and no path"


# -- a hostile HDF5 -------------------------------------------------------------------------------


def _external_link(file: h5py.File, other: Path) -> None:
    file[GRIPPER] = h5py.ExternalLink(str(other), GRIPPER)


def _external_group(file: h5py.File, other: Path) -> None:
    del file["observation/robot_state"]
    file["observation/robot_state"] = h5py.ExternalLink(str(other), "observation/robot_state")


def _soft_link(file: h5py.File, other: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(other), "/")
    file[GRIPPER] = h5py.SoftLink(f"/elsewhere/{GRIPPER}")


def _external_storage(file: h5py.File, other: Path) -> None:
    file.create_dataset(GRIPPER, (STEPS,), "f8", external=[(str(other.with_suffix(".raw")), 0, STEPS * 8)])


def _virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((STEPS,), "f8")
    layout[:] = h5py.VirtualSource(str(other), GRIPPER, shape=(STEPS,))
    file.create_virtual_dataset(GRIPPER, layout)


@pytest.mark.parametrize("plant", [_external_link, _external_group, _soft_link, _external_storage, _virtual])
def test_nothing_of_another_file_is_read(plant: Any, tmp_path: Path) -> None:
    secret = good(tmp_path / "secret") / "trajectory.h5"
    secret.with_suffix(".raw").write_bytes(np.arange(STEPS, dtype=np.float64).tobytes())
    folder = write(tmp_path / "a", _without(world(), GRIPPER), encoded(STEPS, rate=HZ))
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        plant(file, secret)
        assert file[GRIPPER].shape == (STEPS,), "h5py follows it"
        assert np.asarray(file[GRIPPER]).any()
    assert reason(folder)[0] == "a link in trajectory.h5"


def test_an_array_that_would_not_fit_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", _without(world(), GRIPPER), encoded(STEPS, rate=HZ))
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        file.create_dataset(GRIPPER, (10**12,), "f8", chunks=(1024,), compression="gzip")
    assert reason(folder) == ("shapes disagree", f"{GRIPPER}: 1000000000000 steps")


# -- clocks ---------------------------------------------------------------------------------------

VIDEOS = {
    "60 fps": lambda frames: encoded(frames, rate=60, gop=9),
    "B-frames": lambda frames: encoded(frames, rate=60, gop=15, options={"x264-params": "bframes=3:b-adapt=0"}),
    "mp4v": lambda frames: encoded(frames, rate=60, gop=12, codec="mpeg4"),  # as DROID's exporter writes them
    "vp8": lambda frames: encoded(frames, rate=60, gop=12, codec="libvpx", container="matroska"),
}


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("kind", VIDEOS)
def test_a_video_of_60_fps_over_a_log_of_15_hz(kind: str, missing: int, tmp_path: Path) -> None:
    stamps = jittered_ms()
    frames = STEPS - missing
    folder = write(tmp_path / "a", world() | {READ_START: stamps}, VIDEOS[kind](frames))
    why, detail = reason(folder)
    times = (stamps - stamps[0])[:frames] / 1000
    assert why == "clocks disagree"
    lasts = times[-1] + np.median(np.diff(times))
    told = [float(number) for number in re.findall(r"(\d+\.\d+) s", detail)]
    assert told == pytest.approx([frames / 60, lasts], abs=2e-3)

    found = probe(folder, retime=True)
    data = retimed_video(tmp_path / found.path, tmp_path, found.trajectory)
    assert found.size == len(data)
    assert data == retimed_video(tmp_path / found.path, tmp_path, found.trajectory), "always the same bytes"
    assert found.trajectory.retimed == ("mkv" if kind == "vp8" else "mp4")
    assert found.trajectory.steps == frames
    before, after = shown((tmp_path / found.path).read_bytes()), shown(data)
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert [number_of(image) for image in after[1]] == [k % 64 for k in range(frames)]
    for k, time in enumerate(times):
        assert sum(at <= time + 1e-9 for at in after[0]) - 1 == k, "frame k is on screen at the time of step k"
        assert time - after[0][k] < 1.1e-3
    assert times[-1] < found.facts.duration < lasts + 0.014, "how long the last is shown, files say badly"
    own = np.load(BytesIO(members(tmp_path, found.trajectory)["times"]))
    assert own == pytest.approx(times, abs=1e-9)
    pictures = decode_clip(data, times_s=[float(own[20])])
    assert number_of(pictures[0]) == 20


def test_retime_leaves_alone_what_runs_with_its_log(tmp_path: Path) -> None:
    found = probe(good(tmp_path / "a"), retime=True)
    assert found.trajectory.retimed is None
    assert (found.size, found.sha256) == file_sum(tmp_path / found.path)


@pytest.mark.parametrize("retime", [False, True])
@pytest.mark.parametrize("frames", [STEPS - 2, STEPS + 1, 2 * STEPS])
def test_frames_that_are_no_steps_cannot_be_retimed(frames: int, retime: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", world(), encoded(frames, rate=60))
    assert reason(folder, retime=retime)[0] == "clocks disagree"


@pytest.mark.parametrize(("more", "sound"), [(-5, False), (-3, True), (0, True), (3, True), (5, False)])
def test_a_faster_video_has_to_end_within_a_step_of_its_log(more: int, sound: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", world(), encoded(STEPS * 4 + more, rate=60))
    if sound:
        found = probe(folder)
        assert (found.trajectory.steps, found.facts.frames) == (STEPS, STEPS * 4 + more)
    else:
        assert reason(folder)[0] == "clocks disagree"


@pytest.mark.parametrize(("late_ms", "sound"), [(30, True), (36, False)])
def test_a_frame_may_be_half_a_step_from_its_own(late_ms: int, sound: bool, tmp_path: Path) -> None:
    pts = [k * 67 + (late_ms if k == 10 else 0) for k in range(STEPS)]
    folder = write(tmp_path / "a", world() | {READ_START: 67 * np.arange(STEPS)}, encoded(STEPS, pts_ms=pts))
    if sound:
        assert probe(folder).trajectory.steps == STEPS
    else:
        assert reason(folder) == ("clocks disagree", "frame 10 comes at 0.706 s, its step was at 0.670 s")


def test_drift_beyond_one_step_is_told_by_the_end(tmp_path: Path) -> None:
    stamps = np.round(np.arange(STEPS) * 1000 / 14.2)  # what is called 15 Hz
    why, detail = reason(write(tmp_path / "a", world() | {READ_START: stamps}, encoded(STEPS, rate=HZ)))
    assert why == "clocks disagree"
    assert "the video lasts 3.000 s, the log 3.169 s (45 steps)" in detail
