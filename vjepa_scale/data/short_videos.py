"""Videos shorter than a clip, whose last picture is repeated: how many there are, and how much of a mixture that is."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.stride import strides
from vjepa_scale.recipe import Phase
from vjepa_scale.recipe.schema import DataConfig


@dataclass(frozen=True)
class Short:
    """Of one data set: records whose clips repeat their last picture, of how many. frames, fps: of its clips."""

    records: int
    of: int
    frames: int
    fps: float


def repeats_last(manifest: Manifest, *, frames: int, fps: float, sampling: str) -> npt.NDArray[np.bool_]:
    """Of which records [records] a clip goes past the end. Pictures, which have no end, never do.

    frames, fps: of a clip; sampling: as data.sampling
    """
    source_fps = manifest.column("fps")
    if sampling == "stride":
        whole = manifest.column("frames") // strides(source_fps, fps)
        return np.asarray((source_fps > 0) & (whole < frames))
    duration = manifest.column("duration")
    return np.asarray((duration > 0) & (duration <= (frames - 1) / fps + 1e-9))


def short_videos(data: DataConfig, phase: Phase, manifests: Mapping[str, Manifest]) -> tuple[dict[str, Short], float]:
    """Those of each data set of a phase that has any, and the share of the phase's clips that comes from them.

    data:      its stage's, without jitter of the rate
    manifests: of the phase's data sets; one that is missing counts as having none
    """
    found, share = dict[str, Short](), 0.0
    for name, weight in phase.mixture.items():
        if name not in manifests:
            continue
        manifest, frames, fps = manifests[name], phase.frames_of(name), data.fps_of(name)
        records = int(repeats_last(manifest, frames=frames, fps=fps, sampling=data.sampling).sum())
        if records:
            found[name] = Short(records, manifest.records, frames, fps)
            share += weight / sum(phase.mixture.values()) * records / manifest.records
    return found, share
