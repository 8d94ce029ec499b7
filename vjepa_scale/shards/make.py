"""Makes WebDataset shards with a manifest from videos and images, in steps that scale and resume separately:

    begin   (one process)  the sources are listed                                                         work.py
    probe   (any number)   every file is decoded whole: facts, or a reason to reject it; long ones are cut  probe.py
    plan    (one process)  duplicates are rejected; records are shuffled by the seed and dealt to shards    plan.py
    write   (any number)   each shard under a temporary name, then renamed                                 write.py
    finish  (one process)  columns, rejected.jsonl, the manifest last                                      write.py

Finished work is never repeated, so a killed run continues. The bytes do not depend on processes, jobs, kills or
repetitions. A bad file never stops the run and is never dropped silently: it is listed in rejected.jsonl.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.clips import repeats_last
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest
from vjepa_scale.shards.plan import plan
from vjepa_scale.shards.probe import probe
from vjepa_scale.shards.sources import SIDES
from vjepa_scale.shards.work import DIGESTS, Part, Progress, Settings, Work, begin, check_sides, tidy
from vjepa_scale.shards.write import finish, write

__all__ = ["Part", "Progress", "Settings", "Work", "begin", "finish", "make_shards", "plan", "probe", "write"]

CLIP_FRAMES, FPS = (16, 64), 4.0  # the paper's clips in pretraining and in cooldown
_BLOCK = 2**20  # records


@dataclass(frozen=True)
class Summary:
    """Summary of a data set. existed: it was finished before, and nothing was done.

    resolutions: clips by (width, height); rates: clips by frames per second, images under 0; rejected: sources by
    reason; all with the most frequent first
    trajectories: statistics of a robot's states and actions (data/trajectories.py)
    classes, unlabelled: number of classes, and of clips without one; class_clips: clips by class, most frequent first
    seconds: shortest, median and longest video (without images); short: number of videos shorter than a clip of so
             many frames at FPS, which would repeat their last picture
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
    class_clips: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0


def summarize(out: Path, existed: bool = False) -> Summary:
    """Summarises a finished folder of shards. Raises UserError where ``out`` is none."""
    manifest = Manifest.open(out)
    width, height, rate = (manifest.column(name) for name in ("width", "height", "fps"))
    duration = manifest.column("duration")
    lasting = np.asarray(duration[duration > 0])
    blocks = [slice(i, i + _BLOCK) for i in range(0, manifest.records, _BLOCK)]
    labels = _frequent(manifest.column("label")[block] for block in blocks)
    unlabelled = labels.pop(-1, 0)
    # width and height as one number, because sorting a column of pairs is far slower
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
        class_clips={manifest.classes[number]: count for number, count in labels.items()},
        unlabelled=unlabelled,
        short={n: int(repeats_last(manifest, frames=n, fps=FPS, sampling="time").sum()) for n in CLIP_FRAMES},
    )


def _frequent(values: Iterable[np.ndarray]) -> dict:
    """Counts the values in some blocks, the most frequent first."""
    counts = Counter[float]()
    for block in values:
        found, times = np.unique(block, return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def make_shards(videos: Path, out: Path, settings: Settings, *, workers: int, progress: Progress) -> Summary:
    """Makes the data set, resumes an unfinished one, or returns at once where it is finished.

    videos: a folder, or a list (see sources.py)
    Raises UserError, before anything is written, where there is nothing to make it from or where ``out``
    holds something else.
    """
    work = begin(videos, out, settings)
    if work is None:
        return summarize(out, existed=True)
    everything = Part(0, 1)
    try:
        probe(work, everything, workers=workers, progress=progress)
        plan(work)
        write(work, everything, workers=workers, progress=progress)
        finish(work)
    except (UserError, FileNotFoundError):
        if not (out / MANIFEST).exists():
            raise
        tidy(out)  # another process has finished it meanwhile, and removed the work
    return summarize(out)


def make_split(
    videos: Path, out: Path, settings: Settings, make: Callable[[Path, Settings], Summary]
) -> dict[str, Summary]:
    """Makes two data sets, OUT/train and OUT/val, that share no group of sources and no clip.

    settings: ``val`` and ``val_by`` define the split (sources.of_side); make: makes one side, given folder and settings
    Raises UserError, before anything is written, where one side would have no source.
    """
    sides = {side: replace(settings, side=side) for side in SIDES}
    check_sides(videos, out, list(sides.values()))
    summaries = {side: make(out / side, asked) for side, asked in sides.items()}  # train first: val excludes its clips
    (out / DIGESTS).unlink(missing_ok=True)
    return summaries
