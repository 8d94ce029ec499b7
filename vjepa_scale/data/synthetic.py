"""A small world of moving pictures, rendered to real MP4 files, for demos and tests.

A clip is a background and two flocks of equal-sized shapes, one nearer than the other, each painted
with its own smooth texture. All shapes of a clip are of one kind, everything in it moves in one manner,
and the label is ``shape-motion``.

Why a single frame cannot tell the motion: the pose of a layer is four phases on circles (x, y, angle,
scale), each drawn uniformly; a motion lets exactly one of them advance at a constant rate. A uniform
phase plus a constant is uniform, so every frame of every motion has the same distribution. Shapes have
equal areas, and colour, texture, size and place are drawn without looking at the label.
"""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import publish_dir, read_json, remove_dir, write_json
from vjepa_scale.core.keyed import Draws

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

SHAPES = ("disc", "square", "triangle", "cross")
MOTIONS = ("sideways", "updown", "turn", "pulse")  # each is its own mirror image, so flips keep the label
LABELS = tuple(f"{shape}-{motion}" for shape in SHAPES for motion in MOTIONS)
SPLITS = ("train", "val")

TORUS = 2.2  # side of the square in which a flock lives and wraps; larger than any view of it
ZOOM = 0.25  # a layer's scale breathes between exp(-ZOOM) and exp(ZOOM)


@dataclass(frozen=True)
class World:
    """What a data set looks like. Lengths are in units of the frame's side.

    size: pixels; fps, seconds: of a clip; shapes: per flock; radius: of a disc, range over clips;
    slide: frame sides per second; turn, pulse: revolutions per second, ranges over clips.
    """

    size: int = 72
    fps: int = 8
    seconds: float = 4.0
    shapes: int = 12
    radius: tuple[float, float] = (0.13, 0.19)
    slide: tuple[float, float] = (0.25, 0.5)
    turn: tuple[float, float] = (0.1, 0.2)
    pulse: tuple[float, float] = (0.4, 0.7)

    @property
    def frames(self) -> int:
        return round(self.fps * self.seconds)


# -- pictures --------------------------------------------------------------------------------------


def signed_distance(shape: str, x: F32, y: F32) -> F32:
    """Distance to a shape's edge, negative inside, exact near the edge's straight parts.

    x, y: any equal shapes, in units in which the disc has radius 1; every shape has the disc's area, π.
    """
    if shape == "disc":
        return np.sqrt(x * x + y * y) - np.float32(1)
    x, y = np.abs(x), (y if shape == "triangle" else np.abs(y))
    if shape == "square":
        return np.maximum(x, y) - np.float32(np.sqrt(np.pi) / 2)
    if shape == "triangle":  # equilateral: inradius r, area 3·sqrt(3)·r²
        inradius = np.sqrt(np.pi / np.sqrt(27))
        return np.maximum(x * np.float32(np.sqrt(0.75)) + y * np.float32(0.5), -y) - np.float32(inradius)
    if shape == "cross":  # two bars of half-lengths 1.9a and 0.6a, area 4·(2·1.9·0.6 − 0.6²)·a²
        a = np.sqrt(np.pi / (4 * (2 * 1.9 * 0.6 - 0.6**2)))
        long, short = np.float32(1.9 * a), np.float32(0.6 * a)
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    raise AssertionError(shape)


@dataclass(frozen=True)
class _Paint:
    """Two colours mixed by a sum of plane waves: smooth, and endless in every direction."""

    low: F32  # [3]
    high: F32  # [3]
    waves: F32  # [W, 2] radians per unit
    phases: F32  # [W]

    @staticmethod
    def draw(draws: Draws, wavelength: tuple[float, float]) -> "_Paint":
        colours = draws.uniforms(6).reshape(2, 3)
        angles = 2 * np.pi * draws.uniforms(2)
        lengths = wavelength[0] + (wavelength[1] - wavelength[0]) * draws.uniforms(2)
        waves = 2 * np.pi / lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        phases = 2 * np.pi * draws.uniforms(2)
        return _Paint(*(np.float32(v) for v in (colours[0], colours[1], waves, phases)))

    def at(self, x: F32, y: F32) -> F32:
        """Colours in [0, 1] at scene points: [..., 3]."""
        mix = np.full(x.shape, 0.5, np.float32)
        for (kx, ky), phase in zip(self.waves, self.phases, strict=True):
            mix += np.float32(0.25) * np.sin(kx * x + ky * y + phase)
        return self.low + (self.high - self.low) * mix[..., None]


