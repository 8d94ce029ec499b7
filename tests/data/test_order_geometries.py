"""Data sets with frames of their own: mask groups of one geometry, shares of groups and of clips, epochs."""

import hashlib
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.data.shares import ROUNDED, in_a_batch, in_total
from tests.data.test_order_properties import lane_counts, made, sets_of_shards, weights
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase

SIZES = {"yt": [7, 1, 30, 12] * 5, "ssv2": [50], "in1k": [3] * 11}
TWO_PHASES = [
    Phase("pretrain", "a", 3, 40, 0.1, 0.1, 16, (64, 64), 24, 4, {"yt": 0.5, "ssv2": 0.2, "in1k": 0.3}),
    Phase("pretrain", "b", 43, 9, 0.1, 0.1, 64, (64, 64), 48, 4, {"in1k": 1.0, "yt": 2.0}),
]


@st.composite
def phases_over(draw: st.DrawFn, names: list[str]) -> list[Phase]:
    """Consecutive phases, each with its own mixture, frames of its data sets, mask group and number of groups."""
    phases, first = [], draw(st.sampled_from([0, 7, 240_000]))
    for i in range(draw(st.integers(1, 3))):
        mixture = draw(st.dictionaries(st.sampled_from(names), weights, min_size=1))
        frames = {name: draw(st.sampled_from([2, 4, 16])) for name in mixture}
        group, groups, steps = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
        phases.append(
            Phase("pretrain", f"p{i}", first, steps, 0.1, 0.1, 16, (64, 64), group * groups, 1, mixture, frames, group)
        )
        first += steps
    return phases


@given(sets_of_shards, lane_counts, st.integers(0, 2**32), st.data())
@settings(max_examples=80, deadline=None)
def test_shares_of_groups_and_of_clips_and_epochs_hold_after_every_step(sizes, lanes, seed, data) -> None:
    """Counted from the batches alone. Each geometry's mask groups, in a batch and in the phase so far, are near its
    share; each data set's clips near its share of its geometry's clips; and after n draws of a set every record has
    come n // R times or once more."""
    names = [f"s{i}" for i in range(len(sizes))]
    phases = data.draw(phases_over(names))
    order = made(sizes, phases, seed=seed, lanes=lanes)
    if isinstance(order, UserError):
        event("a set is never drawn")
        return
    seen = [Counter() for _ in sizes]
    for phase in phases:
        weight = {name: Fraction(w) for name, w in phase.mixture.items()}
        of_frames = Counter()
        for name, w in weight.items():
            of_frames[phase.own_frames[name]] += w
        of_clip_length = Counter(phase.own_frames[name] for name in weight)
        event(f"{len(of_frames)} geometries")
        groups_so_far, clips_so_far = Counter(), Counter()
        for step in range(phase.first, phase.end):
            assert order.drawn(step) == {name: seen[i].total() for i, name in enumerate(names)}
            datasets, records = (column.tolist() for column in order.batch(step))
            assert len(datasets) == len(records) == phase.global_batch
            in_groups = Counter()
            for start in range(0, phase.global_batch, phase.mask_group):
                (frames,) = {phase.own_frames[names[i]] for i in datasets[start : start + phase.mask_group]}
                in_groups[frames] += 1
            in_clips = Counter(names[i] for i in datasets)
            groups_so_far += in_groups
            clips_so_far += in_clips
            total = sum(weight.values())
            parts = ((in_groups, in_clips, in_a_batch), (groups_so_far, clips_so_far, in_total))
            for groups, clips, most in parts:
                for frames, w in of_frames.items():
                    assert abs(groups[frames] - w / total * groups.total()) <= most(len(of_frames)) + ROUNDED
                for name, w in weight.items():
                    frames = phase.own_frames[name]
                    due = w / of_frames[frames] * groups[frames] * phase.mask_group
                    assert abs(clips[name] - due) <= most(of_clip_length[frames]) + ROUNDED
            for i, record in zip(datasets, records, strict=True):
                seen[i][record] += 1
            for i, shards in enumerate(sizes):
                assert set(seen[i]) <= set(range(sum(shards)))
                epochs, more = divmod(seen[i].total(), sum(shards))
                times = sorted(seen[i][record] for record in range(sum(shards)))
                assert times == [epochs] * (sum(shards) - more) + [epochs + 1] * more
        assert all(clips_so_far[name] > 0 for name in phase.mixture)
    assert order.drawn(phases[-1].end) == {name: seen[i].total() for i, name in enumerate(names)}


