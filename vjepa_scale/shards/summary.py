"""What a folder of shards holds, in a few numbers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import REJECTED, Manifest
from vjepa_scale.data.short_videos import repeats_last

CLIP_FRAMES, FPS = (16, 64), 4.0  # the paper's clips: of pretraining, of cooldown
_BLOCK = 2**20  # records


@dataclass(frozen=True)
class Summary:
    """What was made. existed: the finished data set was there already, and nothing was done.

    resolutions: clips by (width, height); rates: clips by frames a second, images by 0; rejected: sources by
    reason. The most frequent come first.
    trajectories: of robots: statistics of states and actions (data/trajectory_statistics.py)
    classes, unlabelled: classes, and clips of none
    seconds: shortest, median and longest video (images are none); short: how many are shorter than a clip of so many
             frames at FPS, which would repeat their last picture
    """

    clips: int
    shards: int
    hours: float
    bytes: int
    resolutions: dict[tuple[int, int], int]
    rates: dict[float, int]
    rejected: dict[str, int]
    trajectories: dict[str, Any] | None = None
    existed: bool = False
    seconds: tuple[float, float, float] | None = None
    short: dict[int, int] = field(default_factory=dict)
    classes: int = 0
    unlabelled: int = 0


def summarize(out: Path, existed: bool = False) -> Summary:
    """Raises UserError where ``out`` is no finished folder of shards."""
    manifest = Manifest.open(out)
    width, height, rate = (manifest.column(name) for name in ("width", "height", "fps"))
    duration = manifest.column("duration")
    lasting = np.asarray(duration[duration > 0])
    blocks = [slice(i, i + _BLOCK) for i in range(0, manifest.records, _BLOCK)]
    # width and height as one number: a column of pairs would be sorted far more slowly
    sizes = (width[block].astype(np.int64) << 32 | height[block] for block in blocks)
    return Summary(
        clips=manifest.records,
        shards=len(manifest.shards),
        hours=float(duration.sum()) / 3600,
        bytes=sum(shard.bytes for shard in manifest.shards),
        resolutions={(size >> 32, size & 0xFFFFFFFF): n for size, n in _frequent(sizes).items()},
        rates=_frequent(np.round(rate[block], 2) for block in blocks),
        rejected=dict(Counter(row["reason"] for row in read_jsonl(out / REJECTED)).most_common()),
        trajectories=manifest.trajectories,
        existed=existed,
        seconds=(float(lasting.min()), float(np.median(lasting)), float(lasting.max())) if len(lasting) else None,
        classes=len(manifest.classes),
        unlabelled=int((manifest.column("label") < 0).sum()),
        short={n: int(repeats_last(manifest, frames=n, fps=FPS, sampling="time").sum()) for n in CLIP_FRAMES},
    )


def _frequent(values: Iterable[np.ndarray]) -> dict:
    """How often each value occurs in some blocks, the most frequent first."""
    counts = Counter[float]()
    for block in values:
        found, times = np.unique(block, return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
