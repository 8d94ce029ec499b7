"""A whole data set once, in the order of its records, without chance: what probes measure on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vjepa_scale.data.augment import center_crop, empty_clips
from vjepa_scale.data.clips import ClipRef, decode_ref, window
from vjepa_scale.data.labels import labels_of, metadata_of
from vjepa_scale.data.loader import Prefetched
from vjepa_scale.data.manifest import Manifest


@dataclass(frozen=True)
class LabelledClips:
    """Some records of a data set, as probes want them.

    clips:    uint8 [n, 3, T, H, W]
    labels:   int64 [n], indices into the classes of the task
    classes:  the name of each clip's class
    records:  their indices in the manifest
    metadata: the JSON of each record, where it was asked for
    """

    clips: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    records: tuple[int, ...]
    metadata: tuple[dict[str, Any], ...] | None = None


def evaluation_clips(
    manifest: Manifest,
    *,
    frames: int,
    size: tuple[int, int],
    fps: float,
    batch: int,
    classes: Sequence[str] | None = None,
    records: Sequence[int] | None = None,
    metadata: bool = False,
    workers: int = 0,
) -> Iterator[LabelledClips]:
    """All records in order, ``batch`` at a time (the last fewer).

    records:  only these, in this order
    metadata: read each record's JSON too
    The window is the middle of the video, the crop the centre. Labels as in ``labels_of``. Nothing is ever shown
    in another clip's place: raises UserError where one does not decode.
    """
    labels, names = labels_of(manifest, classes), manifest.classes if classes is None else classes
    wanted = range(manifest.records) if records is None else [int(record) for record in records]
    spans = [tuple(wanted[i : i + batch]) for i in range(0, len(wanted), batch)]
    load = partial(_load_span, manifest, frames, size, fps, metadata)
    loader = Prefetched(load, spans, workers=workers, prefetch=2)
    try:
        for span, (clips, known) in zip(spans, loader, strict=True):
            own = labels[list(span)]
            yield LabelledClips(clips, own, tuple(names[i] for i in own.tolist()), span, known)
    finally:
        loader.close()


def _load_span(
    manifest: Manifest, frames: int, size: tuple[int, int], fps: float, metadata: bool, records: Sequence[int]
) -> tuple[Tensor, tuple[dict[str, Any], ...] | None]:
    clips = empty_clips(len(records), frames, size)
    for row, record in zip(clips, records, strict=True):
        times_s = window(manifest, record, 0.5, fps=fps, frames=frames)
        ref = ClipRef(0, record, manifest.folder.name, record, times_s, fps)
        center_crop(decode_ref(manifest, ref), size, out=row)
    return clips, tuple(metadata_of(manifest, record) for record in records) if metadata else None
