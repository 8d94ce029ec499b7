"""Finds and tests the limits of a collapse (recipe/guard_sections.py): healthy runs, and runs made to collapse.

    python benchmarks/collapse.py [--seeds 11 12 13] [--steps 200] [--only VARIANT …] [--record]

Trains the demo's pretraining on moving shapes and robots, once per seed and variant. Prints, for each figure with a
limit, its range from the step on from which the limit holds, and the first step at which the run was flagged.
A healthy run must not be flagged; the others before half of their steps. Exit code 1 where that is not so.
``--record`` writes benchmarks/results/collapse.json. Limits were chosen with seeds 1, 2 and 3; 11 to 13 test them.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import run_command
from vjepa_scale.recipe.guard_sections import LIMITS
from vjepa_scale.run.events import History

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "collapse.json"
LOOKS = ("--size", "48", "--fps", "4", "--tint", "0.05", "--noise", "0.45")
# What each variant changes, and whether it must be flagged.
VARIANTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "healthy": ((), False),
    "target equals encoder": (("jepa.ema_momentum=0",), True),
    "rate 100 times too high": (("pretrain.phases.1.start_lr=0.15", "pretrain.phases.0.final_lr=0.15"), True),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clips", type=int, default=1024, help="of the moving shapes")
    parser.add_argument("--data", type=Path, default=Path("runs/collapse/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/collapse.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    make_data(arguments.data, arguments.clips)
    rows = []
    for name in arguments.only:
        changes, wanted = VARIANTS[name]
        for seed in arguments.seeds:
            run = arguments.out / f"{name.replace(' ', '_')}-{seed}"
            row = {"variant": name, "seed": seed, **train(run, arguments, seed, [*changes, *arguments.overrides])}
            flagged = row["flagged_at"] is not None
            row["as_it_should"] = row["flagged_at"] <= arguments.steps / 2 if wanted and flagged else wanted == flagged
            rows.append(row)
            print_row(row)
    if arguments.record:
        RESULT.write_text(json.dumps({"steps": arguments.steps, "runs": rows}, indent=1) + "\n")
    return 0 if all(row["as_it_should"] for row in rows) else 1


def make_data(folder: Path, clips: int) -> None:
    """Renders the demo's worlds, once."""
    for name, options in (("train", LOOKS), ("robot", ("--robot", "--size", "48", "--fps", "8"))):
        shards, videos = folder / "shards" / name, folder / "videos" / name
        if shards.exists():
            continue
        robot = ("--trajectories", "192", "--val-trajectories", "0")
        count = robot if name == "robot" else ("--clips", str(clips), "--val-clips", "0")
        tool("make_synthetic.py", videos, *options, *count)
        tool("make_shards.py", videos / "train", shards, *(("--trajectories", "droid") if name == "robot" else ()))


def train(run: Path, arguments: argparse.Namespace, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """Trains one run and returns the ranges of its figures, and the step at which it was flagged first."""
    shutil.rmtree(run, ignore_errors=True)
    sets = [f"data.sets.{name}.path={arguments.data / 'shards' / place}"
            for name, place in (("synthetic", "train"), ("robot", "robot"))]  # fmt: skip
    seeds = f"run.seed={seed}", f"data.seed={seed}"
    tool("launch.py", "recipes/demo.yaml", *sets, *seeds, f"run.dir={run}", f"pretrain.steps={arguments.steps}",
         *changes, "--stages", "pretrain", "--cluster", "local", "--wait")  # fmt: skip
    rows = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    figures = {}
    for column, limit in LIMITS.items():
        settled = [row for row in rows if limit.holds(row["step"], arguments.steps)]
        if values := [row[column] for row in settled if row.get(column) is not None]:
            figures[column] = {"low": min(values), "high": max(values), "limit": limit.value}
    signs = [row for row in History(run / "pretrain").rows() if row["event"] == "collapse"]
    return {
        "flagged_at": signs[0]["step"] if signs else None,
        "by": [sign["column"] for sign in signs],
        "figures": figures,
        "steps": len(rows),
    }


def print_row(row: dict[str, Any]) -> None:
    flagged = f"flagged at step {row['flagged_at']} by {', '.join(row['by'])}" if row["by"] else "not flagged"
    print(
        f"\n{row['variant']}, seed {row['seed']}: {flagged}: {'ok' if row['as_it_should'] else 'NOT AS IT SHOULD BE'}"
    )
    for name, found in row["figures"].items():
        print(f"  {name:<24}{found['low']:>10.4g} to {found['high']:<10.4g} limit {found['limit']:g}")
    sys.stdout.flush()


def tool(name: str, *arguments: object) -> None:
    ran = subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, arguments)], capture_output=True, text=True)
    if ran.returncode and "not finite" not in ran.stderr + ran.stdout:  # a rate that is far too high may end so
        raise SystemExit(f"{name} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")


if __name__ == "__main__":
    run_command(main)
