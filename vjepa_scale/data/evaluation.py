"""A whole data set once, in the order of its records, without chance: what probes measure on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.augment import center_crop, empty_clips
from vjepa_scale.data.clips import ClipRef, decode_ref, window
from vjepa_scale.data.loader import Prefetched
from vjepa_scale.data.manifest import MANIFEST, Manifest


def labels_of(manifest: Manifest, classes: Sequence[str] | None = None) -> Tensor:
    """The class of every record: int64 [records], an index into ``classes``.

    classes: of the task, usually the training set's ``manifest.classes``; default: this data set's own.
    Raises UserError where a record has no label, or one that is not in ``classes``.
    """
    own = torch.from_numpy(manifest.column("label").astype("int64"))
    where = manifest.folder / MANIFEST
    if (own < 0).any():
        key = manifest.key(int((own < 0).nonzero()[0, 0]))
        raise UserError(f"record {key} has no label", where=where, fix="put videos into one folder per class")
    if classes is None:
        return own
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({manifest.classes[i] for i in own.unique().tolist()} - set(number))
    if unknown:
        raise UserError(
            f"class {unknown[0]!r} is not among the {len(number)} classes of the task",
            where=where,
            fix="use data sets of the same classes",
        )
    return torch.tensor([number.get(name, -1) for name in manifest.classes])[own]


def metadata_of(manifest: Manifest, record: int) -> dict[str, Any]:
    """The JSON of a record (docs/shards.md); empty for an indexed sample that has none. Raises UserError."""
    try:
        known = json.loads(manifest.read(record, "json") or b"{}")
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(
            f"the JSON of record {manifest.key(record)} is no JSON object",
            where=manifest.folder / manifest.shard_of(record).name,
            fix="restore this shard from a copy, or make the shards again",
        )
    return known


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
