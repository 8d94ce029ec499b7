"""Benchmarks of data: order, transcoding, shards, loader."""

import hashlib
import math
import threading
from pathlib import Path

import pytest

from tests.benchmarks.running import Run, column, load, numbers, run_process, table
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.work import Settings, Work


def test_order(run: Run) -> None:
    sizes = ("--records", 20_000, "--shard-records", 10, "--batch", 64, "--ranks", 4, "--lanes", 1, 8)
    code, text, _ = run("order", *sizes, "--steps", 2)
    assert code == 0
    assert text.startswith("20,000 records in 2,000 shards of 5 data sets, global batch 64;\n")
    rows = table(text)
    assert [row["lanes"] for row in rows] == ["1", "8"]
    for name in ("µs per record", "first batch, ms"):
        column(rows, name)
    for average, most in zip(column(rows, "shards: mean"), column(rows, "most"), strict=True):
        assert 1 <= average <= most <= 1600  # a rank reads 16 clips a step, in 100 steps
    assert "(1,600 clips)" in text


def test_transcode(run: Run) -> None:
    sizes = ("--size", "64x48", "--seconds", 4, "--clips", 1, "--rounds", 1, "--short-side", 32)
    code, text, _ = run("transcode", *sizes)
    assert code == 0
    rows = table(text)
    assert [row["file"] for row in rows] == ["source", "same size", "short side 32"]
    assert numbers(rows[0]["CPU s per s"]) == [0]
    for name in ("MB", "÷ source", "clips/s/core", "× source"):
        column(rows, name)
    assert (rows[0]["÷ source"], rows[0]["× source"]) == ("1.00", "1.0")
    speeds, factors = column(rows, "clips/s/core"), column(rows, "× source")
    assert factors == pytest.approx([speed / speeds[0] for speed in speeds], abs=0.051)


def test_transcode_wants_videos_as_long_as_its_clips(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("transcode", "--size", "64x48", "--seconds", 3)
    assert ended.value.code == 2
    assert "--seconds: at least 4" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_beside_tar() -> None:
    """Tiny files, of which tar takes less than a hundredth of a second."""
    text = run_process("shards", "--files", 2, "--mb", 1, "--shard-mb", 1, "--rounds", 1)
    assert text.startswith("2 files of 0.5 MB, 1 workers\n")
    rows = table(text)
    assert [row["way"] for row in rows] == ["tar", "tar and sha256", "write", "all of it"]
    for name in ("MB/s", "wall s"):
        column(rows, name)
    quotients = [numbers(row[name])[0] for row in rows for name in ("÷ tar", "CPU s")]
    assert all(math.isfinite(value) and value >= 0 for value in quotients)
    for shorter, longer in ((0, 1), (2, 3)):  # each of these is the other, and more
        assert column(rows, "wall s")[shorter] <= column(rows, "wall s")[longer]


@pytest.mark.slow
def test_shards_of_many_records() -> None:
    text = run_process("shards", "--records", 2000)
    assert text.startswith("2000 records; ")
    rows = table(text)
    assert [row["step"] for row in rows] == ["plan", "finish", "open"]
    assert column(rows[:2], "seconds")
    for row in rows:
        held, a_record = numbers(row["MB held"])[0], numbers(row["bytes a record"])[0]
        assert 0 <= held < 100
        assert a_record == pytest.approx(held * 1e6 / 2000, abs=0.6e6 / 2000)


def test_shards_counts_little_time() -> None:
    """Less than the hundredths of a second in which psutil counts: tar of small files took 0 s, and was divided by."""
    times = load("shards").Times
    for _ in range(20):
        began = times.now()
        hashlib.sha256(bytes(10**5))
        taken = times.now().since(began)
        assert taken.cpu_s > 0
        assert taken.wall_s > 0


def test_shards_pretends_what_planning_and_finishing_read(tmp_path: Path) -> None:
    shards = load("shards")
    work = Work(*[tmp_path / "out"] * 3, Settings(shard_records=100), {}, files=1000, chunk=500, made_out=False)
    shards._pretend_probed(work)
    for step in (shards.plan, shards._pretend_written, shards.finish, shards._open):
        step(work)
    manifest = Manifest.open(work.out)
    # Of the first 1,000 one in 100 was rejected. (There is one duplicate in a whole chunk of 1,000.)
    assert manifest.records == 990
    assert list(manifest.records_per_shard) == [100] * 9 + [90]


def test_shards_says_what_failed() -> None:
    """A thread watches the memory meanwhile: it must not hold up the error for ever."""
    before = threading.active_count()

    def fails(_: object) -> None:
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        load("shards")._measured(fails, None)
    assert threading.active_count() == before


DECORD = '''
"""Stands in for decord, with what benchmarks/loader.py calls, by PyAV."""

import av
import numpy as np


class Batch:
    def __init__(self, pictures):
        self._pictures = pictures

    def asnumpy(self):
        return np.stack(self._pictures)


class VideoReader:
    def __init__(self, path, num_threads, ctx):
        with av.open(path) as container:
            self._rate = float(container.streams.video[0].average_rate)
            self._frames = list(container.decode(video=0))

    def get_avg_fps(self):
        return self._rate

    def get_batch(self, wanted):
        return Batch([self._frames[min(int(i), len(self._frames) - 1)].to_ndarray(format="rgb24") for i in wanted])


def cpu(number):
    return number
'''


@pytest.mark.slow
def test_loader(tmp_path: Path) -> None:
    (tmp_path / "decord.py").write_text(DECORD)
    sizes = ("--frames", 4, "--clips", 1, "--rounds", 1, "--videos", 1, "--seconds", 1)
    text = run_process("loader", *sizes, PYTHONPATH=tmp_path)
    rows = table(text)
    ways = ["bare decoder", "ours", "torchcodec", "webdataset", "published"]
    if "torchcodec is not installed" in text:
        ways.remove("torchcodec")
    assert [row["way"] for row in rows] == ways
    assert {row["frames"] for row in rows} == {"4"}
    column(rows, "peak MB", above=10)
    rates, ratios = column(rows, "clips/s/core"), column(rows, "÷ bare")
    assert column(rows, "best") == rates  # of one round
    assert ratios == pytest.approx([rate / rates[0] for rate in rates], abs=0.001)