@given(st.lists(weights, min_size=1, max_size=4), st.integers(1, 24), st.integers(1, 8), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_every_rank_has_its_share_of_every_geometry(w, groups_per_rank, ranks, step) -> None:
    """With n of M groups, of k geometries in the batch, a run of m groups has m·n/M of them, give or take
    1 + k·n/M: before any point of the batch, each geometry is half a group and a rounding away from its share."""
    frames = {f"s{i}": 2 * (i + 1) for i in range(len(w))}
    mixture = dict(zip(frames, w, strict=True))
    groups = groups_per_rank * ranks
    phase = Phase("pretrain", "all", 0, 10_000, 0.1, 0.1, 2, (64, 64), 3 * groups, 3, mixture, frames, 3)
    order = made([[50]] * len(w), [phase], seed=0)
    assert isinstance(order, DataOrder)
    of_group = order.batch(step).dataset[::3]
    present = np.unique(of_group)
    for i in present:
        share = (of_group == i).mean()
        for run in np.split(of_group, ranks):
            assert abs((run == i).sum() - share * groups_per_rank) <= 1 + len(present) * share + 1e-9


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 8), st.integers(0, 30), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_slots_follow_the_closed_form(lanes, group, groups, step, seed) -> None:
    """Videos a and b with 16 frames (weights 2 and 1) beside pictures with 2 (weight 1), restated in plain integers:
    of M groups so far ⌊3M/4⌋ are of videos. Each set alone, on a batch of its own draws, tells its records."""
    sizes, weight = [[5, 9], [4], [11, 3]], {"s0": 2.0, "s1": 1.0, "s2": 1.0}
    phase = Phase("pretrain", "all", 0, 10_000, 0.1, 0.1, 16, (64, 64), group * groups, 1, weight, {"s2": 2}, group)
    order = made(sizes, [phase], seed=seed, lanes=lanes)
    assert isinstance(order, DataOrder)
    of_videos = [3 * groups * s // 4 for s in (step, step + 1)]
    of_pictures = [groups * s - n for s, n in zip((step, step + 1), of_videos, strict=True)]
    a = [2 * group * n // 3 for n in of_videos]
    draws = {"s0": a, "s1": [group * n - k for n, k in zip(of_videos, a, strict=True)]}
    draws["s2"] = [group * n for n in of_pictures]

    rows = {}
    for name, (first, end) in draws.items():
        records: list[int] = []
        if end > first:
            alone = Phase("pretrain", "alone", 0, 1, 0.1, 0.1, 16, (64, 64), end - first, 1, {name: 1.0})
            single = made(sizes, [alone], seed=seed, lanes=lanes, base={name: first})
            assert isinstance(single, DataOrder)
            records = single.batch(0).record.tolist()
        n = len(records)
        rows[name] = [(Fraction(2 * rank + 1, 2 * n), int(name[1]), record) for rank, record in enumerate(records)]
    videos = sorted(rows["s0"] + rows["s1"], key=lambda row: row[:2])
    in_groups = []
    for number, clips in enumerate((videos, rows["s2"])):
        cut = [clips[i : i + group] for i in range(0, len(clips), group)]
        in_groups += [(Fraction(2 * rank + 1, 2 * len(cut)), number, clips) for rank, clips in enumerate(cut)]
    in_groups.sort(key=lambda row: row[:2])
    expected = [(dataset, record) for *_, clips in in_groups for _, dataset, record in clips]
    got = order.batch(step)
    assert list(zip(got.dataset.tolist(), got.record.tolist(), strict=True)) == expected
    assert order.drawn(step) == {name: first for name, (first, _) in draws.items()}


@pytest.mark.parametrize("group", [1, 3, 12])
@pytest.mark.parametrize("frames", [{}, {"yt": 16, "in1k": 64}, {"yt": 2, "ssv2": 2, "in1k": 2}])
def test_with_one_geometry_the_order_is_the_one_that_knew_no_geometries(group: int, frames: dict[str, int]) -> None:
    """The digest is of the order as it was before data sets could have frames of their own (commit 01fdba9)."""
    phases = []
    for phase in TWO_PHASES:
        own = {name: n for name, n in frames.items() if n in (2, phase.frames)}
        phases.append(replace(phase, own_frames=own, mask_group=group))
    order = DataOrder(seed=5, sets=list(SIZES.items()), phases=phases, base={"yt": 100, "ssv2": 3}, lanes=6)
    digest = hashlib.sha256()
    for step in range(3, 52):
        for column in order.batch(step):
            digest.update(column.astype("<i8").tobytes())
    assert digest.hexdigest() == "2389295cdc00c5f6e73745523be69dec7f2ce5f20c6a2c384f074201f82426da"
    assert order.drawn(52) == {"yt": 868, "ssv2": 195, "in1k": 432}


def test_geometry_and_mixture_may_be_named_in_any_order() -> None:
    mixture = {"yt": 1.0, "ssv2": 1.0, "in1k": 2.0}
    batches = []
    for named in (mixture, dict(reversed(mixture.items()))):
        phase = Phase("pretrain", "all", 0, 9, 0.1, 0.1, 16, (64, 64), 24, 4, named, {"in1k": 2}, 4)
        order = DataOrder(seed=5, sets=list(SIZES.items()), phases=[phase], lanes=6)
        batches.append([order.batch(step) for step in range(9)])
    for one, other in zip(*batches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_groups_of_the_same_geometry_are_apart() -> None:
    """A quarter of pictures: every fourth group."""
    phase = Phase("pretrain", "all", 0, 9, 0.1, 0.1, 16, (64, 64), 96, 4, {"yt": 3.0, "in1k": 1.0}, {"in1k": 2}, 4)
    order = DataOrder(seed=5, sets=list(SIZES.items()), phases=[phase], lanes=6)
    for step in range(9):
        of_pictures = np.flatnonzero(order.batch(step).dataset[::4] == 2).tolist()
        assert len(of_pictures) == 6
        assert {b - a for a, b in pairwise(of_pictures)} <= {3, 4, 5}


def test_a_geometry_or_a_set_in_it_that_is_never_drawn_is_an_error_at_the_start() -> None:
    def order(steps: int, own_frames: dict[str, int]) -> DataOrder | UserError:
        mixture = {"s0": 0.98, "s1": 0.01, "s2": 0.01}
        phase = Phase("pretrain", "all", 0, steps, 0.1, 0.1, 16, (64, 64), 24, 4, mixture, own_frames, 12)
        return made([[9], [9], [9]], [phase], seed=0)

    clip_by_clip = order(10, {})
    assert isinstance(clip_by_clip, DataOrder)
    assert clip_by_clip.drawn(10)["s1"] in (2, 3)  # of 240 clips
    refused = order(10, {"s1": 2, "s2": 4})  # of 20 groups, 0.2 are due to each
    assert isinstance(refused, UserError)
    assert "pretrain.mixture.s" in str(refused)
    assert "10 steps of 24 clips in mask groups of 12" in str(refused)
    longer = order(150, {"s1": 2, "s2": 4})
    assert isinstance(longer, DataOrder)
    assert longer.drawn(150)["s1"] in (24, 36, 48)
    assert isinstance(order(10, {"s1": 2, "s2": 2}), DataOrder)  # a group of both
