#!/usr/bin/env python
"""Render the synthetic world to MP4 files: OUT/{train,val}/<shape>-<motion>/NNNNN.mp4."""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.data.synthetic import World, write_videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--clips", type=int, default=2048, help="training clips")
    parser.add_argument("--val-clips", type=int, default=640, help="held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=World.size, help="pixels, width and height")
    parser.add_argument("--fps", type=int, default=World.fps)
    parser.add_argument("--seconds", type=float, default=World.seconds)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if min(args.clips, args.size, args.fps, args.workers) < 1 or args.val_clips < 0 or args.seconds * args.fps < 1:
        raise UserError("counts and sizes must be positive", where="make_synthetic.py")
    world = World(size=args.size, fps=args.fps, seconds=args.seconds)
    total = args.clips + args.val_clips
    with tqdm(total=total, unit="clip", desc=f"rendering {args.out}") as bar:
        for done in write_videos(
            args.out, world, seed=args.seed, train=args.clips, val=args.val_clips, workers=args.workers
        ):
            bar.update(done - bar.n)


if __name__ == "__main__":
    run_command(main)
