"""make_shards, which keeps bytes as they are, beside tar on the same files.

    tar               tar cf, then fsync, as make_shards does
    tar and sha256    and the checksum of the archive, which a manifest has
    write             make_shards from its plan to the manifest: shards with JSON beside each video, checksums, columns
    all of it         with the probe, which decodes every file whole (short here: see below)

Seconds of wall time and of CPU (of all processes), the best of --rounds; megabytes of video per second from the page
cache. tar is one process, make_shards has --workers. The videos are as large as real ones and as quick to decode as
can be: eight tiny frames, and a box of random bytes that players skip.

    python benchmarks/shards.py --files 100 --mb 400 --workers 1
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil

from vjepa_scale.data.ingest.shards import Settings, make_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--mb", type=int, default=300, help="of all files together")
    parser.add_argument("--shard-mb", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="a folder on the disk in question (default: the temporary one)")
    arguments = parser.parse_args()
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


class Times(NamedTuple):
    """A moment, or the time between two: of the clock, and of this process with all that it started."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> "Times":
        me = psutil.Process()
        processes = [me.cpu_times(), *(child.cpu_times() for child in me.children(recursive=True))]
        # What has ended is in its parent's times for children.
        return cls(time.perf_counter(), sum(t.user + t.system + t.children_user + t.children_system for t in processes))

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


if __name__ == "__main__":
    main()