def render_clip(world: World, seed: int, split: str, index: int) -> tuple[U8, str]:
    """Clip ``index`` of a split: frames [T, size, size, 3] and the label. Labels take turns."""
    label = LABELS[index % len(LABELS)]
    shape, motion = label.split("-")
    draws = Draws(seed, "world", SPLITS.index(split), index)
    speeds = {
        "sideways": draws.uniform(*world.slide),
        "updown": draws.uniform(*world.slide),
        "turn": draws.uniform(*world.turn),
        "pulse": draws.uniform(*world.pulse),
    }
    rate = speeds[motion] * (1 if draws.uniform() < 0.5 else -1)
    t = np.arange(world.frames, dtype=np.float32) / np.float32(world.fps)
    radius = draws.uniform(*world.radius)

    side = (np.arange(world.size, dtype=np.float32) + np.float32(0.5)) / np.float32(world.size) - np.float32(0.5)
    screen_y, screen_x = np.meshgrid(side, side, indexing="ij")
    frames = np.empty((world.frames, world.size, world.size, 3), np.float32)

    for depth, relative_speed in enumerate((0.4, 0.7, 1.0)):
        phases = draws.uniforms(4)
        paint = _Paint.draw(draws, (0.5, 1.0) if depth == 0 else (2 * radius, 5 * radius))
        places = (draws.uniforms(2 * world.shapes).reshape(-1, 2) - 0.5) * TORUS
        turns = draws.uniforms(world.shapes)
        advance = np.float32(rate * relative_speed) * t
        slide_x = np.float32(phases[0] * TORUS) + (advance if motion == "sideways" else 0)
        slide_y = np.float32(phases[1] * TORUS) + (advance if motion == "updown" else 0)
        angle = np.float32(2 * np.pi) * (np.float32(phases[2]) + (advance if motion == "turn" else 0))
        breath = np.float32(2 * np.pi) * (np.float32(phases[3]) + (advance if motion == "pulse" else 0))
        scale = np.exp(np.float32(ZOOM) * np.sin(breath)) * np.ones_like(t)
        cos, sin = np.cos(angle) * np.ones_like(t), np.sin(angle) * np.ones_like(t)
        slide_x, slide_y = slide_x * np.ones_like(t), slide_y * np.ones_like(t)

        for k in range(world.frames):
            # screen -> scene: undo the scale, turn about the frame's centre
            sx, sy = screen_x / scale[k], screen_y / scale[k]
            x, y = cos[k] * sx + sin[k] * sy, cos[k] * sy - sin[k] * sx
            # the slide is along the screen's axes, so the shapes' turned frame sees it turned
            dx, dy = cos[k] * slide_x[k] + sin[k] * slide_y[k], cos[k] * slide_y[k] - sin[k] * slide_x[k]
            if depth == 0:
                frames[k] = paint.at(x - dx, y - dy)
                continue
            for (px, py), turn in zip(places, turns, strict=True):
                _stamp(frames[k], world, shape, radius, scale[k], px + dx, py + dy, turn, x, y, paint)
    return np.clip(frames * 255 + np.float32(0.5), 0, 255).astype(np.uint8), label


def _stamp(
    frame: F32, world: World, shape: str, radius: float, scale: float, px: float, py: float, turn: float,
    x: F32, y: F32, paint: _Paint,
) -> None:  # fmt: skip
    """Paint one shape over a frame, its edge one pixel soft. x, y: the pixels' scene points, [size, size]."""
    px = (px + TORUS / 2) % TORUS - TORUS / 2
    py = (py + TORUS / 2) % TORUS - TORUS / 2
    if px * px + py * py > (0.71 / scale + 2 * radius) ** 2:
        return
    u, v = (x - np.float32(px)) / np.float32(radius), (y - np.float32(py)) / np.float32(radius)
    near = u * u + v * v < 4
    if not near.any():
        return
    u, v = u[near], v[near]
    c, s = np.float32(np.cos(2 * np.pi * turn)), np.float32(np.sin(2 * np.pi * turn))
    edge = signed_distance(shape, c * u + s * v, c * v - s * u)
    pixels = np.float32(radius * scale * world.size)
    cover = np.clip(np.float32(0.5) - edge * pixels, 0, 1)[:, None]
    frame[near] += cover * (paint.at(u * np.float32(radius), v * np.float32(radius)) - frame[near])


# -- files -----------------------------------------------------------------------------------------


def encode_mp4(frames: U8, fps: int) -> bytes:
    """h264, yuv420p, a keyframe at least every 30 frames, from frames [T, H, W, 3]; H and W even."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "fast", "g": "30"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the bytes depend on the number of threads
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_clip(folder: Path, world: World, seed: int, split: str, index: int) -> Path:
    """Render clip ``index`` of a split to folder/<split>/<label>/NNNNN.mp4."""
    frames, label = render_clip(world, seed, split, index)
    path = folder / split / label / f"{index:05d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(frames, world.fps))
    return path


def write_videos(out: Path, world: World, *, seed: int, train: int, val: int, workers: int) -> Iterator[int]:
    """Render a data set into out/{train,val}/<label>/NNNNN.mp4; yields the number of clips done.

    The folder is whole or absent: it gets its name after the last clip. A folder that already holds
    exactly this data set (world.json says so) is left as it is; another one is a UserError.
    """
    if world.size % 2:
        raise UserError(f"{world.size} pixels: h264 wants an even size", where="--size")
    about = {"world": asdict(world), "seed": seed, "train": train, "val": val}
    total = train + val
    if out.exists():
        if read_json(out / "world.json") != json.loads(json.dumps(about)):
            raise UserError("holds another data set", where=out, fix="remove it or choose another folder")
        yield total
        return
    temporary = out.with_name(f".{out.name}.tmp")
    if temporary.exists():
        remove_dir(temporary)
    temporary.mkdir(parents=True)
    jobs = [(temporary, world, seed, split, i) for split, n in (("train", train), ("val", val)) for i in range(n)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(write_clip, *zip(*jobs, strict=True), chunksize=8), start=1):
            yield done
    write_json(temporary / "world.json", about)
    publish_dir(temporary, out)
