"""Parts, repetitions, kills, and decoders that hang or crash: the finished bytes are those of an undisturbed run."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.faulty import with_faulty_decoder
from tests.processes import LIMIT_S
from tests.shared import contents
from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.core.worker_pool import Silent, heartbeat, map_in_workers
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards import work as work_module
from vjepa_scale.shards.index import index_shards
from vjepa_scale.shards.make import Part, Settings, Work, begin, finish, make_shards, plan, probe, summarize, write
from vjepa_scale.shards.tars import TarWriter

SETTINGS = Settings(seed=3, shard_records=2)  # nine records: five shards


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    make_shards(videos, out, SETTINGS, workers=2, progress=quiet)
    return contents(out)


# A job of an array, for the steps and the part that are asked for.
JOB = """
import os, signal, sys
from pathlib import Path
from vjepa_scale.shards.make import Part, Work, probe, write

def main():
    out, step, part = Path(sys.argv[1]), {"probe": probe, "write": write}[sys.argv[2]], Part(int(sys.argv[3]), 2)
    kill_at = int(sys.argv[4])
    def progress(doing, done, total):
        if done == kill_at:
            os.killpg(0, signal.SIGKILL)
    step(Work.open(out), part, workers=2, progress=progress)

if __name__ == "__main__":
    main()
"""


def job(folder: Path, step: str, part: int, *, kill_at: int = -1) -> subprocess.Popen[str]:
    script = folder / "job.py"
    script.write_text(JOB)
    return subprocess.Popen(
        [sys.executable, script, folder / "out", step, str(part), str(kill_at)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode in (0, -signal.SIGKILL), told
    return process.returncode


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "CHUNK", 4)
    monkeypatch.setattr(work_module, "SHORT", 8)  # else a listing of 14 is a short one


@pytest.mark.slow
def test_halves_of_an_array_merge_into_one_manifest(
    videos: Path, whole: dict[str, str], tmp_path: Path, small_chunks: None
) -> None:
    """Both halves at the same time, one of them twice, and each killed once."""
    out = tmp_path / "out"
    assert begin(videos, out, SETTINGS) is not None
    assert ended(job(tmp_path, "probe", 0, kill_at=3)) != 0
    with pytest.raises(UserError, match=r"[234] of 4 stretches of the sources are not probed yet"):
        plan(Work.open(out))
    jobs = [job(tmp_path, "probe", part) for part in (0, 1, 1)]
    assert [ended(process) for process in jobs] == [0, 0, 0]
    plan(Work.open(out))
    plan(Work.open(out))
    assert ended(job(tmp_path, "write", 1, kill_at=1)) != 0
    with pytest.raises(UserError, match=r"[345] of 5 shards are not written yet"):
        finish(Work.open(out))
    jobs = [job(tmp_path, "write", part) for part in (0, 1, 0)]
    assert [ended(process) for process in jobs] == [0, 0, 0]
    finish(Work.open(out))
    summary = summarize(out)
    assert (summary.clips, summary.shards, summary.existed) == (9, 5, False)
    assert contents(out) == whole
    assert begin(videos, out, SETTINGS) is None


def test_parts_in_one_process_give_the_same_bytes(
    videos: Path, whole: dict[str, str], tmp_path: Path, small_chunks: None
) -> None:
    work = begin(videos, tmp_path / "out", SETTINGS)
    assert work is not None
    for index in (2, 0, 1):
        probe(work, Part(index, 3), workers=1, progress=quiet)
    plan(work)
    for index in (1, 0):
        write(work, Part(index, 2), workers=1, progress=quiet)
    finish(work)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("files", "chunk"), [(1, 1), (3, 1), (4, 1), (5, 2), (9, 3), (19, 5), (20, 7), (50, 7)])
def test_few_sources_are_many_chunks_too(
    files: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four chunks at most of fewer than twenty sources, that each job of an array may have some; else by seven."""
    for name, value in (("CHUNK", 7), ("SHORT", 20), ("SHARES", 4)):
        monkeypatch.setattr(work_module, name, value)
    paths = [f"{number}.mp4" for number in range(files)]
    (tmp_path / "list").write_text("\n".join(paths))
    begin(tmp_path / "list", tmp_path / "out", SETTINGS)
    work = Work.open(tmp_path / "out")
    found = [[source.path for source in work.sources(number)] for number in range(work.chunks)]
    assert found == [paths[first : first + chunk] for first in range(0, files, chunk)]
    assert [work.files_in(number) for number in range(work.chunks)] == [len(sources) for sources in found]
    assert len(list((tmp_path / "out" / ".work" / "sources").iterdir())) == work.chunks


