"""Make WebDataset shards of videos and images, with manifest.json and rejected.jsonl, in OUT.

python tools/make_shards.py VIDEOS OUT       make the shards; run it again to continue after an interruption
python tools/make_shards.py DROID OUT --trajectories droid     robot trajectories, with their states
python tools/make_shards.py VIDEOS OUT --val 0.05     two data sets, OUT/train and OUT/val
python tools/make_shards.py VIDEOS OUT --cluster slurm --jobs 64 --profile mine     the same, as Slurm jobs
python tools/make_shards.py check DIR        verify a folder of shards; exit code 1 if something is wrong
python tools/make_shards.py index DIR        write a manifest for shards of other tools

VIDEOS is a folder (a video's class is the folder it is in, relative to VIDEOS) or a list of files: `path label`
lines, CSV with a header, or JSON lines. docs/shards.md describes everything.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, program, run_console_command
from vjepa_scale.core.ranks import usable_cores
from vjepa_scale.data.trajectories import NUMBERS
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.index import index_shards
from vjepa_scale.shards.make import FPS, Settings, Summary, make_shards, make_split
from vjepa_scale.shards.sources import SIDES
from vjepa_scale.shards.trajectories import LAYOUTS
from vjepa_scale.shards.transcode import FASTEST, SHORTEST_SIDE, SLOWEST, standard_rate

_SECONDS_PER_LINE = 30
_CPUS_PER_JOB = 8
_TIMEOUT_MIN = 720


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("check", "index"):
        return look_after(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="a folder, whose files are all probed, or a list")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the shards")
    parser.add_argument("--workers", type=int, help="processes (default: cores)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-records", type=int, metavar="N", help="clips per shard")
    size.add_argument("--shard-mb", type=int, metavar="N", default=256, help="megabytes per shard (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the clips in the shards")
    parser.add_argument("--images", action="store_true", help="also take images, as static clips")
    parser.add_argument(
        "--segment",
        type=float,
        metavar="SECONDS",
        help="cut longer videos into clips of up to this length: at keyframes, or exactly with --transcode",
    )
    parser.add_argument(
        "--min-seconds", type=float, metavar="SECONDS", default=0.0, help="reject shorter clips (default: 0)"
    )
    parser.add_argument(
        "--decode-timeout",
        type=float,
        metavar="SECONDS",
        default=60.0,
        help="reject a file whose decoder gives no new frame for so long (default: 60)",
    )
    split = parser.add_argument_group("a split")
    split.add_argument("--val", type=float, metavar="FRACTION", help="make OUT/train, and of this fraction OUT/val")
    split.add_argument(
        "--val-by",
        metavar="GROUP",
        help="groups that stay on one side: source (the default: all parts of a file), folder, or a column of the list",
    )
    _add_encoding_flags(parser)
    _add_trajectory_flags(parser)
    _add_cluster_flags(parser)
    args = parser.parse_args(argv)
    _check_encoding_flags(args)
    _check_trajectory_flags(args)
    _check_cluster_flags(args)
    for flag, value in (
        ("--workers", args.workers),
        ("--jobs", args.jobs),
        ("--cpus-per-job", args.cpus_per_job),
        ("--timeout-min", args.timeout_min),
        ("--shard-records", args.shard_records),
        ("--shard-mb", args.shard_mb),
    ):
        if value is not None and value < 1:
            raise UserError(f"{value} is too few", where=_flag(flag), fix="1 or more")
    if args.segment is not None and not args.segment >= 0.1:
        raise UserError(f"{args.segment} s is no segment", where=_flag("--segment"), fix="0.1 seconds or more")
    if not 1 <= args.decode_timeout < math.inf:
        fix = "1 second or more"
        raise UserError(f"{args.decode_timeout} is too short", where=_flag("--decode-timeout"), fix=fix)
    if not args.min_seconds >= 0:
        raise UserError(f"{args.min_seconds} is no length", where=_flag("--min-seconds"), fix="0 or more")

    if args.val is not None and not 0 < args.val < 1:
        raise UserError(f"{args.val} is no fraction", where=_flag("--val"), fix="for example 0.05")
    if args.val is None and args.val_by is not None:
        raise UserError("only for a split", where=_flag("--val-by"), fix="give --val too, for example 0.05")

    settings = Settings(
        seed=args.seed,
        shard_records=args.shard_records,
        shard_mb=args.shard_mb,
        images=args.images,
        segment_s=args.segment,
        min_s=args.min_seconds,
        decode_timeout_s=args.decode_timeout,
        trajectories=args.trajectories,
        view=args.view or Settings.view,
        retime=args.retime,
        transcode=args.transcode is not None,
        short_side=None if args.transcode is True else args.transcode,
        fps=args.fps and str(args.fps),
        val=args.val or 0.0,
        val_by=args.val_by or Settings.val_by,
    )
    if args.cluster == "slurm":
        return _on_slurm(args, settings)

    def make(out: Path, asked: Settings) -> Summary:
        return make_shards(args.videos, out, asked, workers=args.workers or usable_cores(), progress=Watch())

    _make(args, settings, make)
    return 0


def _flag(name: str) -> str:
    """Returns a flag with its command, for error messages."""
    return f"{program('make_shards')} {name}"


def _make(args: argparse.Namespace, settings: Settings, make: Callable[[Path, Settings], Summary]) -> None:
    if args.val is None:
        report(args.out, make(args.out, settings))
        return
    for side, summary in make_split(args.videos, args.out, settings, make).items():
        report(args.out / side, summary)


def _add_encoding_flags(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--copy", action="store_true", help="keep the bytes, and cut by copying packets, at keyframes: the default"
    )
    ways.add_argument(
        "--transcode",
        type=int,
        nargs="?",
        const=True,
        metavar="SHORT_SIDE",
        help="transcode videos: h264 at a constant rate, a keyframe every 30 frames; the short side at most this many "
        "pixels (without a number: unchanged)",
    )
    parser.add_argument(
        "--fps", type=_rate, metavar="N", help="with --transcode: frames per second, 30 or 30000/1001 (default: source)"
    )


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not SLOWEST <= rate <= FASTEST:
        raise UserError(f"{text} is no frame rate", where=_flag("--fps"), fix="for example 30, or 30000/1001")
    return standard_rate(float(rate))


def _check_encoding_flags(args: argparse.Namespace) -> None:
    if args.transcode is None:
        if args.fps:
            raise UserError("only for --transcode", where=_flag("--fps"), fix="give --transcode too")
    elif args.transcode is not True and args.transcode < SHORTEST_SIDE:
        fix = f"{SHORTEST_SIDE} pixels or more, for example 288"
        raise UserError(f"{args.transcode} is too small", where=_flag("--transcode"), fix=fix)


def _add_trajectory_flags(parser: argparse.ArgumentParser) -> None:
    robots = parser.add_argument_group("robot trajectories")
    robots.add_argument("--trajectories", choices=LAYOUTS, help="VIDEOS holds trajectories in this layout")
    robots.add_argument("--view", metavar="NAME", help=f"the camera: wrist, left, … (default: {Settings.view})")
    robots.add_argument(
        "--retime", action="store_true", help="give videos with one frame per step the times of their logs"
    )


def _check_trajectory_flags(args: argparse.Namespace) -> None:
    if args.trajectories is None:
        for flag in ("view", "retime"):
            if getattr(args, flag):
                fix = "give --trajectories droid"
                raise UserError("only for trajectories", where=_flag(f"--{flag}"), fix=fix)
        return
    for flag, why in (
        ("segment", "states would have to be cut with the video"),
        ("transcode", "a constant rate would lose the log's times"),
        ("images", "a trajectory has a video"),
    ):
        if getattr(args, flag):
            fix = f"leave it out: with --trajectories {why}"
            raise UserError("not with --trajectories", where=_flag(f"--{flag}"), fix=fix)


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--cluster", choices=["slurm"], help="run as Slurm jobs, which this command follows")
    cluster.add_argument("--jobs", type=int, metavar="N", help="number of concurrent jobs")
    cluster.add_argument(
        "--cpus-per-job", type=int, metavar="C", help=f"cores and processes of a job (default: {_CPUS_PER_JOB})"
    )
    cluster.add_argument(
        "--timeout-min", type=int, metavar="M", help=f"a job's time limit, in minutes (default: {_TIMEOUT_MIN})"
    )
    cluster.add_argument("--profile", metavar="NAME_OR_YAML", help="the site's (docs/slurm_profiles.md)")
    cluster.add_argument("--print-sbatch", action="store_true", help="print the batch scripts and stop")


def _check_cluster_flags(args: argparse.Namespace) -> None:
    if args.cluster is None:
        for flag in ("jobs", "cpus_per_job", "timeout_min", "profile", "print_sbatch"):
            if getattr(args, flag):
                name = flag.replace("_", "-")
                raise UserError("only for a cluster", where=_flag(f"--{name}"), fix="give --cluster slurm too")
        return
    if args.jobs is None:
        raise UserError("how many jobs?", where=_flag("--cluster slurm"), fix="give --jobs, for example 64")
    if args.workers is not None:
        fix = "--jobs and --cpus-per-job say how many there"
        raise UserError("counts processes on this machine", where=_flag("--workers"), fix=fix)


def _on_slurm(args: argparse.Namespace, settings: Settings) -> int:
    from vjepa_scale.launch import shard_jobs  # imports submitit, which a run on this machine does not need
    from vjepa_scale.launch.follow_shard_jobs import JobFailedError

    asked = shard_jobs.Asked(
        jobs=args.jobs,
        profile=args.profile,
        cpus=args.cpus_per_job or _CPUS_PER_JOB,
        timeout_min=args.timeout_min or _TIMEOUT_MIN,
    )
    if args.print_sbatch:
        for out in [args.out] if args.val is None else [args.out / side for side in SIDES]:
            for step, text in shard_jobs.scripts(out, asked).items():
                print(f"# -- {step}.sbatch\n{text}")
        return 0

    def make(out: Path, settings: Settings) -> Summary:
        return shard_jobs.make_shards_on_slurm(args.videos, out, settings, asked, progress=Watch())

    try:
        _make(args, settings, make)
    except JobFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def look_after(command: str, arguments: Sequence[str]) -> int:
    """Runs the commands on a folder of shards."""
    parser = argparse.ArgumentParser(prog=f"{program('make_shards')} {command}")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of shards")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: cores)")
    if command == "check":
        parser.add_argument("--decode", action="store_true", help="decode every clip, too")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        raise UserError(f"{args.workers} is too few", where=_flag(f"{command} --workers"), fix="1 or more")
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
    """Shows progress with rate and remaining time: a bar on a terminal; occasional lines in a log."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._said: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, doing: str, done: int, total: int) -> None:
        if doing not in self._bars:
            self._bars[doing] = tqdm(desc=doing, total=total, initial=done, disable=None)
            self._said[doing] = time.monotonic()
            self._began[doing] = self._said[doing], done  # excludes work of an earlier run from the rate
        bar, now = self._bars[doing], time.monotonic()
        bar.update(done - bar.n)
        if done == total:
            bar.close()
        if bar.disable and now - self._said[doing] >= _SECONDS_PER_LINE:
            self._said[doing] = now
            began, first = self._began[doing]
            rate = max(done - first, 1) / (now - began)
            print(f"{doing}: {done} of {total}, {rate:.1f} a second, {(total - done) / rate / 60:.0f} minutes left")
            sys.stdout.flush()


