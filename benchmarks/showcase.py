"""Evaluates the demo's chain over several seeds of data, weights and episodes.

python benchmarks/showcase.py [key=value …] [--seeds 21 22 23] [--out runs/showcase] [--record]
python benchmarks/showcase.py --check runs/demo/summary.json     one finished run, without training

Prints means and spreads over the seeds, and whether each margin is reached: trained features over untrained ones and
over pixels, planning over both baselines, and both controls. ``--record`` writes benchmarks/results/showcase.json: the
keys of a run's summary.json, means over seeds, and standard deviations under ``std``. docs/learning.md lists the seeds
that settings were chosen with; 21 to 29 are not among them. Exit code 1 where a margin is missing. A single run
(``--check``) must reach half of each margin of that file, or less where seeds differ much, because another CPU gives
other bits.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vjepa_scale.recipe import load_recipe, recipe_yaml
from vjepa_scale.report.write import write_comparison

ROOT = Path(__file__).parents[1]
SIZES = ("clips", "val-clips", "trajectories", "episodes")  # of the demo
TASKS = ("joint", "shape", "motion")
RESULT = ROOT / "benchmarks" / "results" / "showcase.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23])
    parser.add_argument("--out", type=Path, default=Path("runs/showcase"))
    parser.add_argument("--check", type=Path, metavar="SUMMARY", help="a finished run's summary.json")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/showcase.json")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help="as tools/demo.py has it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.check:
        checked, recorded = (table_of([json.loads(file.read_text())]) for file in (arguments.check, RESULT))
        return report(margins(checked, recorded))
    summaries = [run_seed(arguments, seed) for seed in arguments.seeds]
    table = table_of(summaries)
    print(f"\n{'over seeds ' + ', '.join(map(str, arguments.seeds)):<48}{'mean':>10}{'std':>10}")
    for path, values in table.items():
        print(f"{path:<48}{mean(values):>10.4g}{spread(values):>10.2g}")
    print()
    page = arguments.out / "report.html"
    write_comparison([arguments.out / f"seed{seed}" for seed in arguments.seeds], page)
    print(f"report of all seeds: {page}\n")
    if arguments.record:
        whole = merged(summaries, mean) | {"seeds": arguments.seeds, "std": merged(summaries, spread)}
        RESULT.write_text(json.dumps(whole, indent=1) + "\n")
    return report(margins(table))


def report(found: Iterator[tuple[bool, str]]) -> int:
    """Prints each margin; returns 1 if one is missing, else 0."""
    missing = 0
    for there, said in found:
        print(f"{'yes' if there else 'NO ':<5}{said}")
        missing += not there
    return 1 if missing else 0


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Runs one whole chain with the demo's command, unless its result of the same recipe exists."""
    run, data = arguments.out / f"seed{seed}", arguments.out / f"data{seed}" / "shards"
    shards = {"synthetic": "train", "held_out": "val", "robot": "robot"}
    words = [f"run.dir={run}", f"run.seed={seed}", f"data.seed={seed}", *arguments.overrides]
    words += [f"data.sets.{name}.path={data / folder}" for name, folder in shards.items()]
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), arguments.recipe, *words, "--data-seed", str(seed)]
    given = {name: getattr(arguments, name.replace("-", "_")) for name in SIZES}
    command += [word for name, size in given.items() if size is not None for word in (f"--{name}", str(size))]
    summary = run / "summary.json"
    if not summary.exists():
        subprocess.run(command, check=True)
    elif recipe_yaml(load_recipe(run / "recipe.yaml")) != recipe_yaml(load_recipe(arguments.recipe, words)):
        sys.exit(f"error: {summary} is of another recipe (remove {run} and {run}-untrained, or choose another --out)")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def table_of(summaries: Sequence[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Returns the numbers of all summaries, by dotted key."""
    numbers = [paths(summary) for summary in summaries]
    return {path: tuple(each[path] for each in numbers) for path in numbers[0]}


def spread(values: Any) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def paths(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a summary, by dotted key."""
    out: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= paths(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            out[prefix + key] = float(value)
    return out


def merged(trees: list[dict[str, Any]], over: Any) -> dict[str, Any]:
    """Merges numbers over the summaries, by key; takes other values from the first."""
    first, out = trees[0], {}
    for key, value in first.items():
        if isinstance(value, dict):
            out[key] = merged([tree[key] for tree in trees], over)
        else:
            out[key] = over([tree[key] for tree in trees]) if isinstance(value, int | float) else value
    return out


# Required margins, in points over the baseline.
WANTED = {"linear_probe": 10.0, "knn": 5.0, "attentive_probe": 10.0, "planning": 40.0}
NAMES = {"linear_probe": "linear", "knn": "k-NN"}


def gains(table: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """Returns points over the baseline by measure and task, means over the seeds of a table."""

    def points(key: str, *others: str) -> float:
        return 100 * (mean(table[key]) - max(mean(table[other]) for other in others))

    found: dict[str, dict[str, float]] = {
        "attentive_probe": {"": points("attentive_probe.trained.mean", "attentive_probe.untrained.mean")},
        "planning": {"": points("planning.success", "planning.random", "planning.still")},
    }
    for measure in NAMES:
        found[measure] = {}
        for task in TASKS:
            of = ("" if task == "joint" else f"parts.{task}.") + measure
            found[measure][task] = points(f"{of}.trained", f"{of}.untrained", f"{of}.pixels")
    return found


def limits_of(recorded: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """Returns the limits of one run, by measure and task, where several seeds reach the required margin.

    A limit is half of the seeds' mean, or two standard deviations below the mean where that is less.
    recorded: the numbers of the seeds' file
    """

    def limit(measure: str, task: str, gain: float) -> float:
        of = "" if task in ("", "joint") else f"parts.{task}."
        key = {"planning": "planning.success", "attentive_probe": "attentive_probe.trained.mean"}
        (std,) = recorded["std." + key.get(measure, f"{of}{measure}.trained")]
        return min(gain / 2, gain - 2 * 100 * std)

    return {
        measure: {task: limit(measure, task, gain) for task, gain in of_tasks.items() if gain >= WANTED[measure]}
        for measure, of_tasks in gains(recorded).items()
    }


def margins(
    table: dict[str, tuple[float, ...]], recorded: dict[str, tuple[float, ...]] | None = None
) -> Iterator[tuple[bool, str]]:
    """Yields whether each margin is reached, and a description. recorded: of several seeds, gives limits for one run"""
    limits = None if recorded is None else limits_of(recorded)
    over = {"attentive_probe": "the untrained encoder", "planning": "both baselines"}
    for measure, reached in gains(table).items():
        if limits is None:
            wanted, tasks = WANTED[measure], 2 if measure == "linear_probe" else 1
            there = sum(gain >= wanted for gain in reached.values()) >= tasks
            told = f"{wanted:g} points" + (f" on {tasks} of {len(reached)}" if len(reached) > 1 else "")
        else:
            there = all(reached[task] >= limit for task, limit in limits[measure].items())
            told = _listed(limits[measure], ".1f") + ": half of several seeds', or 2 std below"
        name = NAMES.get(measure, measure.partition("_")[0])
        beside = over.get(measure, "the better of untrained and pixels")
        yield there, f"{name} over {beside}: {_listed(reached, '+.1f')} ({told})"
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


def _listed(points: dict[str, float], form: str) -> str:
    return ", ".join(f"{task} {value:{form}}".strip() for task, value in points.items())


if __name__ == "__main__":
    sys.exit(main())
