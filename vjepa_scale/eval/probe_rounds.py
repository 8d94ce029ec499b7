"""Labelled clips without chance, shared by all ranks: for probes' evaluation, and for tokens that are kept.

Each record is looked at by one rank: rank r of W takes records r, r + W, …. All ranks have equally many batches of one
size, the last ones padded, so that neither ranks nor batches change what a clip is taken for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import psutil
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.augment import empty_clips
from vjepa_scale.data.evaluation import LabelledClips, evaluation_clips
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.recipe import Phase

if TYPE_CHECKING:
    from vjepa_scale.objective.probe_stage import ProbeStage

# What tokens may take of the memory that is free: workers, checkpoints and the page cache live beside them.
_SHARE = 0.5


def padded_rounds(
    stage: "ProbeStage",
    engine: Engine,
    phase: Phase,
    manifests: Mapping[str, Manifest],
    dataset: str,
    records: Ints,
    *,
    frames: int,
    segments: int = 1,
    crops: int = 1,
) -> Iterator[tuple[LabelledClips | None, Tensor]]:
    """This rank's records of a data set, a micro-batch of the phase at a time, in as many rounds as every rank has.

    frames, segments, crops: of ``evaluation_clips``
    Gives what is shown (None in a round without any) and clips, uint8 [b, 3, T, H, W]: those, and zeros behind them.
    """
    views, data = segments * crops, stage.recipe.data
    together = max(1, phase.micro_batch // views)
    mine = records[engine.dp_rank :: engine.dp_world_size]
    batches = evaluation_clips(
        manifests[dataset],
        frames=frames,
        size=phase.size,
        fps=data.fps_of(dataset),
        batch=together,
        classes=stage.task(manifests).classes,
        records=mine.tolist(),
        workers=data.workers if len(mine) else 0,
        segments=segments,
        crops=crops,
        limit_s=data.faults.decode_timeout_s,
    )
    for _ in range(math.ceil(math.ceil(len(records) / engine.dp_world_size) / together)):
        shown = next(batches, None)
        clips = empty_clips(together * views, frames, phase.size).zero_()
        if shown is not None:
            clips[: len(shown.clips)] = shown.clips
        yield shown, clips


def keep_tokens(
    stage: "ProbeStage",
    encode: Callable[[Tensor], Tensor],
    engine: Engine,
    manifests: Mapping[str, Manifest],
    trained_on: Mapping[str, Ints],
    phase: Phase,
    each_round: Callable[[], None],
) -> dict[tuple[str, int], Tensor]:
    """Encode each training clip of a phase once, as the evaluation sees it, and keep all its tokens on every rank.

    encode:     tokens [B, N, D] of uint8 clips [B, 3, T, H, W], on all ranks together
    trained_on: the records of each data set
    each_round: called on every rank after each batch: a place to stop
    Returns tokens [N, D] by data set and record.
    Raises UserError where memory does not suffice, and naming a clip that does not decode.
    """
    check_memory(stage, trained_on, phase, engine.ranks)
    found: dict[tuple[str, int], Tensor] = {}
    for name, records in trained_on.items():
        frames = phase.frames_of(name)
        for shown, clips in padded_rounds(stage, engine, phase, manifests, name, records, frames=frames):
            tokens = encode(clips).cpu()
            own = () if shown is None else shown.records
            mine = [
                ((name, record), tokens[row].clone()) for row, record in enumerate(own)
            ]  # not the whole batch's bytes
            for theirs in process_group.from_all(mine):
                found.update(theirs)
            each_round()
    return found


def check_memory(stage: "ProbeStage", trained_on: Mapping[str, Ints], phase: Phase, ranks: Ranks) -> None:
    """Raises UserError where the tokens of all ranks of a node would take more than half of what is free there."""
    recipe = stage.recipe
    value = 4 if recipe.engine.precision == "float32" else 2
    needed = 0
    for name, records in trained_on.items():
        t, h, w = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=phase.frames_of(name))
        needed += ranks.local_world_size * len(records) * t * h * w * recipe.model.encoder.width * value
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        raise UserError(
            f"the tokens of {sum(map(len, trained_on.values()))} clips take {needed / 1e9:.1f} GB on the "
            f"{ranks.local_world_size} ranks of a node, of {free / 1e9:.1f} GB that are free",
            where=f"{phase.stage}.keep_tokens",
            fix="fewer labels_per_class, or keep_tokens: false, which encodes clips at every step",
        )
