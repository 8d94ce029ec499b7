"""Measures the surprise of models at impossible motion: the table of docs/surprise.md, over pairs of videos.

Each model is a folder for load_model, trained on videos of tools/make_synthetic.py; the baseline is the same network
before training. ``--world`` gives the videos whose size, rate and appearance the pairs have; the default is the world
that make_synthetic renders without options. The standard error is over the pairs of all seeds. ``nan``: no pair has
this event, because there are fewer pairs than events.

    OMP_NUM_THREADS=1 python benchmarks/surprise.py runs/demo/pretrain --world runs/demo-data/videos
    OMP_NUM_THREADS=1 python benchmarks/surprise.py MODEL [MODEL …] [--pairs 200] [--seeds 1000 1001]
"""

import argparse
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean

from vjepa_scale.core.errors import run_command
from vjepa_scale.demo.surprise import EVENTS, PAIRS, surprise_of_pairs
from vjepa_scale.demo.synthetic import world_of
from vjepa_scale.inference.model import load_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--world", type=Path, metavar="FOLDER", help="a data set of make_synthetic")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001], help="of the pairs; no training set's")
    arguments = parser.parse_args(argv)
    world = None if arguments.world is None else world_of(arguments.world)
    head = ("", "all", "of each seed", *EVENTS, "by the maximum", "untrained")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for path in arguments.models:
        model = load_model(path)
        found = [surprise_of_pairs(model, world, seed=seed, pairs=arguments.pairs) for seed in arguments.seeds]
        share, pairs = mean(one["pairs_right"] for one in found), arguments.pairs * len(found)
        each = ", ".join(f"{one['pairs_right']:.2f}" for one in found)
        kinds = [f"{mean(one['by_kind'].get(event, float('nan')) for one in found):.2f}" for event in EVENTS]
        rest = [f"{mean(one[key] for one in found):.2f}" for key in ("by_maximum", "untrained")]
        cells = (str(path), f"{share:.2f} ± {sqrt(share * (1 - share) / pairs):.2f}", each, *kinds, *rest)
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
