"""Evaluation data for probes: each record of a data set once, in order, without randomness."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.data.augment import empty_clips, view_crops
from vjepa_scale.data.clips import ClipRef, decode_ref, undecodable, window
from vjepa_scale.data.loader import ClipsLost, Prefetched
from vjepa_scale.data.manifest import Manifest, labels_of, metadata_of
from vjepa_scale.data.watchdog import DecodeStatus
from vjepa_scale.video.container import DecodeError

# Batches that a worker prepares ahead.
PREFETCH = 2


@dataclass(frozen=True)
class LabelledClips:
    """A batch of labelled records for probes.

    clips:    uint8 [n·views, 3, T, H, W]: the views of a record are consecutive, segment by segment
    labels:   int64 [n], indices into the task's classes
    classes:  the name of each record's class
    records:  indices of the records in the manifest
    metadata: the JSON of each record, where requested
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
    labelled: bool = True,
    records: Sequence[int] | None = None,
    metadata: bool = False,
    workers: int = 0,
    segments: int = 1,
    crops: int = 1,
    limit_s: float = 60.0,
) -> Iterator[LabelledClips]:
    """Yields all records in order, ``batch`` at a time; the last batch may be smaller.

    labelled: False: ``labels`` are −1 and ``classes`` empty, whatever the data set has
    records:  only these, in this order
    metadata: read each record's JSON too
    segments: windows per record, evenly spread over its video (``segment_draws``); 1: its middle
    crops:    per window: 1, the centre; 3: both ends of the longer side too
    limit_s:  time limit for decoding one window, where there are workers
    Labels as in ``labels_of``. A clip is never replaced. Raises UserError naming the record where one does not
    decode, takes longer than ``limit_s``, or crashes its worker.
    """
    names = manifest.classes if classes is None else classes
    labels = torch.from_numpy(labels_of(manifest, classes)) if labelled else torch.full((manifest.records,), -1)
    wanted = range(manifest.records) if records is None else [int(record) for record in records]
    spans = [tuple(wanted[i : i + batch]) for i in range(0, len(wanted), batch)]
    board = DecodeStatus([manifest.folder.name], workers) if workers else None
    load = partial(_load_span, manifest, frames, size, fps, metadata, segments, crops, board)
    loader = Prefetched(load, spans, workers=workers, prefetch=PREFETCH, board=board, limit_s=limit_s)
    try:
        for span, (clips, known) in zip(spans, loader, strict=True):
            own = labels[list(span)]
            called = tuple(names[i] for i in own.tolist()) if labelled else ()
            yield LabelledClips(clips, own, called, span, known)
    except ClipsLost as lost:
        place, why = next(iter(lost.clips.items()))
        ref = _refs(manifest, place.record, segments, fps, frames)[place.slot]
        raise undecodable(manifest, ref, DecodeError(*why)) from None
    finally:
        loader.close()


def segment_draws(duration_s: float, window_s: float, segments: int) -> list[float]:
    """Returns the positions of windows spread evenly over a video: 0 at its start … 1 at its end.

    The video is cut into equal parts, and each part has a window in its middle. Where a part is shorter than a window,
    the windows overlap and cover the video from start to end. A single window is in the middle.
    """
    room = duration_s - window_s
    if segments == 1 or room <= 0:
        return [0.5] * segments
    part = duration_s / segments
    if part < window_s:
        return [k / (segments - 1) for k in range(segments)]
    return [(k * part + (part - window_s) / 2) / room for k in range(segments)]


def _refs(manifest: Manifest, record: int, segments: int, fps: float, frames: int) -> list[ClipRef]:
    """Returns the windows of a record; the slot of each is its index."""
    draws = segment_draws(float(manifest.column("duration")[record]), frames / fps, segments)
    return [
        ClipRef(0, slot, manifest.folder.name, record, window(manifest, record, draw, fps=fps, frames=frames), fps)
        for slot, draw in enumerate(draws)
    ]


def _load_span(
    manifest: Manifest,
    frames: int,
    size: tuple[int, int],
    fps: float,
    metadata: bool,
    segments: int,
    crops: int,
    board: DecodeStatus | None,
    records: Sequence[int],
) -> tuple[Tensor, tuple[dict[str, Any], ...] | None]:
    clips = empty_clips(len(records) * segments * crops, frames, size)
    rows = iter(clips.split(crops))
    for record in records:
        for ref in _refs(manifest, record, segments, fps, frames):
            view_crops(decode_ref(manifest, ref, timed=board), size, out=next(rows))
    return clips, tuple(metadata_of(manifest, record) for record in records) if metadata else None
