#!/usr/bin/env python
"""A folder of videos -> WebDataset shards, with manifest.json and rejected.jsonl, in OUT.

A video's class is the folder it is in, relative to VIDEOS. Run it again to go on after an interruption.
"""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.data.shards import Settings, Summary, make_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="a folder; every file below it is looked at")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the shards")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: cores)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-records", type=int, metavar="N", help="clips per shard")
    size.add_argument("--shard-mb", type=int, metavar="N", default=256, help="megabytes per shard (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the clips in the shards")
    args = parser.parse_args()
    for flag, value in (
        ("--workers", args.workers),
        ("--shard-records", args.shard_records),
        ("--shard-mb", args.shard_mb),
    ):
        if value is not None and value < 1:
            raise UserError(f"{value} is too few", where=f"make_shards.py {flag}", fix="1 or more")

    settings = Settings(seed=args.seed, shard_records=args.shard_records, shard_mb=args.shard_mb)
    bars: dict[str, tqdm] = {}

    def progress(doing: str, done: int, total: int) -> None:
        if doing not in bars:
            bars[doing] = tqdm(desc=doing, total=total, disable=None)  # only where someone watches
        bars[doing].update()
        if done == total:
            bars[doing].close()

    summary = make_shards(args.videos, args.out, settings, workers=args.workers, progress=progress)
    report(args.out, summary)


def _cores() -> int:
    """Cores this process may use (Slurm gives fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(out: Path, summary: Summary) -> None:
    done = "already there" if summary.existed else "written"
    print(
        f"{out}: {summary.clips} clips, {summary.hours:.2f} h, {summary.bytes / 1e6:.1f} MB "
        f"in {summary.shards} shards {done}"
    )
    print(
        f"rejected: {sum(summary.rejected.values())}" + (f" (see {out / 'rejected.jsonl'})" if summary.rejected else "")
    )
    for reason, count in summary.rejected.items():
        print(f"  {count:6d}  {reason}")


if __name__ == "__main__":
    run_command(main)
