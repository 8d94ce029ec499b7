"""Selects which seconds (or frames) of which video each slot of a step shows; finds videos shorter than a clip."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase
from vjepa_scale.recipe.schema import DataConfig
from vjepa_scale.video.container import NOT_A_VIDEO, DecodeError
from vjepa_scale.video.decode import PYAV, decode_clip, times_of_frames

# New columns go to the end, because readers may index columns by position.
DUMPED = ("step", "slot", "data set", "record", "start in seconds", "frames", "frames per second", "stage")


@dataclass(frozen=True)
class ClipRef:
    """One clip of the global batch.

    dataset: name of the data set; record: index in its manifest
    times_s: time of each of its frames in the video, seconds, ascending
    fps:     requested frames per second, with the slot's jitter
    numbers: frame numbers in the video, where the recipe samples by stride; times_s then assumes a constant rate
    source_frames: number of frames of the video, where ``numbers`` is given
    """

    step: int
    slot: int
    dataset: str
    record: int
    times_s: tuple[float, ...]
    fps: float
    numbers: tuple[int, ...] | None = None
    source_frames: int | None = None

    @property
    def start_s(self) -> float:
        return self.times_s[0]


def clip_refs(
    data: DataConfig,
    phase: Phase,
    order: DataOrder,
    manifests: Mapping[str, Manifest],
    *,
    step: int,
    slots: Iterable[int],
) -> list[ClipRef]:
    """Returns the clips of some slots of a step of a phase. data: the stage's data config

    A clip has its data set's number of frames and its data set's rate times the slot's jitter. Its window is drawn
    uniformly.
    """
    seed = data.seed
    datasets, records = order.batch(step)
    refs = []
    for slot in slots:
        name, record = order.names[datasets[slot]], int(records[slot])
        fps = data.fps_of(name) * _jitter(data.augment.rate, KeyedRng(seed, "rate", step, slot))
        draw = KeyedRng(seed, "window", step, slot).uniform()
        ref = ClipRef(step, slot, name, record, (), fps)
        frames = phase.frames_of(name)
        refs.append(with_window(ref, manifests[name], draw, frames=frames, sampling=data.sampling))
    return refs


def _jitter(limits: tuple[float, float], draws: KeyedRng) -> float:
    """Draws the factor of a clip's rate, uniform between the limits."""
    low, high = limits
    return low if low == high else low + (high - low) * draws.uniform()


def with_window(ref: ClipRef, manifest: Manifest, draw: float, *, frames: int, sampling: str) -> ClipRef:
    """Returns ``ref`` with the window of a uniform draw in [0, 1). sampling: data.sampling; images have no window."""
    source_fps = float(manifest.column("fps")[ref.record])
    if sampling == "time" or source_fps == 0:
        times_s = window(manifest, ref.record, draw, fps=ref.fps, frames=frames)
        return replace(ref, times_s=times_s, numbers=None, source_frames=None)
    source_frames = int(manifest.column("frames")[ref.record])
    numbers = strided_frames(draw, source_frames=source_frames, source_fps=source_fps, fps=ref.fps, frames=frames)
    times_s = tuple(number / source_fps for number in numbers)
    return replace(ref, times_s=times_s, numbers=numbers, source_frames=source_frames)


def window(manifest: Manifest, record: int, draw: float, *, fps: float, frames: int) -> tuple[float, ...]:
    """Returns the times, in seconds into the video, of the frames of a clip.

    draw: uniform in [0, 1): the position of a window of frames/fps seconds in a longer video. In a shorter one the
          window begins at 0, and decoding repeats the last picture
    """
    start_s = draw * max(0.0, float(manifest.column("duration")[record]) - frames / fps)
    return tuple(start_s + k / fps for k in range(frames))


class Timed(Protocol):
    """Receives the clip that is being read, then decoded."""

    def reading(self, ref: ClipRef) -> None: ...

    def decoding(self, ref: ClipRef) -> AbstractContextManager[Any]: ...


def decode_ref(manifest: Manifest, ref: ClipRef, timed: Timed | None = None) -> list[npt.NDArray[np.uint8]]:
    """Decodes a clip: T pictures, uint8 [H, W, 3]. Raises UserError naming data set, shard and record if that fails."""
    if timed is not None:
        timed.reading(ref)
    data = manifest.read(ref.record)
    try:
        return pictures_of(ref, data, timed=timed)
    except DecodeError as error:
        raise undecodable(manifest, ref, error) from None


def pictures_of(
    ref: ClipRef, data: bytes, *, decoder: str = PYAV, timed: Timed | None = None
) -> list[npt.NDArray[np.uint8]]:
    """Decodes a clip from its video's bytes: T pictures, uint8 [H, W, 3]. Raises DecodeError."""
    with timed.decoding(ref) if timed is not None else nullcontext():
        return decode_clip(data, times_s=_times_of(ref, data), decoder=decoder)


