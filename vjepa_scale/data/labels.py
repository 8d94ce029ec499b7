"""What is known of a record beside its pictures: its class, its JSON; and a few labels of each class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.manifest import MANIFEST, Manifest
from vjepa_scale.data.order import Ints


def labels_of(manifest: Manifest, classes: Sequence[str] | None = None) -> Ints:
    """The class of every record: int64 [records], an index into ``classes``.

    classes: of the task, usually the training set's ``manifest.classes``; default: this data set's own.
    Raises UserError where a record has no label, or one that is not in ``classes``.
    """
    own = manifest.column("label").astype(np.int64)
    where = manifest.folder / MANIFEST
    if (own < 0).any():
        key = manifest.key(int(np.flatnonzero(own < 0)[0]))
        raise UserError(f"record {key} has no label", where=where, fix="put videos into one folder per class")
    if classes is None:
        return own
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({manifest.classes[i] for i in np.unique(own)} - set(number))
    if unknown:
        raise UserError(
            f"class {unknown[0]!r} is not among the {len(number)} classes of the task",
            where=where,
            fix="use data sets of the same classes",
        )
    return np.array([number.get(name, -1) for name in manifest.classes], np.int64)[own]


def label_of(manifest: Manifest, record: int, classes: Sequence[str]) -> int:
    """The class of one record, as ``labels_of`` says of all."""
    return classes.index(manifest.classes[int(manifest.column("label")[record])])


def few_labels(labels: Ints, *, per_class: int, seed: int, skip: int = 0) -> Ints:
    """Indices of ``per_class`` examples of every class, sorted: a keyed draw, so equal for all encoders.

    skip: examples of each class that come before them in the draw: for others than those of ``per_class=skip``
    Raises ValueError naming the class that has too few.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < skip + per_class:
            raise ValueError(f"class {label} has {len(members)} examples, fewer than {skip + per_class}")
        chosen.append(members[KeyedRng(seed, "labels", int(label)).shuffled(len(members))[skip : skip + per_class]])
    return np.sort(np.concatenate(chosen))


def metadata_of(manifest: Manifest, record: int) -> dict[str, Any]:
    """The JSON of a record (docs/shards.md); empty for an indexed sample that has none. Raises UserError."""
    try:
        known = parse_json(manifest.read(record, "json") or b"{}")
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(
            f"the JSON of record {manifest.key(record)} is no JSON object",
            where=manifest.folder / manifest.shard_of(record).name,
            fix="restore this shard from a copy, or make the shards again",
        )
    return known