def report(out: Path, summary: Summary) -> None:
    done = "already there" if summary.existed else "written"
    print(
        f"{out}: {_counted(summary.clips, 'clip')}, {_lasting(summary.hours)}, {summary.bytes / 1e6:.1f} MB "
        f"in {_counted(summary.shards, 'shard')} {done}"
    )
    sizes = {f"{width}x{height}": count for (width, height), count in summary.resolutions.items()}
    rates = {f"{rate:g}" if rate else "still": count for rate, count in summary.rates.items()}
    print(f"resolutions: {_most(sizes)}")
    print(f"frames a second: {_most(rates)}")
    if summary.classes or summary.unlabelled:
        named = f": {_most(summary.class_clips)}" if summary.class_clips else ""
        without = f"; {_counted(summary.unlabelled, 'clip')} without a label" if summary.unlabelled else ""
        print(f"classes: {summary.classes}{named}{without}")
    if summary.seconds is not None:
        shortest, median, longest = summary.seconds
        line = f"seconds: {shortest:.3g} to {longest:.3g}, half of them at most {median:.3g}"
        if any(summary.short.values()):
            counts = (f"{count} ({count / summary.clips:.1%}) than {n} frames" for n, count in summary.short.items())
            line += f"; shorter {', '.join(counts)} at {FPS:g} a second, so that clips repeat their last picture"
        print(line)
    if summary.trajectories is not None:  # each has two states or more, and so an action
        for kind, what in (("states", "states, from"), ("actions", "actions, step by step, from")):
            statistics = summary.trajectories[kind]
            spans = zip(NUMBERS, statistics["min"], statistics["max"], strict=True)
            print(f"{what}: {', '.join(f'{name} {low:.3g} to {high:.3g}' for name, low, high in spans)}")
    print(
        f"rejected: {sum(summary.rejected.values())}" + (f" (see {out / 'rejected.jsonl'})" if summary.rejected else "")
    )
    for reason, count in summary.rejected.items():
        print(f"  {count:6d}  {reason}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _lasting(hours: float) -> str:
    """Formats a duration: in hours, or in minutes below one hour, or in seconds below one minute."""
    if hours >= 1:
        return f"{hours:.2f} h"
    return f"{60 * hours:.1f} min" if 60 * hours >= 1 else f"{3600 * hours:.1f} s"


def _most(counts: dict[str, int], shown: int = 6) -> str:
    named = [f"{name} ({count})" for name, count in list(counts.items())[:shown]]
    return ", ".join(named) + (f" and {len(counts) - shown} more" if len(counts) > shown else "")


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
