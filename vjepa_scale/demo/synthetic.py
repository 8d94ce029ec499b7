"""Renders a small synthetic world to MP4 files, for demos and tests.

A clip shows a sheet of equal shapes on a square lattice, which slides over a background. The background moves in the
same direction at half the speed. Each has its own smooth texture. The label is ``shape-motion``. Hidden parts can be
inferred from visible ones, because the lattice continues behind a mask. In worlds without such order tiny models learn
little but colours (docs/learning.md).

A single frame does not show the motion: the initial position of a layer is uniform over its period, and a uniform phase
plus a constant is uniform, so every frame of every motion has the same distribution. Shapes have equal areas; colour,
texture, size, speed and position are drawn independently of the label. A mirrored clip has another label (left becomes
right), so train on this world with ``data.augment.flip: 0``.

Pictures can have independent noise in each pixel of each frame. It is unpredictable, so a model that predicts features
learns to ignore it, while a model that reconstructs pixels keeps it (docs/learning.md).
"""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import publish_dir, read_json, remove_dir, write_json
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.core.worker_pool import worker_context

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

SHAPES = ("disc", "bar", "ring", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y points down, as rows do
LABELS = tuple(f"{shape}-{motion}" for shape in SHAPES for motion in MOTIONS)
SPLITS = ("train", "val")


@dataclass(frozen=True)
class World:
    """Parameters of a data set. Lengths are in units of the frame's side; pairs are ranges over clips.

    size: pixels; fps, seconds: of a clip; radius: of a disc; period: of the lattice, in radii;
    speed: frame sides per second;
    tint, texture: deviation of colours from grey, and strength of textures, as shares of a layer's range of brightness;
    noise: standard deviation of a grey value, drawn for each pixel of each frame and added to it, as a share of the
    whole range of brightness.
    """

    size: int = 72
    fps: int = 8
    seconds: float = 4.0
    radius: tuple[float, float] = (0.1, 0.16)
    period: tuple[float, float] = (3.2, 3.8)
    speed: tuple[float, float] = (0.25, 0.5)
    tint: float = 0.15
    texture: float = 0.5
    noise: float = 0.0

    @property
    def frames(self) -> int:
        return round(self.fps * self.seconds)


# -- pictures --------------------------------------------------------------------------------------


def signed_distance(shape: str, x: F32, y: F32) -> F32:
    """Returns the distance to a shape's edge, negative inside, exact near the edge's smooth parts.

    x, y: any equal shapes, in units in which the disc has radius 1; every shape has the disc's area, π,
    and reaches at most 1.62 from its centre.
    """
    if shape == "disc":
        return np.sqrt(x * x + y * y) - np.float32(1)
    if shape == "ring":  # between half of R and R, area 3/4·π·R²
        outer = np.sqrt(4 / 3)
        return np.abs(np.sqrt(x * x + y * y) - np.float32(0.75 * outer)) - np.float32(0.25 * outer)
    x, y = np.abs(x), np.abs(y)
    if shape == "bar":  # half-lengths 3a and a, area 12·a²
        a = np.sqrt(np.pi / 12)
        return np.maximum(x - np.float32(3 * a), y - np.float32(a))
    if shape == "cross":  # two bars of half-lengths 1.9a and 0.6a, area 4·(2·1.9·0.6 − 0.6²)·a²
        a = np.sqrt(np.pi / (4 * (2 * 1.9 * 0.6 - 0.6**2)))
        long, short = np.float32(1.9 * a), np.float32(0.6 * a)
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    raise AssertionError(shape)


@dataclass(frozen=True)
class Paint:
    """Two colours mixed by a sum of plane waves: smooth, and unbounded in every direction."""

    low: F32  # [3]
    high: F32  # [3]
    waves: F32  # [W, 2] radians per unit
    phases: F32  # [W]

    @staticmethod
    def draw(
        draws: KeyedRng, world: World, brightness: tuple[float, float], wavelength: tuple[float, float]
    ) -> "Paint":
        """brightness: the layer's range, around which the two colours are drawn; wavelength: of the waves"""
        middle, span = sum(brightness) / 2, brightness[1] - brightness[0]
        tones = world.texture / 2 * (draws.uniforms(2)[:, None] - 0.5) + world.tint * (draws.uniforms(3) - 0.5)
        angles = 2 * np.pi * draws.uniforms(2)
        lengths = wavelength[0] + (wavelength[1] - wavelength[0]) * draws.uniforms(2)
        waves = 2 * np.pi / lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        phases = 2 * np.pi * draws.uniforms(2)
        low, high = (middle + span * tones).astype(np.float32)
        return Paint(low, high, waves.astype(np.float32), phases.astype(np.float32))

    def at(self, x: F32, y: F32) -> F32:
        """Returns the colours in [0, 1] at scene points: [..., 3]."""
        mix = np.full(x.shape, 0.5, np.float32)
        for (kx, ky), phase in zip(self.waves, self.phases, strict=True):
            mix += np.float32(0.25) * np.sin(kx * x + ky * y + phase)
        return self.low + (self.high - self.low) * mix[..., None]


@dataclass(frozen=True)
class Scene:
    """The content of one clip, independent of its motion: two painted layers and the lattice of the shapes.

    speed: frame sides per second; lattice, shape: cosine and sine of their rotations; phases: of the lattice, in cells
    """

    radius: float
    period: float
    speed: float
    lattice: tuple[np.float32, np.float32]
    shape: tuple[np.float32, np.float32]
    phases: tuple[np.float32, np.float32]
    ground_paint: Paint
    sheet_paint: Paint

    @staticmethod
    def draw(draws: KeyedRng, world: World) -> "Scene":
        radius = draws.uniform(*world.radius)
        period = radius * draws.uniform(*world.period)
        speed = draws.uniform(*world.speed)
        lattice, shape = _cos_sin(draws.uniform()), _cos_sin(draws.uniform())
        phase_x, phase_y = (np.float32(phase) for phase in draws.uniforms(2))
        ground_paint = Paint.draw(draws, world, (0.0, 0.45), (0.5, 1.0))
        sheet_paint = Paint.draw(draws, world, (0.55, 1.0), (2 * radius, 5 * radius))
        return Scene(radius, period, speed, lattice, shape, (phase_x, phase_y), ground_paint, sheet_paint)

    def picture(
        self,
        world: World,
        shape: str | None,
        moved: tuple[np.float32, np.float32],
        ground_moved: tuple[np.float32, np.float32] | None = None,
    ) -> U8:
        """Renders one frame [size, size, 3].

        shape: of the sheet; None for the background only
        moved: displacement of the sheet (x, y), in frame sides; the background's is half of it, or ``ground_moved``
        """
        side = (np.arange(world.size, dtype=np.float32) + np.float32(0.5)) / np.float32(world.size)
        screen_y, screen_x = np.meshgrid(side, side, indexing="ij")
        moved_x, moved_y = moved
        ground_x, ground_y = (moved_x / 2, moved_y / 2) if ground_moved is None else ground_moved
        picture = self.ground_paint.at(screen_x - ground_x, screen_y - ground_y)
        if shape is not None:
            radius, period = self.radius, self.period
            # the position in a cell of the lattice, relative to the centre of its shape, which rotates with the lattice
            x, y = _turned(screen_x - moved_x, screen_y - moved_y, *self.lattice)
            x, y = (_within_cell(v, period, phase) for v, phase in zip((x, y), self.phases, strict=True))
            u, v = _turned(x, y, *self.shape)
            distance = np.float32(radius) * signed_distance(shape, u / np.float32(radius), v / np.float32(radius))
            cover = np.clip(np.float32(0.5) - distance * np.float32(world.size), 0, 1)  # an edge one pixel soft
            picture += cover[..., None] * (self.sheet_paint.at(x, y) - picture)
        return np.clip(picture * 255 + np.float32(0.5), 0, 255).astype(np.uint8)


def render_clip(world: World, seed: int, split: str, index: int) -> tuple[U8, str]:
    """Renders clip ``index`` of a split: frames [T, size, size, 3] and the label. Labels alternate."""
    label = LABELS[index % len(LABELS)]
    shape, motion = label.split("-")
    scene = Scene.draw(KeyedRng(seed, "world", SPLITS.index(split), index), world)
    frames = np.empty((world.frames, world.size, world.size, 3), np.uint8)
    for k in range(world.frames):
        x, y = (np.float32(scene.speed * k / world.fps * direction) for direction in MOTIONS[motion])
        frames[k] = scene.picture(world, shape, (x, y))
    return noisy(frames, world.noise, KeyedRng(seed, "world.noise", SPLITS.index(split), index)), label


def noisy(frames: U8, noise: float, draws: KeyedRng) -> U8:
    """Adds a random grey value to each pixel of frames [..., 3]: ``World.noise``.

    The value is the sum of four uniform 16-bit numbers, close to normal; integers are equal on every machine.
    """
    if noise == 0:
        return frames
    parts = draws.words(frames[..., 0].size).view(np.uint16).reshape(*frames.shape[:-1], 4)
    # one uniform number of n values has the variance (n² − 1) / 12
    spread = np.sqrt(4 * (2.0**32 - 1) / 12)
    added = (parts.sum(-1, dtype=np.int32) - 2 * (2**16 - 1)) * np.float32(255 * noise / spread)
    return np.clip(np.round(frames + added[..., None]), 0, 255).astype(np.uint8)


def _cos_sin(turn: float) -> tuple[np.float32, np.float32]:
    return np.float32(np.cos(2 * np.pi * turn)), np.float32(np.sin(2 * np.pi * turn))


def _turned(x: F32, y: F32, cos: np.float32, sin: np.float32) -> tuple[F32, F32]:
    return cos * x + sin * y, cos * y - sin * x


def _within_cell(place: F32, period: float, phase: np.float32) -> F32:
    """Returns a coordinate's distance from the middle of its cell, in [-period/2, period/2]."""
    cells = place / np.float32(period) + phase
    return np.float32(period) * (cells - np.round(cells))


# -- files -----------------------------------------------------------------------------------------


def encode_mp4(frames: U8, fps: int, *, preset: str = "fast") -> bytes:
    """Encodes frames [T, H, W, 3], H and W even, as h264, yuv420p, with a keyframe at least every 30 frames.

    preset: of x264; files of ``ultrafast`` are simpler, and noise in them decodes in a third of the time
    Uses a constant quantiser, because x264's rate control occasionally gave different bytes for equal frames.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "20", "preset": preset, "g": "30"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the bytes depend on the number of threads
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_clip(folder: Path, world: World, seed: int, split: str, index: int) -> Path:
    """Renders clip ``index`` of a split to folder/<split>/<label>/NNNNN.mp4."""
    frames, label = render_clip(world, seed, split, index)
    path = folder / split / label / f"{index:05d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(frames, world.fps, preset="ultrafast" if world.noise else "fast"))
    return path


class Sized(Protocol):
    """A world whose pictures have a size in pixels."""

    @property
    def size(self) -> int: ...


Rendered = TypeVar("Rendered", bound=Sized)


def write_videos(out: Path, world: World, *, seed: int, train: int, val: int, workers: int) -> Iterator[int]:
    """Renders a data set to out/{train,val}/<label>/NNNNN.mp4 (see ``write_whole``)."""
    looks = asdict(world)
    if world.noise == 0:
        del looks["noise"]  # data sets of versions without noise keep their description
    about = {"world": looks, "seed": seed, "train": train, "val": val}
    return write_whole(out, write_clip, world, about, workers=workers)


def world_of(folder: Path) -> World:
    """Returns the world of a data set of ``write_videos``."""
    looks: dict[str, Any] = read_json(folder / "world.json")["world"]
    for name in ("radius", "period", "speed"):
        looks[name] = tuple(looks[name])
    return World(**looks)


def write_whole(
    out: Path,
    write_one: Callable[[Path, Rendered, int, str, int], Path],
    world: Rendered,
    about: dict[str, Any],
    *,
    workers: int,
) -> Iterator[int]:
    """Writes all members of a rendered data set; yields the number of finished ones.

    write_one: (folder, world, seed, split, index), a top-level function of a module
    about:     content of world.json: ``seed``, ``train`` and ``val`` (numbers of members), and the world
    The folder is complete or absent: it gets its name after the last member. Leaves a folder with exactly this data set
    unchanged. Raises UserError where it holds another one.
    """
    if world.size % 2:
        raise UserError(f"{world.size} pixels: h264 wants an even size", where="--size")
    counts = {split: int(about[split]) for split in SPLITS}
    if out.exists():
        known = read_json(out / "world.json") if (out / "world.json").is_file() else None
        if known != json.loads(json.dumps(about)):
            raise UserError("holds something else", where=out, fix="remove it or choose another folder")
        yield sum(counts.values())
        return
    temporary = out.with_name(f".{out.name}.tmp")
    if temporary.exists():
        remove_dir(temporary)
    temporary.mkdir(parents=True)
    jobs = [(temporary, world, about["seed"], split, i) for split, n in counts.items() for i in range(n)]
    if workers == 1:  # starting one worker process would only cost time
        for done, job in enumerate(jobs, start=1):
            write_one(*job)
            yield done
    else:
        with ProcessPoolExecutor(workers, mp_context=worker_context(write_one.__module__)) as pool:
            for done, _ in enumerate(pool.map(write_one, *zip(*jobs, strict=True), chunksize=8), start=1):
                yield done
    write_json(temporary / "world.json", about)
    publish_dir(temporary, out)
