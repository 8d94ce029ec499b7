"""Is impossible motion surprising to some models? docs/surprise.md's table: pairs of videos that differ in an event.

Each model is a folder that load_model takes, trained on the demo's world (make demo leaves runs/demo/pretrain); beside
it stands the same network before training. A standard error counts the pairs of all seeds together.

    OMP_NUM_THREADS=1 python benchmarks/surprise.py runs/demo/pretrain [MODEL …] [--pairs 200] [--seeds 1000 1001]
"""

import argparse
from math import sqrt
from pathlib import Path
from statistics import mean

from vjepa_scale.core.errors import run_command
from vjepa_scale.data.impossible import EVENTS
from vjepa_scale.inference.model import load_model
from vjepa_scale.report.surprise import PAIRS, surprise_of_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001], help="of the pairs; no training set's")
    arguments = parser.parse_args()
    head = ("", "all", "of each seed", *EVENTS, "by the maximum", "untrained")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for path in arguments.models:
        model = load_model(path)
        found = [surprise_of_pairs(model, seed=seed, pairs=arguments.pairs) for seed in arguments.seeds]
        share, pairs = mean(one["pairs_right"] for one in found), arguments.pairs * len(found)
        each = ", ".join(f"{one['pairs_right']:.2f}" for one in found)
        kinds = [f"{mean(one['by_kind'].get(event, float('nan')) for one in found):.2f}" for event in EVENTS]
        rest = [f"{mean(one[key] for one in found):.2f}" for key in ("by_maximum", "untrained")]
        cells = (str(path), f"{share:.2f} ± {sqrt(share * (1 - share) / pairs):.2f}", each, *kinds, *rest)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main)