def test_the_jobs_of_an_array_share_5000_sources_evenly(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n".join(f"{number}.mp4" for number in range(5000)))
    work = begin(tmp_path / "list", tmp_path / "out", SETTINGS)
    assert work is not None
    shares = [sum(work.files_in(chunk) for chunk in range(job, work.chunks, 64)) for job in range(64)]
    assert sum(shares) == 5000
    assert max(shares) - min(shares) <= work.chunk


def test_what_was_probed_before_a_kill_is_not_probed_again(
    videos: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "SHARES", 1)
    out = tmp_path / "out"
    begin(videos, out, SETTINGS)
    job_of_one = job(tmp_path, "probe", 0, kill_at=6)  # all sources are in one chunk
    assert ended(job_of_one) == -signal.SIGKILL
    (part,) = (out / ".work" / "probed").glob("000000.*.part")
    known = len(part.read_bytes().splitlines())
    assert known >= 6
    with open(part, "a") as file:
        file.write('{"n": 13, "rec')  # as if killed inside a line
    calls = list[tuple[str, int]]()
    make_shards(videos, out, SETTINGS, workers=1, progress=lambda doing, done, _: calls.append((doing, done)))
    assert [done for doing, done in calls if doing == "probing"] == list(range(known + 1, 15))
    assert contents(out) == whole


# One of two processes that make the same data sets at the same time, one after the other.
AT_ONCE = """
import sys, time
from pathlib import Path
from vjepa_scale.shards.make import Settings, make_shards

def main():
    folder, me, other = Path(sys.argv[1]), sys.argv[3], str(1 - int(sys.argv[3]))
    for out in ("listed", "begun"):
        (folder / f"{out} {me}").touch()
        while not (folder / f"{out} {other}").exists():
            time.sleep(0.001)
        settings = Settings(seed=3, shard_records=2)
        make_shards(Path(sys.argv[2]), folder / out, settings, workers=1, progress=lambda *_: None)

if __name__ == "__main__":
    main()
"""


def test_two_runs_at_once_end_with_the_same_bytes(
    videos: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both list the sources, a chunk each; then, in another folder, both find all of them in one chunk."""
    monkeypatch.setattr(work_module, "SHARES", 1)
    begin(videos, tmp_path / "begun", SETTINGS)
    (tmp_path / "make.py").write_text(AT_ONCE)
    commands = [[sys.executable, tmp_path / "make.py", tmp_path, videos, str(number)] for number in range(2)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        # The first to end first: one whose other has failed waits for it.
        while not (over := [run for run in runs if run.poll() is not None]):
            time.sleep(0.05)
        for run in (*over, *(run for run in runs if run not in over)):
            assert ended(run) == 0
    finally:
        for run in runs:
            run.kill()
    for out in ("listed", "begun"):
        assert contents(tmp_path / out) == whole


def test_another_process_puts_the_work_aside_while_this_one_does(
    videos: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, out = shutil.rmtree, tmp_path / "out"

    def slower(folder: Path, **how: Any) -> None:
        usual(folder, **how)
        (out / ".work.another.tmp").mkdir(exist_ok=True)

    monkeypatch.setattr(work_module.shutil, "rmtree", slower)
    make_shards(videos, out, SETTINGS, workers=1, progress=quiet)
    usual(out / ".work.another.tmp")
    assert contents(out) == whole


@pytest.mark.parametrize("place", ["_chunk", "publish_first", "_same"])
def test_another_process_finishes_while_this_one_lists(
    place: str, videos: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then removes all work, this one's listing too: before, at and behind the moment that gives it its name."""
    usual, out, others = getattr(work_module, place), tmp_path / "out", []

    def slower(*arguments: Any) -> Any:
        if not others:
            others.append(make_shards)
            make_shards(videos, out, SETTINGS, workers=1, progress=quiet)
        return usual(*arguments)

    monkeypatch.setattr(work_module, place, slower)
    make_shards(videos, out, SETTINGS, workers=1, progress=quiet)
    assert contents(out) == whole
    assert list(out.glob(".*")) == []


def test_work_that_was_not_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards were begun here"):
        Work.open(tmp_path)


def test_a_begun_data_set_of_other_settings_is_refused(videos: Path, tmp_path: Path) -> None:
    begin(videos, tmp_path / "out", SETTINGS)
    with pytest.raises(UserError, match="OUT holds another data set"):
        begin(videos, tmp_path / "out", Settings(seed=4, shard_records=2))


def test_a_list_that_is_wrong_further_down_leaves_nothing(tmp_path: Path, small_chunks: None) -> None:
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4"}\n' * 9 + "{\n")
    with pytest.raises(UserError, match=r"list\.jsonl:10: not JSON"):
        begin(tmp_path / "list.jsonl", tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


# -- decoders that hang or crash --------------------------------------------------------------------

# make_shards whose decoder is PyAV, but for videos that begin with a word: on those it hangs in C, with the
# interpreter's lock held, or crashes. The workers import this script too.
MAKE_AND_LOOK = """
import json, sys
from pathlib import Path
from vjepa_scale.core.errors import UserError
from vjepa_scale.shards import check, index
from vjepa_scale.shards.make import Settings, make_shards

def looked(folder):
    checked = check.check_shards(folder, decode=True, workers=1, progress=lambda *_: None)
    (folder / "manifest.json").unlink()
    try:
        index.index_shards(folder, workers=1, progress=lambda *_: None)
    except UserError as error:
        return {"check": checked, "index": str(error)}

def main():
    folder = Path(sys.argv[1])
    index.SILENCE_S = check.SILENCE_S = 3
    settings = Settings(decode_timeout_s=3)
    make_shards(folder / "videos", folder / "out", settings, workers=2, progress=lambda *_: None)
    print(json.dumps({word: looked(folder / word) for word in ("HANG", "DIES")}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def made_and_looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with "out", made of three videos and two that hang and crash; what check and index say of shards."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "videos").mkdir()
    for i in range(3):
        (folder / "videos" / f"{i}.mp4").write_bytes(encoded(10 + i))
    (folder / "videos" / "0 hangs.mp4").write_bytes(b"HANG" + encoded(5))
    (folder / "videos" / "1 dies.mp4").write_bytes(b"DIES" + encoded(5))
    for word in ("HANG", "DIES"):
        (folder / word).mkdir()
        with open(folder / word / "a.tar", "wb") as file:
            tar = TarWriter(file)
            place = tar.add("clip.mp4", len(encoded(10)), [encoded(10)])
            tar.close()
        index_shards(folder / word, workers=1, progress=quiet)
        with open(folder / word / "a.tar", "r+b") as file:
            file.seek(place.offset)
            file.write(word.encode())
    script = folder / "make.py"
    script.write_text(MAKE_AND_LOOK)
    run = subprocess.run(
        [sys.executable, script, folder],
        env=with_faulty_decoder(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,  # a decoder that is waited for hangs for longer
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def test_files_that_hang_or_crash_the_decoder_are_rejected_with_the_reason(
    made_and_looked: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    out = made_and_looked[0] / "out"
    rows = [(row["path"], row["reason"], row["detail"]) for row in read_jsonl(out / "rejected.jsonl")]
    assert rows == [
        ("0 hangs.mp4", "time limit", "no new frame in 3 s"),
        ("1 dies.mp4", "crashes the decoder", ""),
    ]
    shards = Manifest.open(out)
    assert {json.loads(shards.read(r, "json"))["path"] for r in range(3)} == {"0.mp4", "1.mp4", "2.mp4"}


@pytest.mark.parametrize(("word", "how"), [("HANG", "hangs in"), ("DIES", "crashes")])
def test_index_and_check_name_the_shard_whose_decoder_hangs_or_crashes(
    word: str, how: str, made_and_looked: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    said = made_and_looked[1][word]
    assert any(line.startswith(f"a.tar: a clip {how} the decoder") for line in said["check"]), said
    assert f"a.tar: a sample of this shard {how} the decoder" in said["index"]


def _wait(seconds: float) -> float:
    """Beats while it waits; a negative time is slept through in C, with the interpreter's lock held."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)
        heartbeat()
    if seconds < 0:
        ctypes.PyDLL(None).sleep(1000)
    return seconds


def test_only_a_worker_without_a_beat_is_ended() -> None:
    results = dict(map_in_workers(_wait, iter([0.0, 8.0, -1.0, 0.2]), workers=2, silence_s=4.0))
    assert isinstance(results.pop(2), Silent)
    assert results == {0: 0.0, 1: 8.0, 3: 0.2}


def test_items_are_taken_as_workers_are_free() -> None:
    taken = list[int]()

    def items() -> Iterator[float]:
        for item in range(100):
            taken.append(item)
            yield 0.0

    for number, _ in enumerate(map_in_workers(_wait, items(), workers=2)):
        assert len(taken) <= number + 3


def test_workers_end_with_whoever_wanted_them() -> None:
    results = map_in_workers(_pid, range(4), workers=2)
    _, pid = next(results)
    results.close()
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def _pid(_: int) -> int:
    return os.getpid()
