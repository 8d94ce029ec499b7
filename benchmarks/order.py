"""Measures the cost of the data order for data sets of millions of records. Sizes are synthetic, no file is read.

Prints, for several numbers of lanes: microseconds of process CPU time per record of DataOrder.batch (every loader
worker computes whole global batches, so its time per step is this × the global batch); milliseconds of the first batch,
which builds the tables of an epoch; and how many distinct shards one rank reads in 100 steps, with its number of clips.

    python benchmarks/order.py --records 20000000 --batch 3072 --ranks 128
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import run_command
from vjepa_scale.data.order import DataOrder
from vjepa_scale.recipe import Phase

# Weight in the mixture (V-JEPA 2's videos and its image set, docs/method.md 7) and share of the records.
SETS = {
    "yt1b": (0.188, 0.864),
    "howto100m": (0.318, 0.05),
    "imagenet": (0.25, 0.045),
    "kinetics": (0.188, 0.033),
    "ssv2": (0.056, 0.008),
}
FIRST_STEP = 100_000  # the middle of a long run, where data sets are at different positions of different epochs
COUNTED_STEPS = 100

Sets = list[tuple[str, npt.NDArray[np.int64]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000_000, help="of all data sets together")
    parser.add_argument("--shard-records", type=int, default=1000, help="records of a shard")
    parser.add_argument("--batch", type=int, default=3072, help="clips of a global batch")
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 32, 128, 512], help="data.lanes, each measured")
    parser.add_argument("--steps", type=int, default=COUNTED_STEPS, help="steps that are timed")
    arguments = parser.parse_args(argv)
    sets = _sets(arguments.records, arguments.shard_records)
    records, shards = sum(int(sizes.sum()) for _, sizes in sets), sum(len(sizes) for _, sizes in sets)
    clips = COUNTED_STEPS * (arguments.batch // arguments.ranks)
    print(f"{records:,} records in {shards:,} shards of {len(sets)} data sets, global batch {arguments.batch:,};")
    print(f"distinct shards that one of {arguments.ranks} ranks reads in {COUNTED_STEPS} steps ({clips:,} clips)\n")
    print(f"{'lanes':>5} | {'µs per record':>13} | {'first batch, ms':>15} | {'shards: mean':>12} | {'most':>5}")
    for lanes in arguments.lanes:
        order = _order(sets, arguments.batch, lanes)
        began = time.process_time()
        order.batch(FIRST_STEP)
        first_ms = (time.process_time() - began) * 1e3
        began = time.process_time()
        for step in range(FIRST_STEP + 1, FIRST_STEP + 1 + arguments.steps):
            order.batch(step)
        us = (time.process_time() - began) / (arguments.steps * arguments.batch) * 1e6
        touched = _shards_per_rank(order, sets, arguments.ranks)
        print(f"{lanes:5} | {us:13.3f} | {first_ms:15.2f} | {np.mean(touched):12.1f} | {max(touched):5}", flush=True)
    return 0


def _sets(records: int, shard_records: int) -> Sets:
    """(name, records of each shard); the last shard of a set is smaller."""
    sets = []
    for name, (_, share) in SETS.items():
        whole, rest = divmod(max(1, round(records * share)), shard_records)
        sets.append((name, np.array([shard_records] * whole + [rest] * (rest > 0), np.int64)))
    return sets


def _order(sets: Sets, batch: int, lanes: int) -> DataOrder:
    mixture = {name: weight for name, (weight, _) in SETS.items()}
    phase = Phase("pretrain", "all", 0, 252_000, 1e-4, 1e-4, 16, (256, 256), batch, 24, mixture)
    return DataOrder(seed=0, sets=sets, phases=[phase], lanes=lanes)


def _shards_per_rank(order: DataOrder, sets: Sets, ranks: int) -> list[int]:
    """Returns how many distinct shards each rank reads; ranks have contiguous ranges of slots."""
    ends = [np.cumsum(sizes) for _, sizes in sets]
    before = np.cumsum([0, *(len(sizes) for _, sizes in sets)])
    steps = []
    for step in range(FIRST_STEP, FIRST_STEP + COUNTED_STEPS):
        dataset, record = order.batch(step)
        shard = np.empty_like(record)
        for i in range(len(sets)):
            here = dataset == i
            shard[here] = before[i] + np.searchsorted(ends[i], record[here], side="right")
        steps.append(shard)
    by_rank = np.array_split(np.stack(steps), ranks, axis=1)
    return [len(np.unique(shards)) for shards in by_rank]


if __name__ == "__main__":
    run_command(main)
