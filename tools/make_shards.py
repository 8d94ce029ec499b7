#!/usr/bin/env python
"""Videos and images -> WebDataset shards, with manifest.json and rejected.jsonl, in OUT.

python tools/make_shards.py VIDEOS OUT       make the shards; run it again to go on after an interruption
python tools/make_shards.py check DIR        verify a folder of shards; exit code 1 if something is wrong
python tools/make_shards.py index DIR        a manifest for shards that others have made

VIDEOS is a folder (a video's class is the folder it is in, relative to VIDEOS) or a list of files: `path label`
lines, CSV with a header, or JSON lines. docs/shards.md has all of it.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.data.ingest.check import check_shards
from vjepa_scale.data.ingest.index import index_shards
from vjepa_scale.data.ingest.shards import Settings, make_shards
from vjepa_scale.data.ingest.summary import Summary

_SECONDS_PER_LINE = 30


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("check", "index"):
        return look_after(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "videos", type=Path, metavar="VIDEOS", help="a folder, of which every file is looked at; a list"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the shards")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: cores)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-records", type=int, metavar="N", help="clips per shard")
    size.add_argument("--shard-mb", type=int, metavar="N", default=256, help="megabytes per shard (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the clips in the shards")
    parser.add_argument("--images", action="store_true", help="take pictures too, as clips that stand still")
    parser.add_argument(
        "--segment",
        type=float,
        metavar="SECONDS",
        help="cut longer videos at keyframes into clips of up to this length",
    )
    parser.add_argument(
        "--min-seconds", type=float, metavar="SECONDS", default=0.0, help="reject shorter clips (default: 0)"
    )
    parser.add_argument(
        "--copy", action="store_true", help="keep the bytes, and cut by copying packets: the default, and all there is"
    )
    args = parser.parse_args()
    for flag, value in (
        ("--workers", args.workers),
        ("--shard-records", args.shard_records),
        ("--shard-mb", args.shard_mb),
    ):
        if value is not None and value < 1:
            raise UserError(f"{value} is too few", where=f"make_shards.py {flag}", fix="1 or more")
    if args.segment is not None and not args.segment > 0:
        raise UserError(f"{args.segment} is no length", where="make_shards.py --segment", fix="seconds above 0")
    if not args.min_seconds >= 0:
        raise UserError(f"{args.min_seconds} is no length", where="make_shards.py --min-seconds", fix="0 or more")

    settings = Settings(
        seed=args.seed,
        shard_records=args.shard_records,
        shard_mb=args.shard_mb,
        images=args.images,
        segment_s=args.segment,
        min_s=args.min_seconds,
    )
    report(args.out, make_shards(args.videos, args.out, settings, workers=args.workers, progress=Watch()))
    return 0


def look_after(command: str, arguments: Sequence[str]) -> int:
    """The commands on a folder of shards."""
    parser = argparse.ArgumentParser(prog=f"make_shards.py {command}")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of shards")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: cores)")
    if command == "check":
        parser.add_argument("--decode", action="store_true", help="decode every clip, too")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        raise UserError(f"{args.workers} is too few", where=f"make_shards.py {command} --workers", fix="1 or more")
    if command == "index":
        report(args.folder, index_shards(args.folder, workers=args.workers, progress=Watch()))
        return 0
    wrong = check_shards(args.folder, decode=args.decode, workers=args.workers, progress=Watch())
    for line in wrong:
        print(line)
    print(f"{args.folder}: " + _verdict(len(wrong)))
    return 1 if wrong else 0


def _verdict(wrong: int) -> str:
    if not wrong:
        return "all is as the manifest says"
    return "1 thing is wrong" if wrong == 1 else f"{wrong} things are wrong"


class Watch:
    """Progress with rate and time left: a bar for a terminal; in a log, a line now and then."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._said: dict[str, float] = {}

    def __call__(self, doing: str, done: int, total: int) -> None:
        if doing not in self._bars:
            self._bars[doing] = tqdm(desc=doing, total=total, disable=None)
            self._said[doing] = self._started = time.monotonic()
        bar, now = self._bars[doing], time.monotonic()
        bar.update()
        if done == total:
            bar.close()
        if bar.disable and now - self._said[doing] >= _SECONDS_PER_LINE:
            self._said[doing] = now
            rate = done / (now - self._started)
            print(f"{doing}: {done} of {total}, {rate:.1f} a second, {(total - done) / rate / 60:.0f} minutes left")
            sys.stdout.flush()


def _cores() -> int:
    """Cores this process may use (Slurm gives fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(out: Path, summary: Summary) -> None:
    done = "already there" if summary.existed else "written"
    print(
        f"{out}: {summary.clips} clips, {summary.hours:.2f} h, {summary.bytes / 1e6:.1f} MB "
        f"in {summary.shards} shards {done}"
    )
    sizes = {f"{width}x{height}": count for (width, height), count in summary.resolutions.items()}
    rates = {f"{rate:g}" if rate else "still": count for rate, count in summary.rates.items()}
    print(f"resolutions: {_most(sizes)}")
    print(f"frames a second: {_most(rates)}")
    print(
        f"rejected: {sum(summary.rejected.values())}" + (f" (see {out / 'rejected.jsonl'})" if summary.rejected else "")
    )
    for reason, count in summary.rejected.items():
        print(f"  {count:6d}  {reason}")


def _most(counts: dict[str, int], shown: int = 6) -> str:
    named = [f"{name} ({count})" for name, count in list(counts.items())[:shown]]
    return ", ".join(named) + (f" and {len(counts) - shown} more" if len(counts) > shown else "")


if __name__ == "__main__":
    run_command(main)
