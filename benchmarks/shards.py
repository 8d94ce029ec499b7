"""Compares make_shards, which copies files unchanged, with tar on the same files.

    tar               tar cf, then fsync, as make_shards does
    tar and sha256    also the checksum of the archive, as in a manifest
    write             make_shards from its plan to the manifest: shards with JSON for each video, checksums, columns
    all of it         also the probe, which decodes every file as a whole (short here: see below)

Prints seconds of wall time and of CPU (of all processes), the best of --rounds, and megabytes of video per second from
the page cache. tar is one process, make_shards has --workers. The videos have the size of real ones and decode as fast
as possible: eight tiny frames, and a box of random bytes that players skip.

    python benchmarks/shards.py --files 100 --mb 400 --workers 1

With --records N, measures instead the single-process steps for a data set of N records, with synthetic verdicts.

    plan      verdicts -> positions of records (1 in 1,000 is a duplicate, 1 in 100 was rejected)
    finish    columns and manifest, of shards of 1,000 records (their tars are empty files here)
    open      Manifest.open, then one key and one position, as each rank does at its start

Each runs in a separate process: seconds, and peak memory beyond its imports (anonymous pages, without pages mapped from
files, which the system may drop). It needs 1 kB of disk per record.

    python benchmarks/shards.py --records 20000000
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil

from vjepa_scale.core.errors import run_command
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Settings, Work, finish, make_shards
from vjepa_scale.shards.plan import Plan, plan
from vjepa_scale.shards.probe import probed
from vjepa_scale.shards.records import Record, Rejected, Verdict, verdict_tree
from vjepa_scale.video.inspect import VideoFacts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--mb", type=int, default=300, help="of all files together")
    parser.add_argument("--shard-mb", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="a folder on the disk in question (default: the temporary one)")
    parser.add_argument("--records", type=int, metavar="N", help="plan and open a data set of N records")
    arguments = parser.parse_args(argv)
    if arguments.records is not None:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
            _at_scale(arguments.records, Path(name) / "out")
        return 0
    if shutil.which("tar") is None:
        sys.exit("there is no tar to compare with")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder, videos = Path(name), Path(name) / "videos"
        _make_videos(videos, arguments.files, arguments.mb * 10**6 // arguments.files)
        mb = sum(path.stat().st_size for path in videos.iterdir()) / 1e6
        taken: dict[str, list[Times]] = {}
        for _ in range(arguments.rounds):
            tar = _tar(videos, folder / "x.tar")
            ours = _ours(videos, folder / "shards", arguments.shard_mb, arguments.workers)
            for way, times in {**tar, **ours}.items():
                taken.setdefault(way, []).append(times)
    best = {way: Times(*map(min, zip(*times, strict=True))) for way, times in taken.items()}
    print(f"{arguments.files} files of {mb / arguments.files:.1f} MB, {arguments.workers} workers\n")
    print(f"{'way':15} | {'wall s':>7} | {'MB/s':>7} | {'÷ tar':>6} | {'CPU s':>7} | {'÷ tar':>6}")
    for way, times in best.items():
        wall, cpu = best["tar"].wall_s / times.wall_s, best["tar"].cpu_s / times.cpu_s
        print(
            f"{way:15} | {times.wall_s:7.2f} | {mb / times.wall_s:7.1f} | {wall:6.2f} | {times.cpu_s:7.2f} | {cpu:6.2f}"
        )
    return 0


class Times(NamedTuple):
    """A time or a duration: wall clock, and CPU of this process and its children."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> "Times":
        cpu_s = 0.0
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
                times = child.cpu_times()
                cpu_s += times.user + times.system + times.children_user + times.children_system
        # Precision is a microsecond; psutil's is 1/100 s. The parent's time includes children that have ended.
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            cpu_s += usage.ru_utime + usage.ru_stime
        return cls(time.perf_counter(), cpu_s)

    def since(self, began: "Times") -> "Times":
        return Times(self.wall_s - began.wall_s, self.cpu_s - began.cpu_s)