def _times_of(ref: ClipRef, data: bytes) -> Sequence[float]:
    if ref.numbers is None:
        return ref.times_s
    try:
        return times_of_frames(data, ref.numbers, frames=ref.source_frames)
    except DecodeError as error:
        if error.reason != NOT_A_VIDEO:
            raise
        return ref.times_s  # earlier versions stored AVIF images as videos


def undecodable(manifest: Manifest, ref: ClipRef, error: DecodeError) -> UserError:
    key = manifest.key(ref.record)
    return UserError(
        f"data set {ref.dataset!r}, record {key} cannot be decoded at {ref.start_s:.3f} s: {error}",
        where=manifest.folder / manifest.shard_of(ref.record).name,
        fix="restore this shard from a copy; or shard again without that video and start a run with continue_from",
    )


def dump_order(
    data: DataConfig, phase: Phase, order: DataOrder, manifests: Mapping[str, Manifest], step: int
) -> Iterator[str]:
    """Yields one line per slot of a step: the columns of DUMPED, separated by tabs."""
    for ref in clip_refs(data, phase, order, manifests, step=step, slots=range(phase.global_batch)):
        key = manifests[ref.dataset].key(ref.record)
        times = f"{ref.start_s:.6f}\t{len(ref.times_s)}\t{ref.fps:.9g}"
        yield f"{ref.step}\t{ref.slot}\t{ref.dataset}\t{key}\t{times}\t{phase.stage}"


# -- ``data.sampling: stride``: frames at equal distances, as in the published code ------------------

# A rate measured from rounded timestamps (30.004) must not be rounded up to 31.
_RATE_TOLERANCE = 0.01


def strides(source_fps: float | npt.NDArray[np.float64], fps: float) -> npt.NDArray[np.int64]:
    """Returns the stride in source frames for videos of these rates, before frames are spread over the window."""
    return np.asarray(np.maximum(1, np.ceil(np.asarray(source_fps) - _RATE_TOLERANCE) // fps), np.int64)


def strided_frames(draw: float, *, source_frames: int, source_fps: float, fps: float, frames: int) -> tuple[int, ...]:
    """Returns the frame numbers of a clip of T frames, from 0 in display order, never past the video's last frame.

    draw: uniform in [0, 1): the window's position in the video
    source_frames, source_fps: of the video; fps, frames: requested, frames = T
    As published (src/datasets/video_dataset.py, one clip per video, without overlap): the stride is ⌈source fps⌉ // fps
    and the window has T·stride frames. T numbers are spread evenly over it, first and last included, so they are
    T·stride/(T−1) apart. In a video no longer than the window, as many of the T frames as its length has strides are
    spread over it, and its last frame fills the rest. The published code fails where the stride is 0; here the stride
    is at least 1.
    """
    stride = int(strides(source_fps, fps))
    length = frames * stride
    if source_frames > length:
        first = int(draw * (source_frames - length))
        numbers = np.linspace(first, first + length, num=frames).clip(first, first + length - 1)
    else:
        spread = np.linspace(0, source_frames, num=source_frames // stride)[:frames]
        numbers = np.append(spread, [source_frames] * (frames - len(spread))).clip(0, source_frames - 1)
    return tuple(numbers.astype(int).tolist())


# -- videos shorter than a clip, whose last picture is repeated ------------------------------------


@dataclass(frozen=True)
class ShortVideos:
    """How many of a data set's records repeat their last picture in a clip. frames, fps: of its clips."""

    records: int
    of: int
    frames: int
    fps: float


def repeats_last(manifest: Manifest, *, frames: int, fps: float, sampling: str) -> npt.NDArray[np.bool_]:
    """Returns bool [records]: True where a clip goes past the record's end. Images have no end and are False.

    frames, fps: of a clip; sampling: data.sampling
    """
    source_fps = manifest.column("fps")
    if sampling == "stride":
        whole = manifest.column("frames") // strides(source_fps, fps)
        return np.asarray((source_fps > 0) & (whole < frames))
    duration = manifest.column("duration")
    return np.asarray((duration > 0) & (duration <= (frames - 1) / fps + 1e-9))


def short_videos(
    data: DataConfig, phase: Phase, manifests: Mapping[str, Manifest]
) -> tuple[dict[str, ShortVideos], float]:
    """Returns the short videos of each data set of a phase that has any, and their share of the phase's clips.

    data:      the stage's data config; jitter of the rate is ignored
    manifests: of the phase's data sets; a missing one counts as having no short videos
    """
    found, share = dict[str, ShortVideos](), 0.0
    for name, weight in phase.mixture.items():
        if name not in manifests:
            continue
        manifest, frames, fps = manifests[name], phase.frames_of(name), data.fps_of(name)
        records = int(repeats_last(manifest, frames=frames, fps=fps, sampling=data.sampling).sum())
        if records:
            found[name] = ShortVideos(records, manifest.records, frames, fps)
            share += weight / sum(phase.mixture.values()) * records / manifest.records
    return found, share
