"""Shards of robot trajectories, made by the command line: judged by what h5py wrote and by plain webdataset."""

import io
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset
from scipy.spatial.transform import Rotation

import vjepa_scale.shards.make as making
from tests.chain import tool
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
from tests.shards.test_shards_check import change_column, checked
from tests.shared import contents
from tests.videos import encoded, number_of, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import read_trajectory
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.shards.trajectories import find_trajectories
from vjepa_scale.video.decode import decode_clip

GOOD = ("Lab/success/2023-05-14/Mon_a", "Lab/success/2023-05-14/Mon_b", "Lab/failure/2023-05-15/Tue_c", "Lab/plain")
REASONS = {
    "Lab/broken/clocks": "clocks disagree",
    "Lab/broken/empty": "no metadata",
    "Lab/broken/gone": "no video",
    "Lab/broken/half": "does not decode to the end",
    "Lab/broken/log": "unreadable HDF5",
    "Lab/broken/nan": "non-finite states",
    "Lab/broken/none": "no trajectory.h5",
    "Lab/broken/short": "shapes disagree",
    "Lab/broken/view": "no such view",
}


@pytest.fixture(scope="module")
def droid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sound trajectories, the last without extrinsics and with a log of its own times, and nine broken ones."""
    root = tmp_path_factory.mktemp("droid")
    for seed, name in enumerate(GOOD[:3]):
        good(root / name, seed)
    (root / GOOD[0] / "recordings" / "SVO").mkdir()
    (root / GOOD[0] / "recordings" / "SVO" / "1.svo").write_bytes(b"raw")
    plain = {name: array for name, array in world(20, 3).items() if name != EXTRINSICS}
    write(root / GOOD[3], plain | {READ_START: 50 * np.arange(20)}, encoded(20, rate=20))
    broken = root / "Lab" / "broken"
    good(broken / "empty", 4)
    next((broken / "empty").glob("metadata_*")).unlink()
    write(broken / "gone", world(), None)
    good(broken / "half", 5)
    video = broken / "half" / "recordings" / "MP4" / f"{SERIALS['ext1']}.mp4"
    video.write_bytes(encoded(60, faststart=True)[:-1200])
    (good(broken / "log", 6) / "trajectory.h5").write_bytes(b"text")
    good(broken / "nan", 7, **{POSITION: np.full((STEPS, 6), np.nan)})
    (good(broken / "none", 8) / "trajectory.h5").unlink()
    good(broken / "short", 9, **{GRIPPER: np.zeros(7)})
    write(broken / "view", world(), encoded(STEPS, rate=HZ), left_mp4_path=None)
    write(broken / "clocks", world(seed=10) | {READ_START: jittered_ms()}, encoded(STEPS, rate=60))
    return root


@pytest.fixture(scope="module")
def made(droid: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("made") / "shards"
    tool("make_shards", droid, out, "--trajectories", "droid", "--workers", 2, "--shard-records", 3)
    return Manifest.open(out)


def written(root: Path, folder: str) -> dict[str, np.ndarray]:
    """What the robot did, by the members' names, as h5py reads it."""
    with h5py.File(root / folder / "trajectory.h5") as file:
        states = np.concatenate([file[POSITION][()], file[GRIPPER][()][:, None]], axis=1)
        stamps = file[READ_START][()] if READ_START in file else np.arange(len(states)) * 1000 / HZ
        found = {"states.npy": states, "times.npy": (stamps - stamps[0]) / 1000}
        return found | ({"extrinsics.npy": file[EXTRINSICS][()]} if EXTRINSICS in file else {})


def test_every_trajectory_is_a_record_or_rejected(droid: Path, made: Manifest) -> None:
    rejected = {row["path"]: row["reason"] for row in read_jsonl(made.folder / "rejected.jsonl")}
    assert rejected == REASONS
    known = [json.loads(made.read(record, "json")) for record in range(made.records)]
    assert sorted(k["trajectory"]["folder"] for k in known) == sorted(GOOD)
    (clocks,) = (row for row in read_jsonl(made.folder / "rejected.jsonl") if row["reason"] == "clocks disagree")
    assert "0.750 s" in clocks["detail"]
    assert "3.27" in clocks["detail"]


