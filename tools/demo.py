#!/usr/bin/env python3
"""Run the whole chain on data that it makes itself, by the commands a user would type, and say what came of it."""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.files import write_json
from vjepa_scale.recipe import load_recipe

TOOLS = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="recipes/demo.yaml, or recipes/showcase.yaml for a longer run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--clips", type=int, default=2048, help="training clips to render")
    parser.add_argument("--val-clips", type=int, default=640, help="held-out clips to render")
    arguments = parser.parse_intermixed_args()
    began = time.monotonic()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    train, val = train_and_val(Path(next(iter(recipe.data.sets.values())).path))
    videos, run = train.parent.parent / "videos", Path(recipe.run.dir)

    step(
        "1. Render a synthetic world as h264 files",
        "make_synthetic",
        videos,
        "--clips",
        arguments.clips,
        "--val-clips",
        arguments.val_clips,
    )
    step("2. Pack them into shards", "make_shards", videos / "train", train)
    step("", "make_shards", videos / "val", val)
    step(
        "3. Pretrain, then cool down at a higher resolution and with longer clips",
        "launch", arguments.recipe, *arguments.overrides, "--cluster", "local", "--wait",
    )  # fmt: skip
    from vjepa_scale.checkpoint.consolidated import CONFIG_FILE, WEIGHTS_FILE

    for name in (WEIGHTS_FILE, CONFIG_FILE):  # an earlier demo's, perhaps of another checkpoint
        (run / "consolidated" / name).unlink(missing_ok=True)
    step(
        "4. Consolidate the sharded checkpoint into one file",
        "consolidate",
        run,
        "--to",
        "safetensors",
        "--out",
        run / "consolidated",
    )

    print("\n5. Load it back with vjepa_scale.load_encoder and measure it on held-out clips", flush=True)
    from vjepa_scale.data.manifest import Manifest
    from vjepa_scale.report.summary import summarise, table

    summary = summarise(recipe, run / "consolidated", Manifest.open(train), Manifest.open(val))
    summary["seconds"] = round(time.monotonic() - began, 1)
    write_json(run / "summary.json", summary)
    print()
    for line in table(summary):
        print(line)
    print(f"""
{summary["seconds"]:.0f} seconds. docs/learning.md says what to expect of these figures.
  {run / "consolidated"}   weights and config.json, for vjepa_scale.load_encoder
  {run}/pretrain/metrics.jsonl, {run}/cooldown/metrics.jsonl
  {run / "summary.json"}
Next: make showcase; your own videos with tools/make_shards.py; recipes/vitg_384.yaml --dry-run""")
    return 0


def train_and_val(train: Path) -> tuple[Path, Path]:
    """The demo's shards lie in DATA/shards/train and DATA/shards/val."""
    if train.name != "train" or train.parent.name != "shards":
        raise UserError(
            f"{train} is not of the form DATA/shards/train", where="data.sets", fix="use recipes/demo.yaml as it is"
        )
    return train, train.parent / "val"


def step(title: str, tool: str, *arguments: object) -> None:
    """Print a command and run it; end with its exit code if it fails."""
    words = [str(word) for word in arguments]
    if title:
        print(f"\n{title}")
    print("$", shlex.join(["python", f"tools/{tool}.py", *words]), flush=True)
    done = subprocess.run([sys.executable, str(TOOLS / f"{tool}.py"), *words])
    if done.returncode != 0:
        sys.exit(done.returncode)


if __name__ == "__main__":
    run_command(main)
