"""A whole data set once, in the order of its records, without chance: what probes measure on."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.augment import center_crop
from vjepa_scale.data.clips import ClipRef, decode_ref
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


def evaluation_clips(
    manifest: Manifest,
    *,
    frames: int,
    size: tuple[int, int],
    fps: float,
    batch: int,
    classes: Sequence[str] | None = None,
    records: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(clips uint8 [n, 3, T, H, W], labels int64 [n]) for all records in order, n = batch (the last fewer).

    records: only these, in this order
    The window is the middle of the video, the crop the centre. Labels as in ``labels_of``. Nothing is ever shown
    in another clip's place: raises UserError where one does not decode.
    """
    labels = labels_of(manifest, classes)
    wanted = range(manifest.records) if records is None else [int(record) for record in records]
    spans = [wanted[i : i + batch] for i in range(0, len(wanted), batch)]
    load = partial(_load_span, manifest, frames, size, fps)
    loader = Prefetched(load, spans, workers=workers, prefetch=2)
    try:
        for span, clips in zip(spans, loader, strict=True):
            yield clips, labels[list(span)]
    finally:
        loader.close()


def _load_span(manifest: Manifest, frames: int, size: tuple[int, int], fps: float, records: Sequence[int]) -> Tensor:
    clips = torch.empty(len(records), 3, frames, *size, dtype=torch.uint8)
    for row, record in zip(clips, records, strict=True):
        start_s = max(0.0, (float(manifest.column("duration")[record]) - frames / fps) / 2)
        ref = ClipRef(step=0, slot=record, dataset=manifest.folder.name, record=record, start_s=start_s)
        pictures = decode_ref(manifest, ref, fps=fps, frames=frames)
        row.copy_(center_crop(pictures, size))
    return clips
