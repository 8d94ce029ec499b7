"""The order's promises on random mixtures, against a restatement of design.md in plain Python loops."""

import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.shares import ROUNDED, in_a_batch, in_total
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.order import DataOrder, split_draws
from vjepa_scale.recipe import Phase


def phase(first: int, steps: int, batch: int, mixture: dict[str, float], stage: str = "pretrain") -> Phase:
    return Phase(stage, f"from_{first}", first, steps, 0.0, 0.0, 16, (64, 64), batch, 1, mixture)


def order(sizes: dict[str, list[int]], phases: list[Phase], *, seed: int = 0, lanes: int = 4, **kwargs) -> DataOrder:
    return DataOrder(seed=seed, sets=list(sizes.items()), phases=phases, lanes=lanes, **kwargs)


def taken(data_order: DataOrder, first: int, end: int) -> dict[int, list[int]]:
    """All records that each data set gave in some steps, in the order of slots."""
    out: dict[int, list[int]] = {}
    for step in range(first, end):
        for dataset, record in zip(*(a.tolist() for a in data_order.batch(step)), strict=True):
            out.setdefault(dataset, []).append(record)
    return out


weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)
shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(weights, st.integers(1, 200), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
@example([5.375, 5.375, 5.3125, 5.117994289415518, 0.3984375], 151, 29)  # 2.2 clips in a batch
def test_counts_stay_near_the_share_in_total_and_in_any_batch(w, batch, steps):
    sets = {f"s{i}": [10_000] for i in range(len(w))}
    mixture = dict(zip(sets, w, strict=True))
    try:
        data_order = order(sets, [phase(0, steps, batch, mixture)])
    except UserError:
        assert min(w) / sum(w) * batch * steps < 2  # only where a set is hardly due one clip
        return
    share = {name: Fraction(weight) / sum(map(Fraction, w)) for name, weight in mixture.items()}
    before = dict.fromkeys(sets, 0)
    for step in range(steps + 1):
        now = data_order.drawn(step)
        assert sum(now.values()) == batch * step
        for name in sets:
            assert abs(now[name] - share[name] * batch * step) <= in_total(len(w)) + ROUNDED
            if step:
                assert abs(now[name] - before[name] - share[name] * batch) <= in_a_batch(len(w)) + ROUNDED
                assert now[name] >= before[name]
        before = now
    for step in {0, steps // 2, steps - 1}:
        counts = Counter(data_order.batch(step).dataset.tolist())
        a, b = data_order.drawn(step), data_order.drawn(step + 1)
        assert {name: counts[i] for i, name in enumerate(sets)} == {name: b[name] - a[name] for name in sets}


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=6), st.integers(0, 10**12))
@settings(max_examples=300, deadline=None)
def test_splitting_one_more_draw_gives_one_more_clip_to_one_set(shares, q):
    a, b = split_draws(q, shares), split_draws(q + 1, shares)
    assert sum(a) == q
    assert sorted(y - x for x, y in zip(a, b, strict=True)) == [0] * (len(shares) - 1) + [1]


@given(st.lists(shard_sizes, min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 2**32), st.data())
@settings(max_examples=80, deadline=None)
def test_each_record_comes_once_per_epoch_across_phases_and_stages(sizes, lanes, seed, data):
    """Phases change batch and mixture; a second stage continues by base. Every set's draws, cut by its
    number of records, must be permutations."""
    sets = {f"s{i}": s for i, s in enumerate(sizes)}
    phases, first = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        batch, steps = data.draw(st.integers(4, 12)), data.draw(st.integers(3, 9))
        mixture = {name: data.draw(st.sampled_from([1.0, 2.0, 0.7])) for name in sets}
        phases.append(phase(first, steps, batch, mixture))
        first += steps
    before = order(sets, phases, seed=seed, lanes=lanes)
    stage = [phase(first, 5, 9, dict.fromkeys(sets, 1.0), "cooldown")]
    after = order(sets, stage, seed=seed, lanes=lanes, base=before.drawn(first))

    # Draws inside a batch are spread by lane: put them back in the order of k by taking whole epochs only.
    by_set: dict[int, Counter] = {}
    drawn_of: dict[int, int] = {}
    for data_order, steps in ((before, range(first)), (after, range(first, first + 5))):
        for step in steps:
            batch_of = data_order.batch(step)
            for i, size in enumerate(sizes):
                records = batch_of.record[batch_of.dataset == i].tolist()
                seen, total = by_set.setdefault(i, Counter()), sum(size)
                seen.update(records)
                drawn_of[i] = drawn_of.get(i, 0) + len(records)
                epochs, rest = divmod(drawn_of[i], total)
                # After k draws every record has come ⌊k/R⌋ times, and k mod R of them once more.
                assert Counter(seen[r] for r in range(total)) == Counter(
                    {epochs: total - rest, epochs + 1: rest} if rest else {epochs: total}
                )
    assert {f"s{i}": n for i, n in drawn_of.items()} == after.drawn(first + 5)


