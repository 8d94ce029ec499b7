"""What a folder of shards holds, in a few numbers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import REJECTED, Manifest


@dataclass(frozen=True)
class Summary:
    """What was made. existed: the finished data set was there already, and nothing was done.

    resolutions: clips by (width, height); rates: clips by frames a second, images by 0; rejected: sources by
    reason. The most frequent come first.
    """

    clips: int
    shards: int
    hours: float
    bytes: int
    resolutions: dict[tuple[int, int], int]
    rates: dict[float, int]
    rejected: dict[str, int]
    existed: bool = False


def summarize(out: Path, existed: bool = False) -> Summary:
    """Raises UserError where ``out`` is no finished folder of shards."""
    manifest = Manifest.open(out)
    # width and height as one number: a column of pairs would be sorted far more slowly
    sizes = manifest.column("width").astype(np.int64) << 32 | manifest.column("height")
    return Summary(
        clips=manifest.records,
        shards=len(manifest.shards),
        hours=float(manifest.column("duration").sum()) / 3600,
        bytes=sum(shard.bytes for shard in manifest.shards),
        resolutions={(size >> 32, size & 0xFFFFFFFF): n for size, n in _frequent(sizes).items()},
        rates=_frequent(np.round(manifest.column("fps"), 2)),
        rejected=dict(Counter(row["reason"] for row in read_jsonl(out / REJECTED)).most_common()),
        existed=existed,
    )


def _frequent(values: np.ndarray) -> dict:
    """How often each value occurs, the most frequent first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return dict(zip(found[order].tolist(), counts[order].tolist(), strict=True))
