"""Render a synthetic world to MP4 files.

python tools/make_synthetic.py OUT             moving shapes: OUT/{train,val}/<shape>-<motion>/NNNNN.mp4
python tools/make_synthetic.py OUT --robot     a robot that explores, in DROID's layout: OUT/{train,val}/NNNNN/…
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, program
from vjepa_scale.core.ranks import usable_cores
from vjepa_scale.demo.robot_world import RobotWorld
from vjepa_scale.demo.synthetic import World, write_videos

SHAPES_CLIPS, ROBOT_CLIPS = (2048, 640), (256, 32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--robot", action="store_true", help="trajectories of the synthetic robot")
    train_help, val_help = (
        f"(default: {shapes}, {robot})" for shapes, robot in zip(SHAPES_CLIPS, ROBOT_CLIPS, strict=True)
    )
    parser.add_argument("--clips", "--trajectories", type=int, help=f"for training {train_help}")
    parser.add_argument("--val-clips", "--val-trajectories", type=int, help=f"held out {val_help}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help=f"pixels, width and height (default: {World.size}, {RobotWorld.size})")
    parser.add_argument("--fps", type=int, help=f"(default: {World.fps}, {RobotWorld.fps})")
    parser.add_argument("--seconds", type=float, help=f"of a clip (default: {World.seconds}, {RobotWorld.seconds})")
    parser.add_argument(
        "--tint", type=float, help=f"of shapes: how far colours stray from grey (default: {World.tint})"
    )
    parser.add_argument(
        "--noise", type=float, help=f"on shapes: drawn for every pixel and frame (default: {World.noise})"
    )
    parser.add_argument("--workers", type=int, default=usable_cores())
    args = parser.parse_args(argv)
    kind = RobotWorld if args.robot else World
    usual = ROBOT_CLIPS if args.robot else SHAPES_CLIPS
    train = usual[0] if args.clips is None else args.clips
    val = usual[1] if args.val_clips is None else args.val_clips
    size = kind.size if args.size is None else args.size
    fps = kind.fps if args.fps is None else args.fps
    seconds = kind.seconds if args.seconds is None else args.seconds
    if min(train, size, fps, args.workers) < 1 or val < 0 or seconds * fps < 1:
        raise UserError("counts and sizes must be positive", where=program("make_synthetic"))
    looks = {name: value for name in ("tint", "noise") if (value := getattr(args, name)) is not None}
    if not all(0 <= value <= 1 for value in looks.values()):
        raise UserError("shares of the range of brightness lie between 0 and 1", where=f"--{' and --'.join(looks)}")
    if looks and args.robot:
        raise UserError("only for moving shapes", where=f"--{' and --'.join(looks)}", fix="leave it out with --robot")
    counts = {"seed": args.seed, "train": train, "val": val, "workers": args.workers}
    if args.robot:
        from vjepa_scale.demo.robot import write_trajectories  # PyTorch

        progress = write_trajectories(args.out, RobotWorld(size=size, fps=fps, seconds=seconds), **counts)
    else:
        progress = write_videos(args.out, World(size=size, fps=fps, seconds=seconds, **looks), **counts)
    with tqdm(total=train + val, unit="clip", desc=f"rendering {args.out}", disable=None) as bar:
        for done in progress:
            bar.update(done - bar.n)
    print(f"{args.out}: {train} {'trajectories' if args.robot else 'clips'} for training, {val} held out")


if __name__ == "__main__":
    run_command(main)