def _make_videos(folder: Path, files: int, size: int) -> None:
    folder.mkdir()
    tiny = folder / "tiny.mp4"
    with av.open(str(tiny), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    video = tiny.read_bytes()
    tiny.unlink()
    for i in range(files):
        skipped = np.random.default_rng(i).bytes(size - len(video) - 8)
        (folder / f"{i:06d}.mp4").write_bytes(video + (len(skipped) + 8).to_bytes(4, "big") + b"free" + skipped)


def _tar(videos: Path, out: Path) -> dict[str, Times]:
    began = Times.now()
    subprocess.run(["tar", "cf", out, "-C", videos, "."], check=True)
    with open(out, "rb") as file:
        os.fsync(file.fileno())
        written = Times.now()
        hashlib.file_digest(file, "sha256")
    summed = Times.now()
    out.unlink()
    return {"tar": written.since(began), "tar and sha256": summed.since(began)}


def _ours(videos: Path, out: Path, shard_mb: int, workers: int) -> dict[str, Times]:
    last: dict[str, Times] = {}
    began = Times.now()

    def watch(doing: str, done: int, total: int) -> None:
        if done == total:
            last[doing] = Times.now()

    made = make_shards(videos, out, Settings(shard_mb=shard_mb), workers=workers, progress=watch)
    ended = Times.now()
    shutil.rmtree(out)
    files = sum(1 for _ in videos.iterdir())
    assert made.clips == files, f"{made.clips} of {files} files were taken"
    return {"write": ended.since(last["probing"]), "all of it": ended.since(began)}


# -- many records ------------------------------------------------------------------------------------


def _at_scale(records: int, out: Path) -> None:
    settings = Settings(shard_records=1000)
    work = Work(out, out, out, settings, source={}, files=records, chunk=1000, made_out=False)
    began = time.perf_counter()
    _pretend_probed(work)
    print(f"{records} records; verdicts written in {time.perf_counter() - began:.0f} s\n")
    print(f"{'step':8} | {'seconds':>8} | {'MB held':>8} | {'bytes a record':>14}", flush=True)
    for name, step in (("plan", plan), ("", _pretend_written), ("finish", finish), ("open", _open)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            seconds, held = pool.submit(_measured, step, work).result()
        if name:
            print(f"{name:8} | {seconds:8.2f} | {held / 1e6:8.0f} | {held / records:14.1f}", flush=True)


def _pretend_probed(work: Work) -> None:
    """Writes a verdict per source, in the format of the probe."""
    for name in ("probed", "written"):
        (work.folder / name).mkdir(parents=True)
    facts = VideoFacts(duration=10.01, fps=29.97, frames=300, width=340, height=256)
    record = Record("PATH", 1_000_000, "LABEL", facts, "SHA256")
    kept = json.dumps(verdict_tree(0, Verdict([record], [])))
    left_out = json.dumps(verdict_tree(0, Verdict([], [Rejected("PATH", "does not decode to the end", "frame 17")])))
    for chunk in range(work.chunks):
        digests = np.random.default_rng(chunk).bytes(32 * work.chunk)
        lines = []
        for n in range(work.files_in(chunk)):
            number = chunk * work.chunk + n
            digest = bytes(32) if n == 999 else digests[32 * n : 32 * n + 32]
            line = left_out if n % 100 == 50 else kept.replace("LABEL", f"class {number % 1000}")
            line = line.replace("PATH", f"class {number % 1000}/a name of the usual length, number {number:09d}.mp4")
            lines.append(line.replace("SHA256", digest.hex()).replace('"n": 0', f'"n": {n}') + "\n")
        probed(work, chunk).write_text("".join(lines))


def _pretend_written(work: Work) -> None:
    """Writes receipts of empty shards."""
    plan, first = Plan.open(work), 0
    for shard, end in enumerate(plan.ends.tolist()):
        places = [[1536 + 1_002_000 * i, 1_000_000] for i in range(end - first)]
        members = {"video": places, "json": places}
        receipt = {"bytes": 0, "sha256": f"{shard:064x}", "members": members, "trajectories": None}
        (work.folder / "written" / f"shard-{shard:06d}.json").write_text(json.dumps(receipt))
        (work.out / f"shard-{shard:06d}.tar").touch()
        first = end


def _open(work: Work) -> None:
    manifest = Manifest.open(work.out)
    manifest.key(manifest.records // 2)
    manifest.column("video.offset")[manifest.records // 3]


def _measured(step: Callable[[Work], object], work: Work) -> tuple[float, int]:
    """Returns seconds, and the peak bytes of anonymous memory above the level before the step."""
    most, done = 0, threading.Event()

    def anonymous() -> int:
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(told["RssAnon"].split()[0]) * 1024

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous())

    before, began = anonymous(), time.perf_counter()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        step(work)
        seconds = time.perf_counter() - began
    finally:
        done.set()
        thread.join()
    return seconds, max(most - before, 0)


if __name__ == "__main__":
    run_command(main)
