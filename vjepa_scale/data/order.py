"""The order of the data: computes which record is slot i of the global batch at step s.

There is no shuffle buffer and no state. The step alone determines, in this order:

    step  -> number of mask groups of each geometry before it        (nested divisions of the group counter)
    group -> number of clips of each data set before it              (the same, of the geometry's clips)
    draw  -> epoch and place k' in it                                (draw k is record k mod R of epoch k div R)
    place -> position in the epoch's sequence                        (laid out in lanes, so that reads stay local)
    position -> shard and record                                     (keyed permutations of shards and inside them)

A geometry is a number of frames: clips of a mask group have the same one. Where a phase has only one, as most do,
groups do not matter: the clips are dealt to the data sets one by one.

An epoch contains each record exactly once, also across phases that change batch or mixture: ``base`` carries the
counts over. After a rollback (``leave_out``) the counts go on behind the clips that were drawn before it. All
arithmetic is in integers, so every machine computes the same order.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import key64, keys64, permuted
from vjepa_scale.recipe.phases import Phase

Ints = npt.NDArray[np.int64]

_SHARE_BITS = 40  # precision of the integer weights: exact to one clip in 10^11 draws
_EPOCHS_KEPT = 4


class BatchOrder(NamedTuple):
    """The global batch of one step, by slot.

    dataset: int64 [B], index into the order's sets
    record:  int64 [B], index into the data set's manifest
    """

    dataset: Ints
    record: Ints


class DataOrder:
    """The order of a run of phases.

    seed:   data.seed
    sets:   (name, records of each shard) of every data set, in the order that indices refer to
    phases: consecutive phases, each with its global batch and mixture
    base:   draws of each set before the first phase (the result of ``drawn`` there); default none
    lanes:  number of shards that an epoch of one set reads in parallel
    kept:   for sets of which only some records are drawn, these records, ascending; ``sets`` counts only them
    Raises UserError for a data set in a phase's mixture that the phase is too short to draw from.
    """

    def __init__(
        self,
        *,
        seed: int,
        sets: Sequence[tuple[str, npt.ArrayLike]],
        phases: Sequence[Phase],
        base: Mapping[str, int] | None = None,
        lanes: int = 128,
        kept: Mapping[str, Ints] | None = None,
    ) -> None:
        self.names = [name for name, _ in sets]
        self._kept = [(kept or {}).get(name) for name in self.names]
        self._sets = [
            _SetOrder(key64(seed, f"order.{name}"), np.asarray(sizes, np.int64), lanes) for name, sizes in sets
        ]
        self._phases = list(phases)
        self._deals = [_Deal(phase, self.names) for phase in phases]
        assert all(a.end == b.first for a, b in pairwise(phases)), "phases have a gap"
        self._base = [[int((base or {}).get(name, 0)) for name in self.names]]
        for phase, deal in zip(self._phases, self._deals, strict=True):
            given = deal.given(phase.steps)
            for name, n in zip(self.names, given, strict=True):
                if n == 0 and phase.mixture.get(name, 0) > 0:
                    groups = f" in mask groups of {phase.mask_group}" if len(deal.geometries) > 1 else ""
                    raise UserError(
                        f"phase {phase.name!r} has {phase.steps} steps of {phase.global_batch} clips{groups}, "
                        f"too few to draw even once from {name!r}",
                        where=f"{phase.stage}.mixture.{name}",
                        fix="a larger weight, more steps, or weight 0",
                    )
            self._base.append([b + n for b, n in zip(self._base[-1], given, strict=True)])
        self._left_out: list[tuple[int, list[int]]] = []  # step, further draws of each set from it on; ascending
        self._last_step, self._last = -1, BatchOrder(np.empty(0, np.int64), np.empty(0, np.int64))

    def behind(self, first: int, end: int) -> dict[str, int]:
        """Returns how many clips of each set to leave out from ``first`` on, to go on behind those before ``end``."""
        counts = zip(self._counts(end), self._dealt(first), strict=True)
        return dict(zip(self.names, (then - now for then, now in counts), strict=True))

    def leave_out(self, first: int, draws: Mapping[str, int]) -> None:
        """After a rollback to step ``first``, leaves out so many clips of each data set from there on."""
        skipped = [draws.get(name, 0) for name in self.names]
        self._left_out = [entry for entry in self._left_out if entry[0] < first] + [(first, skipped)]
        self._last_step = -1

    def drawn(self, step: int) -> dict[str, int]:
        """Returns how many clips of each data set were drawn before a step, ``base`` included."""
        return dict(zip(self.names, self._counts(step), strict=True))

    def batch(self, step: int) -> BatchOrder:
        """Returns data set and record of every slot of one step."""
        if step != self._last_step:  # cached, because each micro-batch of a step calls this
            self._last_step, self._last = step, self._batch(step)
        return self._last

    def _batch(self, step: int) -> BatchOrder:
        deal = self._deals[self._number(step)]
        first, end = self._counts(step), self._counts(step + 1, of=step)
        columns, group_rank, geometry_of = [], [], []
        for number, members in enumerate(deal.geometries):
            clips = self._spread(members, first, end)
            groups = clips.shape[1] // deal.group
            # Groups of a geometry are spread evenly over the batch too, so that all ranks have similar work.
            columns.append(clips.reshape(2, groups, deal.group))
            group_rank.append((np.arange(groups) + 0.5) / max(1, groups))
            geometry_of.append(np.full(groups, number, np.int64))
        order = np.lexsort((np.concatenate(geometry_of), np.concatenate(group_rank)))
        datasets, records = np.concatenate(columns, axis=1)[:, order].reshape(2, -1)
        return BatchOrder(datasets, records)

    def _spread(self, members: Sequence[int], first: Sequence[int], end: Sequence[int]) -> Ints:
        """Returns draws first[i] … end[i]−1 of data sets i, spread evenly: int64 [2, draws], data set and record."""
        dataset, record, lane_rank = [], [], []
        for i in members:
            n = end[i] - first[i]
            # Draws of a set by (lane, k), so that neighbours in the batch are neighbours in a shard;
            # then the sets are spread evenly over the batch. Equal quotients of integers are equal floats.
            records, kept = self._sets[i].records(np.arange(first[i], end[i], dtype=np.int64)), self._kept[i]
            record.append(records if kept is None else kept[records])
            dataset.append(np.full(n, i, np.int64))
            lane_rank.append((np.arange(n) + 0.5) / max(1, n))
        both = np.stack([np.concatenate(dataset), np.concatenate(record)])
        return both[:, np.lexsort((both[0], np.concatenate(lane_rank)))]

    def _number(self, step: int) -> int:
        """Returns the index of the phase that a step is in."""
        if not self._phases[0].first <= step < self._phases[-1].end:
            raise ValueError(f"step {step} is outside {self._phases[0].first} to {self._phases[-1].end - 1}")
        return bisect_right([phase.first for phase in self._phases], step) - 1

    def _counts(self, step: int, *, of: int | None = None) -> list[int]:
        """Returns the draws of each set before a step, with what is left out up to the step ``of`` (default: it)."""
        of = step if of is None else of
        further = next((skipped for first, skipped in reversed(self._left_out) if first <= of), None)
        dealt = self._dealt(step)
        return dealt if further is None else [n + more for n, more in zip(dealt, further, strict=True)]

    def _dealt(self, step: int) -> list[int]:
        """Returns the draws of each set before a step if nothing is left out."""
        if step == self._phases[-1].end:
            return self._base[-1]
        number = self._number(step)
        given = self._deals[number].given(step - self._phases[number].first)
        return [b + n for b, n in zip(self._base[number], given, strict=True)]


class _Deal:
    """Assigns a phase's clips: mask groups to geometries, then each geometry's clips to its data sets.

    geometries: indices of the data sets of each number of frames
    group:      clips per mask group
    """

    def __init__(self, phase: Phase, names: Sequence[str]) -> None:
        assert set(phase.mixture) <= set(names), f"mixture {sorted(phase.mixture)} of unknown data sets; known: {names}"
        assert phase.global_batch % phase.mask_group == 0, "the batch is not whole mask groups"
        total = sum(phase.mixture.values())
        self._shares = [round(phase.mixture.get(name, 0) / total * 2**_SHARE_BITS) for name in names]
        by_frames: dict[int, list[int]] = {}
        for i, name in enumerate(names):
            if name in phase.mixture:
                by_frames.setdefault(phase.frames_of(name), []).append(i)
        self.geometries = list(by_frames.values())
        self.group = phase.mask_group
        self._groups_per_step = phase.global_batch // phase.mask_group
        self._of_geometry = [sum(self._shares[i] for i in members) for members in self.geometries]

    def given(self, steps: int) -> list[int]:
        """Returns the draws of each data set in the first ``steps`` steps of the phase."""
        given = [0] * len(self._shares)
        of_geometry = split_draws(self._groups_per_step * steps, self._of_geometry)
        for members, groups in zip(self.geometries, of_geometry, strict=True):
            split = split_draws(self.group * groups, [self._shares[i] for i in members])
            for i, n in zip(members, split, strict=True):
                given[i] = n
        return given


def split_draws(draws: int, shares: Sequence[int]) -> list[int]:
    """Returns each data set's count among the first q draws (or each geometry's among the first q mask groups).

    In descending order of shares, with rest = q and Q = Σ shares: N = rest·share // Q; rest -= N; Q -= share.
    The counts sum to q and never decrease as q grows. With k sets each count is less than 1 below its exact share and
    less than 1 + 1/2 + … + 1/(k−1) above it (tests/data/shares.py): less than 2 above it for up to four sets, less
    than 3 for up to eleven.
    """
    given = [0] * len(shares)
    rest, total = draws, sum(shares)
    for i in sorted(range(len(shares)), key=lambda i: (-shares[i], i)):
        if shares[i] > 0:
            given[i] = rest * shares[i] // total
            rest -= given[i]
            total -= shares[i]
    return given


class _SetOrder:
    """Maps draw k of one data set to a record. An epoch is every record once, with shards in a fixed number of lanes.

    key:   of this data set's permutations
    sizes: records of each shard
    """

    def __init__(self, key: int, sizes: Ints, lanes: int) -> None:
        self._key, self._sizes, self._lanes = key, sizes, lanes
        self._starts = np.cumsum(sizes) - sizes
        self._total = int(sizes.sum())
        assert self._total > 0, "a data set without records"
        self._tables: dict[int, tuple[Ints, Ints]] = {}

    def records(self, draws: Ints) -> Ints:
        """Returns the records of some draws, ordered by (lane, draw)."""
        epoch, place = np.divmod(draws, self._total)
        deep, wide = divmod(self._total, self._lanes)  # every lane has `deep` records, the first `wide` one more
        lane = np.where(place < self._lanes * deep, place % self._lanes, place - self._lanes * deep)
        walked = np.minimum(place // self._lanes, deep)
        position = lane * deep + np.minimum(lane, wide) + walked
        by_lane = np.lexsort((draws, lane))
        return self._at(epoch[by_lane], position[by_lane])

    def _at(self, epoch: Ints, position: Ints) -> Ints:
        """Returns the records at positions of the epochs' permuted sequences."""
        shard, inside = np.empty_like(position), np.empty_like(position)
        for e in np.unique(epoch):
            shards, ends = self._table(int(e))
            here = epoch == e
            n = np.searchsorted(ends, position[here], side="right")
            shard[here] = shards[n]
            inside[here] = position[here] - (ends[n] - self._sizes[shards[n]])
        keys = keys64(self._key, "order.records", epoch, shard)
        return self._starts[shard] + permuted(inside, self._sizes[shard], keys)

    def _table(self, epoch: int) -> tuple[Ints, Ints]:
        """Returns an epoch's sequence of shards, and the position where each one ends."""
        if epoch not in self._tables:
            if len(self._tables) >= _EPOCHS_KEPT:
                self._tables.pop(next(iter(self._tables)))
            n = len(self._sizes)
            shards = permuted(np.arange(n), n, key64(self._key, "order.shards", epoch))
            self._tables[epoch] = shards, np.cumsum(self._sizes[shards])
        return self._tables[epoch]
