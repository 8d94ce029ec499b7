"""Compares our loader with the bare decoder, a plain webdataset pipeline, and the published code, on the same files.

    bare decoder   PyAV on bytes in memory: seek, decode, RGB arrays. No crop, no batch: the lower bound
    ours           PhaseLoader in this process: order, shard read, the same decoding, crop, batch, masks
    torchcodec     the same with data.decoder: torchcodec (where it is installed)
    webdataset     webdataset.WebDataset over the same shards in their order, the bare decoder, our crop, batches
    published      decord on files with its own threads, stride 30 // 4, float32 crop, normalised (where decord is)

Clips have 4 frames per second, at random times of generated videos: 640×360, 30 frames per second, a keyframe every 30
frames, sliding texture with grain. The n-th clip begins at the same second in each variant. Each variant runs in its
own forked process, in turns. Prints clips per second of process CPU time (all threads), median and best of --rounds;
the median of a round's rate ÷ the bare decoder's in the same round, because CPU time also varies on a busy machine; and
the peak memory of the process, imports included.

    python benchmarks/loader.py --frames 16 64 --clips 8 --rounds 3
"""

import argparse
import importlib.util
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
import webdataset
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn import functional

from vjepa_scale.core.errors import run_command
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.augment import random_box, random_crop
from vjepa_scale.data.clips import clip_refs
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase, Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe

