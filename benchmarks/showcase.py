"""Is what was trained worth something? The demo's chain for longer, over several seeds of data, weights and episodes.

python benchmarks/showcase.py [key=value …] [--seeds 0 1 2] [--out runs/showcase] [--record]

Prints means and spreads over the seeds, and whether each margin is there: trained features over untrained ones and over
pixels, planning over both baselines, and both controls. ``--record`` writes benchmarks/results/showcase.json: the keys
of a run's summary.json, means over seeds, and the standard deviations under ``std``. docs/learning.md tells with which
seeds settings were found. Exit code 1 where a margin is missing.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vjepa_scale.recipe import load_recipe, recipe_yaml

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "showcase.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/showcase.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/showcase"))
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    summaries = [run_seed(arguments, seed) for seed in arguments.seeds]
    table = dict(zip(paths(summaries[0]), zip(*(paths(s).values() for s in summaries), strict=True), strict=True))
    print(f"\n{'over seeds ' + ', '.join(map(str, arguments.seeds)):<48}{'mean':>10}{'std':>10}")
    for path, values in table.items():
        print(f"{path:<48}{mean(values):>10.4g}{spread(values):>10.2g}")
    print()
    missing = 0
    for there, said in margins(table):
        print(f"{'yes' if there else 'NO ':<5}{said}")
        missing += not there
    if arguments.record:
        whole = merged(summaries, mean) | {"seeds": arguments.seeds, "std": merged(summaries, spread)}
        RESULT.write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if missing else 0


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One whole chain, by the demo's command, unless it is there, of the same recipe."""
    run, data = arguments.out / f"seed{seed}", arguments.out / f"data{seed}" / "shards"
    shards = {"synthetic": "train", "held_out": "val", "robot": "robot"}
    words = [f"run.dir={run}", f"run.seed={seed}", f"data.seed={seed}", *arguments.overrides]
    words += [f"data.sets.{name}.path={data / folder}" for name, folder in shards.items()]
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), arguments.recipe, *words, "--data-seed", str(seed)]
    summary = run / "summary.json"
    if not summary.exists():
        subprocess.run(command, check=True)
    elif recipe_yaml(load_recipe(run / "recipe.yaml")) != recipe_yaml(load_recipe(arguments.recipe, words)):
        sys.exit(f"error: {summary} is of another recipe (remove {run} and {run}-untrained, or choose another --out)")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def spread(values: Any) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def paths(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a summary, by dotted key."""
    out: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= paths(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            out[prefix + key] = float(value)
    return out


def merged(trees: list[dict[str, Any]], over: Any) -> dict[str, Any]:
    """The same keys, numbers merged over the summaries; what is no number is the first one's."""
    first, out = trees[0], {}
    for key, value in first.items():
        if isinstance(value, dict):
            out[key] = merged([tree[key] for tree in trees], over)
        else:
            out[key] = over([tree[key] for tree in trees]) if isinstance(value, int | float) else value
    return out


def margins(table: dict[str, tuple[float, ...]]) -> Iterator[tuple[bool, str]]:
    """Whether each is there, and in words."""
    trained, untrained, pixels = (table[f"probe.{name}"] for name in ("trained", "untrained", "pixels"))
    gain = [a - b for a, b in zip(trained, untrained, strict=True)]
    error = spread(gain) / math.sqrt(len(gain))
    yield (
        mean(gain) >= 0.10 and mean(gain) >= 2 * error,
        f"probe: trained − untrained {100 * mean(gain):.1f} points ± {100 * error:.1f} (10, and two errors)",
    )
    over = mean(trained) - mean(pixels)
    yield over > 0, f"probe: trained − pixels {100 * over:.1f} points (above 0)"
    success, baseline = mean(table["planning.success"]), max(mean(table[f"planning.{n}"]) for n in ("random", "still"))
    yield success - baseline >= 0.30, f"planning: {100 * (success - baseline):.0f} points above both baselines (30)"
    chance, clips = mean(table["chance"]), mean(table["evaluation.held_out_clips"])
    dealt, bound = mean(table["controls.labels_dealt_at_random"]), 3 * math.sqrt(chance * (1 - chance) / clips)
    yield (
        abs(dealt - chance) <= bound,
        f"labels dealt at random: {dealt:.1%}, chance {chance:.1%} (within {bound:.1%}: three errors)",
    )
    by_chance = mean(table["parts.motion.chance"])
    ordered = mean(table["parts.motion.linear_probe.trained"]) - by_chance
    shuffled = mean(table["controls.motion_with_frames_shuffled"]) - by_chance
    yield (
        ordered > 0 and shuffled <= ordered / 2,
        f"motion over chance: {100 * ordered:.1f} points, with frames shuffled {100 * shuffled:.1f} (at most half)",
    )


if __name__ == "__main__":
    sys.exit(main())
