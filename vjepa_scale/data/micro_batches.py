"""One micro-batch from the shards: clips decoded and cropped, and beside them what their stage learns from."""

from collections.abc import Mapping
from typing import Any

from vjepa_scale.data.augment import empty_clips
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.clips import ClipRef, Timed, clip_refs
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.substitution import DecodeFailure, Known, clip_or_substitute
from vjepa_scale.recipe import Phase, Stage


def load_micro_batch(
    stage: Stage,
    phase: Phase,
    order: DataOrder,
    manifests: Mapping[str, Manifest],
    index: tuple[int, int],
    *,
    known: Known,
    timed: Timed | None = None,
    records: Mapping[str, Ints] | None = None,
    prepared: Any = None,
) -> MicroBatch:
    """Micro-batch number m of a step, by index (step, m): decoded, cropped, with what its stage learns from.

    records, prepared: as the stage says of its data sets, and of the phase
    Where the stage's steps take nothing from videos, nothing is decoded: clips have no frames.
    """
    step, number = index
    slots = range(number * phase.micro_batch, (number + 1) * phase.micro_batch)
    refs = clip_refs(stage.data, phase, order, manifests, step=step, slots=slots)
    names = tuple(ref.dataset for ref in refs)
    if not stage.decodes_clips:
        unseen = MicroBatch(empty_clips(len(refs), 0, phase.size), (), step, slots, names)
        return stage.complete(unseen, refs, phase, manifests, prepared)
    frames = phase.frames_of(refs[0].dataset)
    assert all(len(ref.times_s) == frames for ref in refs), "a micro-batch has one geometry"
    clips = empty_clips(len(refs), frames, phase.size)
    failures: list[DecodeFailure] = []
    shown: list[ClipRef] = []
    for row, ref in zip(clips, refs, strict=True):
        ref, pictures, met = clip_or_substitute(
            manifests[ref.dataset],
            ref,
            data=stage.data,
            known=known,
            timed=timed,
            records=(records or {}).get(ref.dataset),
        )
        failures += met
        shown.append(ref)
        stage.crop(pictures, phase, step=step, slot=ref.slot, out=row)
    # Of the clips that are shown, which are not always those that were drawn.
    batch = MicroBatch(clips, (), step, slots, names, tuple(failures), tuple(ref.record for ref in shown))
    return stage.complete(batch, shown, phase, manifests, prepared)
