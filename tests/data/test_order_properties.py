"""The order over random phases: shares, epochs, independence of who asks, and data sets that are never drawn."""

from collections import Counter
from copy import deepcopy
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.data.shares import ROUNDED, in_a_batch, in_total
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase

# One shard, more lanes than shards and more lanes than records are all among them.
sets_of_shards = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=5)
lane_counts = st.integers(1, 40)
weights = st.floats(0.01, 10)


@st.composite
def phases_over(draw: st.DrawFn, names: list[str], most: int = 4) -> list[Phase]:
    """Consecutive phases from a random step on, each with its own batch, length and mixture of some of the sets."""
    phases, first = [], draw(st.sampled_from([0, 7, 240_000]))
    for i in range(draw(st.integers(1, most))):
        mixture = draw(st.dictionaries(st.sampled_from(names), weights, min_size=1))
        batch, steps = draw(st.integers(1, 40)), draw(st.integers(1, 12))
        phases.append(Phase("pretrain", f"p{i}", first, steps, 0.1, 0.1, 16, (64, 64), batch, 1, mixture))
        first += steps
    return phases


def made(sizes: list[list[int]], phases: list[Phase], **options) -> DataOrder | UserError:
    try:
        return DataOrder(sets=[(f"s{i}", shards) for i, shards in enumerate(sizes)], phases=phases, **options)
    except UserError as error:
        return error


@given(sets_of_shards, lane_counts, st.integers(0, 2**32), st.data())
@settings(max_examples=80, deadline=None)
def test_shares_and_epochs_hold_after_every_step_of_any_phases(sizes, lanes, seed, data) -> None:
    """Counted from the batches alone: each batch, and the total of its phase so far, near every share; and
    inside a set, after n draws, every record has come n // R times or once more."""
    phases = data.draw(phases_over([f"s{i}" for i in range(len(sizes))]))
    order = made(sizes, phases, seed=seed, lanes=lanes)
    if isinstance(order, UserError):
        event("a set is never drawn")
        return
    seen = [Counter() for _ in sizes]
    for phase in phases:
        total = sum(map(Fraction, phase.mixture.values()))
        share = [Fraction(phase.mixture.get(f"s{i}", 0)) / total for i in range(len(sizes))]
        given_here = Counter()
        for step in range(phase.first, phase.end):
            datasets, records = (column.tolist() for column in order.batch(step))
            assert len(datasets) == len(records) == phase.global_batch
            in_batch = Counter(datasets)
            given_here += in_batch
            done = phase.global_batch * (step + 1 - phase.first)
            for i in range(len(sizes)):
                assert abs(in_batch[i] - share[i] * phase.global_batch) <= in_a_batch(len(phase.mixture)) + ROUNDED
                assert abs(given_here[i] - share[i] * done) <= in_total(len(phase.mixture)) + ROUNDED
                if share[i] == 0:
                    assert in_batch[i] == 0
            for i, record in zip(datasets, records, strict=True):
                seen[i][record] += 1
            for i, shards in enumerate(sizes):
                assert set(seen[i]) <= set(range(sum(shards)))
                epochs, more = divmod(seen[i].total(), sum(shards))
                times = sorted(seen[i][record] for record in range(sum(shards)))
                assert times == [epochs] * (sum(shards) - more) + [epochs + 1] * more
        assert all(given_here[i] > 0 for i in range(len(sizes)) if share[i])
    assert order.drawn(phases[-1].end) == {f"s{i}": seen[i].total() for i in range(len(sizes))}


@given(sets_of_shards, lane_counts, st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 4]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_ranks_workers_micro_batches_and_first_step_see_one_order(sizes, lanes, ranks, size, workers) -> None:
    """Rank r takes its run of micro-batches, worker w every so-manieth of those, each with a copy of the order
    that has only been asked for those steps. Steps in different phases, sets of one shard and of several."""
    names = [f"s{i}" for i in range(len(sizes))]
    phases = [
        Phase("pretrain", "a", 0, 5, 0.1, 0.1, 16, (64, 64), 24, size, dict.fromkeys(names, 1.0)),
        Phase("pretrain", "b", 5, 4, 0.1, 0.1, 16, (64, 64), 48, size, {names[0]: 1.0}),
    ]
    order, fresh = (made(sizes, phases, seed=1, lanes=lanes) for _ in range(2))
    assert isinstance(order, DataOrder)
    expected = {step: [column.tolist() for column in order.batch(step)] for step in range(9)}
    for phase, start in ((phases[0], 3), (phases[1], 5)):
        mine = phase.global_batch // size // ranks
        got = {step: [[-1] * phase.global_batch for _ in range(2)] for step in range(start, phase.end)}
        for rank in range(ranks):
            indices = [(s, m) for s in range(start, phase.end) for m in range(rank * mine, (rank + 1) * mine)]
            for worker in range(workers):
                copy = deepcopy(fresh)
                for step, number in indices[worker::workers]:
                    slots = slice(number * size, (number + 1) * size)
                    for column, values in zip(got[step], copy.batch(step), strict=True):
                        column[slots] = values[slots].tolist()
        assert got == {step: expected[step] for step in got}


@given(st.lists(weights, min_size=2, max_size=6), st.integers(1, 30), st.integers(1, 15), st.integers(0, 1))
@settings(max_examples=100, deadline=None)
def test_an_error_at_the_start_says_which_set_its_phase_would_never_draw(w, batch, steps, where) -> None:
    """Counts do not depend on a phase's length, so one that is long enough for every set tells what its first
    steps give. The phase in question may be the second."""
    mixture = {f"s{i}": weight for i, weight in enumerate(w)}

    def order_of(steps: int) -> DataOrder | UserError:
        before = [Phase("pretrain", "first", 0, 3, 0.1, 0.1, 16, (64, 64), 4, 1, {"s0": 1.0})][:where]
        first = 3 * where
        asked = Phase("pretrain", "asked", first, steps, 0.1, 0.1, 16, (64, 64), batch, 1, mixture)
        return made([[50]] * len(w), [*before, asked], seed=0)

    long = order_of(20_000)
    assert isinstance(long, DataOrder)
    drawn = Counter()
    for step in range(3 * where, 3 * where + steps):
        drawn.update(long.batch(step).dataset.tolist())
    never = [f"s{i}" for i in range(len(w)) if drawn[i] == 0]
    event(f"{len(never)} sets never drawn")
    result = order_of(steps)
    assert isinstance(result, UserError) == bool(never)
    if isinstance(result, UserError):
        assert any(f"pretrain.mixture.{name}:" in str(result) for name in never)
        assert "'asked'" in str(result)


@pytest.mark.parametrize("lanes", [1, 3, 128])
def test_a_set_of_one_record_beside_a_large_one(lanes: int) -> None:
    """The large set of one shard is read through in an epoch while the small one repeats itself."""
    phase = Phase("pretrain", "all", 0, 100, 0.1, 0.1, 16, (64, 64), 8, 1, {"s0": 1.0, "s1": 7.0})
    order = made([[1], [350]], [phase], seed=0, lanes=lanes)
    assert isinstance(order, DataOrder)
    large = [r for s in range(50) for d, r in zip(*map(list, order.batch(s)), strict=True) if d == 1]
    assert sorted(large) == list(range(350))
    assert order.drawn(50) == {"s0": 50, "s1": 350}
    assert list(accumulate(order.drawn(100).values()))[-1] == 800
