"""Which seconds of which video each slot of a step shows; from the manifests alone, nothing is decoded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.keyed import Draws
from vjepa_scale.data.decode import DecodeError, decode_clip
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase, Recipe


@dataclass(frozen=True)
class ClipRef:
    """One clip of the global batch.

    dataset: name of the data set; record: index in its manifest; start_s: seconds into the video
    """

    step: int
    slot: int
    dataset: str
    record: int
    start_s: float


def clip_refs(
    order: DataOrder,
    manifests: Mapping[str, Manifest],
    *,
    step: int,
    slots: Iterable[int],
    seed: int,
    fps: float,
    frames: int,
) -> list[ClipRef]:
    """The clips of some slots of a step.

    seed: data.seed. The window of frames/fps seconds is drawn uniformly where the video is longer; a
    shorter one starts at 0 and repeats its last picture.
    """
    datasets, records = order.batch(step)
    refs = []
    for slot in slots:
        name, record = order.names[datasets[slot]], int(records[slot])
        draw = Draws(seed, "window", step, slot).uniform()
        start_s = start_of_window(manifests[name], record, draw, fps=fps, frames=frames)
        refs.append(ClipRef(step, slot, name, record, start_s))
    return refs


def start_of_window(manifest: Manifest, record: int, draw: float, *, fps: float, frames: int) -> float:
    """Where a record's window begins, in seconds, for a uniform draw in [0, 1)."""
    room = float(manifest.column("duration")[record]) - frames / fps
    return draw * max(0.0, room)


def decode_ref(manifest: Manifest, ref: ClipRef, *, fps: float, frames: int) -> npt.NDArray[np.uint8]:
    """The pictures of a clip, uint8 [T, H, W, 3]. A UserError names data set, shard and record if it fails."""
    data = manifest.read(ref.record)
    try:
        return decode_clip(data, start_s=ref.start_s, fps=fps, frames=frames)
    except DecodeError as error:
        raise undecodable(manifest, ref, error) from None


def undecodable(manifest: Manifest, ref: ClipRef, error: DecodeError) -> UserError:
    key = manifest.key(ref.record)
    return UserError(
        f"data set {ref.dataset!r}, record {key} cannot be decoded at {ref.start_s:.3f} s: {error}",
        where=manifest.folder / manifest.shard_of(ref.record).name,
        fix="restore this shard from a copy; or shard again without that video and start a run with continue_from",
    )


def dump_order(
    recipe: Recipe, phase: Phase, order: DataOrder, manifests: Mapping[str, Manifest], step: int
) -> Iterator[str]:
    """One line per slot of a step, tabs between: step, slot, data set, record key, start time in seconds."""
    refs = clip_refs(
        order,
        manifests,
        step=step,
        slots=range(phase.global_batch),
        seed=recipe.data.seed,
        fps=recipe.data.fps,
        frames=phase.frames,
    )
    for ref in refs:
        key = manifests[ref.dataset].key(ref.record)
        yield f"{ref.step}\t{ref.slot}\t{ref.dataset}\t{key}\t{ref.start_s:.6f}"