ROOT = Path(__file__).parents[1]
FPS, BATCH, CROP = 4, 2, 256
HEIGHT, WIDTH, RATE, KEYFRAME_EVERY = 360, 640, 30, 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--clips", type=int, default=8, help="of 16 frames, timed per round; fewer of longer ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=20, help="of each video")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    ways = dict(WAYS)
    for package, needs_it in (("decord", "published"), ("torchcodec", "torchcodec")):
        if importlib.util.find_spec(package) is None:
            del ways[needs_it]
            print(f"{package} is not installed: {needs_it} is left out")
    with tempfile.TemporaryDirectory() as folder:
        _in_fork(_make_data, Path(folder), arguments.videos, arguments.seconds)
        print(f"{'frames':>6} | {'way':12} | {'clips/s/core':>12} | {'best':>6} | {'÷ bare':>6} | {'peak MB':>7}")
        for frames in arguments.frames:
            clips = max(2 * BATCH, arguments.clips * 16 // frames // BATCH * BATCH)
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, way in ways.items():
                    results[name].append(_in_fork(_measured, way, Path(folder), frames, clips))
            bare = [rate for rate, _ in results["bare decoder"]]
            for name, runs in results.items():
                rates, peaks = zip(*runs, strict=True)
                ratio = median(rate / beside for rate, beside in zip(rates, bare, strict=True))
                row = f"{frames:6} | {name:12} | {median(rates):12.3f} | {max(rates):6.3f} | {ratio:6.3f}"
                print(f"{row} | {max(peaks):7.0f}", flush=True)
    return 0


def _in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a forked process, so that memory and threads do not affect the next; returns its result."""
    context = get_context("fork")
    here, there = context.Pipe()

    def run(out: Connection) -> None:
        out.send(function(*arguments))

    process = context.Process(target=run, args=(there,))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed") from None
    process.join()
    return result


def _measured(way: Callable[..., Iterator[int]], folder: Path, frames: int, clips: int) -> tuple[float, float]:
    """Returns clips per second of CPU time, after a warm-up batch; and peak resident memory, MB."""
    done = way(folder, frames, clips + BATCH)
    warm = 0
    while warm < BATCH:
        warm += next(done)
    began = time.process_time()
    timed = sum(done)
    return timed / (time.process_time() - began), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- the data --------------------------------------------------------------------------------------


def _make_data(folder: Path, videos: int, seconds: int) -> None:
    (folder / "videos").mkdir()
    for i in range(videos):
        _encode(folder / "videos" / f"{i}.mp4", seconds * RATE, np.random.default_rng(i))
    command = [sys.executable, ROOT / "tools" / "make_shards.py", folder / "videos", folder / "shards"]
    subprocess.run(
        [*map(str, command), "--shard-records", "2", "--workers", "1"],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _encode(path: Path, frames: int, rng: np.random.Generator) -> None:
    """Encodes two sliding layers of smooth texture, with grain."""
    layers = [
        np.sum([_texture(rng, 2 * HEIGHT, 2 * WIDTH, cell) * cell for cell in (8, 32, 128)], 0) / 168 * 150 + 50
        for _ in range(2)
    ]
    grain = rng.normal(0, 2, (8, HEIGHT, WIDTH, 1))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_EVERY
        for i in range(frames):
            x, y = (int(extent / 2 * (1 + np.sin(i / 97 + phase))) for extent, phase in ((WIDTH, 0), (HEIGHT, 1)))
            image = layers[0][y : y + HEIGHT, x : x + WIDTH].copy()
            image[90:270, 160:480] = layers[1][HEIGHT - y // 2 :, WIDTH - x // 2 :][:180, :320]
            image = np.clip(image + grain[i % 8], 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def _texture(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Returns smooth noise in [0, 1] with features about ``cell`` pixels wide: float32 [height, width, 3]."""
    coarse = torch.from_numpy(rng.random((1, 3, height // cell + 2, width // cell + 2), dtype=np.float32))
    smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return smooth[0].permute(1, 2, 0).numpy()


def _recipe(folder: Path, frames: int, clips: int, decoder: str = "pyav") -> Recipe:
    stage = {"clip": {"frames": frames, "size": CROP}, "global_batch": BATCH, "micro_batch": BATCH}
    tree = {
        "run": {"dir": "unused"},
        "data": {
            "sets": {"videos": {"path": str(folder / "shards")}},
            "fps": FPS,
            "decoder": decoder,
            "workers": 0,
            "lanes": 2,
        },
        "model": {"encoder": "vit_large"},
        "masks": {"group": BATCH},
        "pretrain": {"steps": clips // BATCH, "phases": [{"name": "all", "start_lr": 1e-4}], **stage},
    }
    return validate_recipe(tree, source="benchmarks/loader.py")


def _planned(folder: Path, frames: int, clips: int, decoder: str = "pyav") -> tuple[Recipe, Phase, DataOrder, Manifest]:
    recipe = _recipe(folder, frames, clips, decoder)
    (phase,) = stages_of(recipe)["pretrain"].phases
    manifest = Manifest.open(folder / "shards")
    order = DataOrder(seed=0, sets=[("videos", manifest.records_per_shard)], phases=[phase], lanes=recipe.data.lanes)
    return recipe, phase, order, manifest


def _windows(folder: Path, frames: int, clips: int) -> list[tuple[int, float]]:
    """Returns (record, start in seconds) of every clip that our loader loads."""
    recipe, phase, order, manifest = _planned(folder, frames, clips)
    return [
        (ref.record, ref.start_s)
        for step in range(phase.first, phase.end)
        for ref in clip_refs(recipe.data, phase, order, {"videos": manifest}, step=step, slots=range(BATCH))
    ]


# -- the variants: each yields the number of loaded clips ------------------------------------------


def _bare(folder: Path, frames: int, clips: int) -> Iterator[int]:
    manifest = Manifest.open(folder / "shards")
    data = [manifest.read(record) for record in range(manifest.records)]
    for record, start_s in _windows(folder, frames, clips):
        _plain_decode(data[record], start_s, frames)
        yield 1


def _ours(folder: Path, frames: int, clips: int, decoder: str = "pyav") -> Iterator[int]:
    recipe, phase, order, manifest = _planned(folder, frames, clips, decoder)
    with PhaseLoader(
        stage=stages_of(recipe)["pretrain"],
        phase=phase,
        order=order,
        manifests={"videos": manifest},
        dp_rank=0,
        dp_world_size=1,
        first_step=phase.first,
    ) as loader:
        for step_batch in loader:
            yield sum(len(micro_batch.clips) for micro_batch in step_batch)


def _webdataset(folder: Path, frames: int, clips: int) -> Iterator[int]:
    augment = _recipe(folder, frames, clips).data.augment
    windows, number = _windows(folder, frames, clips), count()

    def clip(sample: dict[str, Any]) -> Tensor:
        n = next(number) % len(windows)  # batched() reads one more sample before it yields the last batch
        pictures = list(_plain_decode(sample["mp4"], windows[n][1], frames))
        return random_crop(pictures, (CROP, CROP), augment, seed=0, step=n // BATCH, slot=n % BATCH)

    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    batches = webdataset.WebDataset(shards, shardshuffle=False).repeat().map(clip).batched(BATCH, torch.stack)
    for _, batch in zip(range(clips // BATCH), batches, strict=False):
        yield len(batch)


def _published(folder: Path, frames: int, clips: int) -> Iterator[int]:
    import decord

    augment = _recipe(folder, frames, clips).data.augment
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) * 255 for v in (augment.mean, augment.std))
    paths = cycle(sorted((folder / "videos").iterdir()))
    ready: list[Tensor] = []
    for n, (_, start_s) in enumerate(_windows(folder, frames, clips)):
        reader = decord.VideoReader(str(next(paths)), num_threads=-1, ctx=decord.cpu(0))
        stride = int(np.ceil(reader.get_avg_fps())) // FPS
        wanted = int(start_s * RATE) + stride * np.arange(frames)
        pictures = torch.tensor(reader.get_batch(wanted).asnumpy(), dtype=torch.float32).permute(3, 0, 1, 2)
        top, left, height, width = random_box(augment, KeyedRng(0, "crop", n), *pictures.shape[2:])
        crop = pictures[:, :, top : top + height, left : left + width]
        crop = functional.interpolate(crop, size=(CROP, CROP), mode="bilinear", align_corners=False)
        if n % 2:
            crop = crop.flip(-1)
        ready.append((crop - mean) / std)
        if len(ready) == BATCH:
            yield len(torch.stack(ready))
            ready = []


def _plain_decode(data: bytes, start_s: float, frames: int) -> np.ndarray:
    """Decodes the pictures at start_s, start_s + 1/4, …: uint8 [T, H, W, 3], with PyAV only, without our code."""
    times = [start_s + k / FPS for k in range(frames)]
    shown: list[av.VideoFrame] = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(start_s / float(stream.time_base)), stream=stream)
        current = None
        for frame in container.decode(stream):
            while current is not None and len(shown) < frames and frame.time > times[len(shown)]:
                shown.append(current)
            if len(shown) == frames:
                break
            current = frame
    shown += [current] * (frames - len(shown))
    reformatter = VideoReformatter()
    return np.stack([reformatter.reformat(f, format="rgb24", threads=1).to_ndarray() for f in shown])


WAYS: dict[str, Callable[[Path, int, int], Iterator[int]]] = {
    "bare decoder": _bare,
    "ours": _ours,
    "torchcodec": partial(_ours, decoder="torchcodec"),
    "webdataset": _webdataset,
    "published": _published,
}


if __name__ == "__main__":
    run_command(main)