def test_plain_webdataset_reads_states_as_arrays(droid: Path, made: Manifest) -> None:
    urls = sorted(str(path) for path in made.folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == len(GOOD)
    for sample in samples:
        about = sample["json"]["trajectory"]
        expected = written(droid, about["folder"])
        assert {name for name in sample if name.endswith(".npy")} == set(expected)
        for name, array in expected.items():
            assert sample[name].dtype == np.float64
            assert sample[name] == pytest.approx(array, abs=1e-12 if name == "times.npy" else 0)
        assert sample["json"]["path"] == f"{about['folder']}/recordings/MP4/{SERIALS['ext1']}.mp4"
        assert sample["mp4"] == (droid / sample["json"]["path"]).read_bytes()
        assert (about["steps"], about["view"], about["serial"]) == (len(array), "left", SERIALS["ext1"])
        assert about["clock"] == (READ_START if about["folder"] == "Lab/plain" else "nominal 15 Hz")
        assert sample["json"]["metadata"]["lab"] == "Lab"


def test_the_reader_gives_what_was_written(droid: Path, made: Manifest) -> None:
    for record in range(made.records):
        folder = json.loads(made.read(record, "json"))["trajectory"]["folder"]
        expected, log = written(droid, folder), read_trajectory(made, record)
        assert np.array_equal(np.load(io.BytesIO(made.read(record, "states"))), expected["states.npy"])
        assert np.array_equal(log.states, expected["states.npy"])
        assert log.times_s == pytest.approx(expected["times.npy"], abs=1e-12)
        if folder == "Lab/plain":
            assert log.extrinsics is None
            assert made.column("extrinsics.size")[record] == 0
        else:
            assert np.array_equal(log.extrinsics, expected["extrinsics.npy"])


def test_the_manifest_has_statistics_of_states_and_actions(droid: Path, made: Manifest) -> None:
    """By numpy and scipy on the logs as they were written."""
    states = [written(droid, folder)["states.npy"] for folder in GOOD]
    actions = []
    for log in states:
        turned = Rotation.from_euler("xyz", log[:, 3:6])
        angles = (turned[1:] * turned[:-1].inv()).as_euler("xyz")
        actions.append(np.concatenate([np.diff(log[:, :3], axis=0), angles, np.diff(log[:, 6:], axis=0)], 1))
    found = json.loads((made.folder / "manifest.json").read_text())["trajectories"]
    assert found == made.trajectories
    assert (found["records"], found["fps"]) == (len(GOOD), None)
    for kind, logs in (("states", states), ("actions", actions)):
        rows = np.concatenate(logs)
        assert found[kind]["count"] == len(rows)
        plain = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
        for name, expected in plain.items():  # float64 in another order
            np.testing.assert_allclose(found[kind][name], expected, atol=1e-12, err_msg=f"{kind} {name}")


def test_a_data_set_of_videos_has_no_such_columns(shards: Manifest) -> None:
    assert shards.trajectories is None
    assert not [name for name in shards.described if name.partition(".")[0] in ("states", "times", "extrinsics")]
    with pytest.raises(UserError, match=r"no trajectories.*--trajectories droid"):
        read_trajectory(shards, 0)


def test_the_same_bytes_from_any_number_of_workers_and_again(droid: Path, made: Manifest, tmp_path: Path) -> None:
    settings = Settings(trajectories="droid", shard_records=3)
    make_shards(droid, tmp_path / "out", settings, workers=1, progress=quiet)
    assert contents(tmp_path / "out") == contents(made.folder)
    assert make_shards(droid, tmp_path / "out", settings, workers=1, progress=quiet).existed
    making.begin(droid, tmp_path / "parts", settings)
    for step in (making.probe, making.write):  # each as another process would: by what is in the folder
        for index in range(2):
            step(making.Work.open(tmp_path / "parts"), making.Part(index, 2), workers=1, progress=quiet)
        making.plan(making.Work.open(tmp_path / "parts"))
    making.finish(making.Work.open(tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(made.folder)
    with pytest.raises(UserError, match="OUT holds another data set: settings differ"):
        make_shards(droid, tmp_path / "out", replace(settings, view="wrist"), workers=1, progress=quiet)


def test_retimed_videos_show_frame_k_at_step_k(droid: Path, made: Manifest, tmp_path: Path) -> None:
    make_shards(droid, tmp_path / "out", Settings(trajectories="droid", retime=True), workers=1, progress=quiet)
    retimed = Manifest.open(tmp_path / "out")
    assert retimed.records == made.records + 1
    known = {record: json.loads(retimed.read(record, "json"))["trajectory"] for record in range(retimed.records)}
    (record,) = (record for record, about in known.items() if about["folder"] == "Lab/broken/clocks")
    log = read_trajectory(retimed, record)
    assert log.times_s == pytest.approx((jittered_ms() - jittered_ms()[0]) / 1000, abs=1e-9)
    data = retimed.read(record)
    for step, time_s in enumerate(log.times_s):
        (picture,) = decode_clip(data, times_s=[float(time_s)])
        assert number_of(picture) == step
    assert checked(tmp_path / "out", decode=True) == []


# -- check ----------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_what_was_made(made: Manifest) -> None:
    assert checked(made.folder, decode=True) == []


def put(folder: Path, member: str, data: bytes) -> None:
    """Other bytes for a member of record 0, of the same length, and checksums to match."""
    manifest = Manifest.open(folder)
    offset, size = (int(manifest.column(f"{member}.{part}")[0]) for part in ("offset", "size"))
    assert len(data) == size
    path = folder / manifest.shard_of(0).name
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    tree = json.loads((folder / "manifest.json").read_text())
    summed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    tree["shards"][0]["sha256"] = summed.stdout.split()[0]
    joined = "\n".join(shard["sha256"] for shard in tree["shards"])
    total = subprocess.run(["sha256sum"], input=joined, capture_output=True, text=True, check=True)
    tree["identity"] = total.stdout.split()[0]
    (folder / "manifest.json").write_text(json.dumps(tree))


def npy(array: np.ndarray, **how: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def _states(manifest: Manifest) -> np.ndarray:
    return np.load(io.BytesIO(manifest.read(0, "states"))).copy()


def _with_nan(manifest: Manifest) -> bytes:
    states = _states(manifest)
    states[3, 2] = np.nan
    return npy(states)


def _slower(manifest: Manifest) -> bytes:
    return npy(np.load(io.BytesIO(manifest.read(0, "times"))) * 4)


def _pickle(manifest: Manifest) -> bytes:
    """An array of objects: NumPy would run the pickle in it, were it allowed to."""
    data = npy(np.array([os.getcwd], object), allow_pickle=True)
    return data.ljust(len(manifest.read(0, "states")), b"\0")


LIES = {
    "nan": ("states", _with_nan, "non-finite states: at step 3"),
    "transposed": ("states", lambda m: npy(_states(m).reshape(7, -1)), "shapes disagree"),
    "pickle": ("states", _pickle, "unreadable array: states"),
    "no array": ("times", lambda m: bytes(len(m.read(0, "times"))), "unreadable array: times"),
    "slow": ("times", _slower, "clocks disagree"),
}


@pytest.mark.parametrize("kind", LIES)
def test_states_that_lie_are_named_by_check_and_refused_by_the_reader(
    kind: str, made: Manifest, tmp_path: Path
) -> None:
    member, lie, expected = LIES[kind]
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    put(folder, member, lie(made))
    (line,) = checked(folder)
    assert line.startswith(f"shard-000000.tar: record {made.key(0)}: {expected}")
    with pytest.raises(UserError, match=f"shard-000000.tar: record {made.key(0)}: {expected}"):
        read_trajectory(Manifest.open(folder), 0)


def test_check_knows_where_states_lie(made: Manifest, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "copy")
    change_column(tmp_path / "copy", "states.offset", 1, int(made.column("times.offset")[1]))
    found = checked(tmp_path / "copy")
    assert found[0] == f"shard-000000.tar: record {made.key(1)}: its states are elsewhere in the shard"


# -- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trajectories", "droid", "--segment", "2"], "states would have to be cut with the video"),
        (["--trajectories", "droid", "--transcode", "64"], "a constant rate would lose the log's times"),
        (["--retime"], "give --trajectories droid"),
        (["--view", "left"], "give --trajectories droid"),
        (["--trajectories", "bridge"], "invalid choice: 'bridge'"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, droid: Path, tmp_path: Path) -> None:
    run = tool("make_shards", droid, tmp_path / "out", *flags, check=False)
    assert run.returncode == 2
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_trajectories(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trajectories in this folder"):
        make_shards(videos, tmp_path / "out", Settings(trajectories="droid"), workers=1, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_list_of_trajectories(droid: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{droid / GOOD[1]} 0\n{droid / GOOD[3]} 1\n{tmp_path / 'nowhere'} 1\n")
    settings = Settings(trajectories="droid")
    make_shards(tmp_path / "list", tmp_path / "out", settings, workers=1, progress=quiet)
    listed = Manifest.open(tmp_path / "out")
    known = [json.loads(listed.read(record, "json")) for record in range(listed.records)]
    assert {k["trajectory"]["folder"]: k["label"] for k in known} == {
        str(droid / GOOD[1]): "0",
        str(droid / GOOD[3]): "1",
    }
    (row,) = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert (row["path"], row["reason"]) == (str(tmp_path / "nowhere"), "unreadable")
    (tmp_path / "parts.csv").write_text(f"path,start\n{droid / GOOD[1]},1\n")
    with pytest.raises(UserError, match="a part of a trajectory"):
        make_shards(tmp_path / "parts.csv", tmp_path / "parts", settings, workers=1, progress=quiet)


def test_duplicates_and_short_ones_are_rejected_by_their_folders(tmp_path: Path) -> None:
    good(tmp_path / "root" / "a")
    good(tmp_path / "root" / "short", steps=30)
    shutil.copytree(tmp_path / "root" / "a", tmp_path / "root" / "b")
    settings = Settings(trajectories="droid", min_s=2.5)
    summary = make_shards(tmp_path / "root", tmp_path / "out", settings, workers=1, progress=quiet)
    assert summary.clips == 1
    assert list(read_jsonl(tmp_path / "out" / "rejected.jsonl")) == [
        {"path": "short", "reason": "too short", "detail": "2.000 s"},
        {"path": "b", "reason": "duplicate", "detail": f"of a/recordings/MP4/{SERIALS['ext1']}.mp4"},
    ]


def test_trajectories_inside_others(tmp_path: Path) -> None:
    for name in ("a", "a/recordings/b", "ab", "."):
        good(tmp_path / "root" / name)
    _, found = find_trajectories(tmp_path / "root", tmp_path / "out")
    assert sorted(source.path for source in found) == [".", "a", "a/recordings/b", "ab"]


def test_a_log_that_changes_while_shards_are_made(droid: Path, tmp_path: Path) -> None:
    """The states must be those that were looked at."""
    good(tmp_path / "root" / "a")
    work = making.begin(tmp_path / "root", tmp_path / "out", Settings(trajectories="droid"))
    assert work is not None
    making.probe(work, making.Part(0, 1), workers=1, progress=quiet)
    making.plan(work)
    with h5py.File(tmp_path / "root" / "a" / "trajectory.h5", "r+") as file:
        file[GRIPPER][3] = 0.5
    with pytest.raises(UserError, match="has changed since it was probed"):
        making.write(work, making.Part(0, 1), workers=1, progress=quiet)