@given(shard_sizes, shard_sizes, st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 11))
@settings(max_examples=40, deadline=None)
def test_any_starting_step_gives_the_same_batches(a, b, seed, lanes, start):
    sets = {"a": a, "b": b}
    phases = [phase(0, 5, 8, {"a": 1.0, "b": 2.0}), phase(5, 7, 6, {"b": 1.0})]
    whole = order(sets, phases, seed=seed, lanes=lanes)
    for step in range(12):
        whole.batch(step)  # warms its tables
    fresh = order(sets, phases, seed=seed, lanes=lanes)
    for step in range(start, 12):
        for x, y in zip(whole.batch(step), fresh.batch(step), strict=True):
            assert np.array_equal(x, y)


@given(shard_sizes, shard_sizes, st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_slots_follow_the_closed_form_of_the_design(a, b, lanes, batch):
    """Where each draw of a batch stands, and the lane it walks, restated draw by draw.

    The permutations are the code's own (they are a choice, not arithmetic): the sequence of an epoch is
    read off with one lane, where position = draw.
    """
    sets, mixture = {"a": a, "b": b}, {"a": 3.0, "b": 2.0}
    steps = 30
    sequences: dict[int, list[int]] = {}
    for i, name in enumerate(sets):
        alone = order(
            sets, [phase(0, 1, 192 + sum(sets[name]), {name: 1.0})], lanes=1
        )  # 16 batches of 20, and their epoch
        sequences[i] = alone.batch(0).record.tolist()

    data_order = order(sets, [phase(0, steps, batch, mixture)], lanes=lanes)
    for step in (0, 1, steps // 2):
        lo, hi = ({"a": q * 3 // 5, "b": q - q * 3 // 5} for q in (batch * step, batch * (step + 1)))
        expected = []
        for d, (name, size) in enumerate(sets.items()):
            records = sum(size)
            per_lane, longer = records // lanes, records % lanes
            rows = []
            for k in range(lo[name], hi[name]):
                epoch, place = k // records, k % records
                if place < lanes * per_lane:
                    lane, walked = place % lanes, place // lanes
                else:
                    lane, walked = place - lanes * per_lane, per_lane
                position = lane * per_lane + min(lane, longer) + walked
                rows.append((lane, k, sequences[d][epoch * records + position]))
            rows.sort()
            n = len(rows)
            expected += [(Fraction(2 * rank + 1, 2 * n), d, record) for rank, (_, _, record) in enumerate(rows)]
        expected.sort(key=lambda row: row[:2])
        got = data_order.batch(step)
        assert list(zip(got.dataset.tolist(), got.record.tolist(), strict=True)) == [row[1:] for row in expected]


def test_an_epoch_walks_shard_by_shard_in_every_lane():
    sizes = [50] * 20
    data_order = order({"a": sizes}, [phase(0, 100, 10, {"a": 1.0})], lanes=5)
    open_shards = [{r // 50 for r in data_order.batch(step).record.tolist()} for step in range(100)]
    # Five lanes of 200 records: four shards each, so a batch of two records a lane touches five shards.
    assert all(len(s) == 5 for s in open_shards)
    assert sum(a != b for a, b in pairwise(open_shards)) == 3


def test_epochs_and_seeds_are_shuffled_differently():
    def epochs(seed: int) -> list[list[int]]:
        data_order = order({"a": [30, 30, 40]}, [phase(0, 30, 10, {"a": 1.0})], seed=seed, lanes=1)
        records = taken(data_order, 0, 30)[0]
        return [records[i : i + 100] for i in (0, 100, 200)]

    first, other = epochs(0), epochs(1)
    assert all(sorted(e) == list(range(100)) for e in first + other)
    assert first[0] != list(range(100))
    assert len({tuple(e) for e in first + other}) == 6


def test_one_record_one_shard_and_fewer_records_than_lanes():
    data_order = order({"a": [1], "b": [3]}, [phase(0, 4, 6, {"a": 1.0, "b": 1.0})], lanes=64)
    records = taken(data_order, 0, 4)
    assert records[0] == [0] * 12
    assert Counter(records[1]) == Counter({0: 4, 1: 4, 2: 4})
    assert sorted(data_order.batch(0).record[data_order.batch(0).dataset == 1].tolist()) == [0, 1, 2]


def test_a_data_set_that_is_never_drawn_is_an_error_at_the_start():
    with pytest.raises(UserError, match=r"pretrain\.mixture\.rare"):
        order({"a": [9], "rare": [9], "rest": [9]}, [phase(0, 10, 10, {"a": 1.0, "rare": 1e-4, "rest": 1e-4})])
    order({"a": [9], "rare": [9]}, [phase(0, 10, 10, {"a": 1.0})])  # left out on purpose is fine


def test_steps_outside_the_phases_are_refused():
    data_order = order({"a": [9]}, [phase(10, 5, 4, {"a": 1.0})])
    assert data_order.drawn(10) == {"a": 0}
    assert data_order.drawn(15) == {"a": 20}
    for step in (9, 15):
        with pytest.raises(ValueError, match="outside"):
            data_order.batch(step)


def test_twenty_million_records_cost_milliseconds():
    sets = {"yt": [5000] * 4000, "ssv2": [1000] * 168}
    data_order = order(sets, [phase(0, 250_000, 3072, {"yt": 0.8, "ssv2": 0.2})], lanes=128)
    data_order.batch(0)
    start = time.process_time()
    for step in range(100_000, 100_020):
        batch = data_order.batch(step)
    assert (time.process_time() - start) / 20 < 0.1
    assert batch.record[batch.dataset == 0].max() > 1_000_000


# -- after a rollback --------------------------------------------------------------------------------


def test_a_rollback_goes_on_behind_the_clips_before_it():
    """One data set: the batches are those that would have followed."""
    undisturbed, rolled_back = (order({"a": [9, 8, 7]}, [phase(0, 40, 6, {"a": 1.0})]) for _ in range(2))
    rolled_back.leave_out(10, rolled_back.behind(10, 14))
    for step in range(40):
        expected = undisturbed.batch(step + 4 * (step >= 10)) if step < 36 else None
        if expected is not None:
            assert rolled_back.batch(step).record.tolist() == expected.record.tolist()


@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 30), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
@example(5, 10, 5, 3, 0)  # the second rollback goes to the checkpoint of the first one
@example(20, 15, 10, 20, 1)  # and to an earlier one, over the end of a phase
def test_no_clip_is_shown_twice_after_rollbacks(first, lost, second_first, second_lost, seed):
    """Two rollbacks: what each of the three ways has drawn of a set follows what was drawn before it, and no record
    comes twice in an epoch."""
    phases = [phase(0, 30, 8, {"a": 2.0, "b": 1.0}), phase(30, 40, 4, {"a": 1.0, "b": 3.0, "c": 0.5})]
    sets = {"a": [300, 211], "b": [400], "c": [97]}
    end = min(70, first + lost)
    second_end = min(70, max(second_first + second_lost, second_first + 1))
    data_order = order(sets, phases, seed=seed)
    shown: dict[int, list[int]] = {}

    def show(begin, stop):
        for dataset, records in taken(data_order, begin, stop).items():
            shown.setdefault(dataset, []).extend(records)

    show(0, end)
    data_order.leave_out(first, data_order.behind(first, end))
    show(first, max(first, second_end) if second_end > first else first)
    if second_end > first:  # else that step was not trained again
        back = min(second_first, second_end)
        data_order.leave_out(back, data_order.behind(back, second_end))
        show(back, 70)
    for dataset, records in shown.items():
        count, size = len(records), sum(list(sets.values())[dataset])
        assert count <= size, "the example is too large for one epoch"
        assert len(set(records)) == count
    total = {name: len(shown.get(number, [])) for number, name in enumerate(sets)}
    if second_end > first:
        assert data_order.drawn(70) == total


def test_a_resume_before_a_rollback_takes_the_same_clips_as_the_run():
    """A checkpoint from before the one of the rollback: the steps up to it are those of then."""
    rolled_back, undisturbed = (order({"a": [50], "b": [70]}, [phase(0, 30, 4, {"a": 1, "b": 1})]) for _ in range(2))
    rolled_back.leave_out(12, rolled_back.behind(12, 20))
    assert all(rolled_back.batch(s).record.tolist() == undisturbed.batch(s).record.tolist() for s in range(12))
    assert rolled_back.drawn(11) == undisturbed.drawn(11)
    assert rolled_back.drawn(12) == undisturbed.drawn(20)
    assert sum(rolled_back.drawn(30).values()) == 4 * (30 + 8)
