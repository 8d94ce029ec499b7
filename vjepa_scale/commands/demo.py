"""Renders data, runs the whole chain on it with the user's own commands, and prints the results."""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.files import write_json
from vjepa_scale.core.installed import as_called, command, module_command, module_environment, run_console_command
from vjepa_scale.recipe import Recipe, load_recipe

# Options of the robot, and of the moving shapes; docs/learning.md explains how they were chosen.
ROBOT = ("--size", 48, "--fps", 8)
LOOKS = ("--size", 48, "--fps", 4, "--tint", 0.05, "--noise", 0.45)

# Evaluates pretraining's checkpoints while it trains, on the demo's held-out clips. Not in the recipe, because recipes
# with other data sets extend it.
EVALUATE = (
    "checkpoint.every=350",
    "evaluate.train=synthetic",
    "evaluate.val=held_out",
    "evaluate.stages=[pretrain]",
    "evaluate.clips=160",
    "evaluate.batch=32",
    "evaluate.workers=0",  # the clips are decoded once: a process of its own would take longer to start
    "evaluate.finish_s=600",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=as_called(__doc__ or ""))
    parser.add_argument("recipe", help="demo, or the path of a recipe that extends it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--clips", type=int, default=2048, help="training clips to render")
    parser.add_argument("--val-clips", type=int, default=320, help="held-out clips to render")
    parser.add_argument("--trajectories", type=int, default=192, help="robot trajectories to render")
    parser.add_argument("--episodes", type=int, default=32, help="episodes of planning")
    parser.add_argument("--data-seed", type=int, default=0, help="of both worlds and of the episodes")
    arguments = parser.parse_intermixed_args(argv)
    began = time.monotonic()
    overrides = [*EVALUATE, *arguments.overrides]
    recipe = load_recipe(arguments.recipe, overrides)
    train, val, robot = shards_of(recipe)
    data, run = train.parent.parent, Path(recipe.run.dir)
    untrained = run.with_name(f"{run.name}-untrained")
    seed = ["--seed", arguments.data_seed]
    launch = ["launch", arguments.recipe, *overrides, "--cluster", "local", "--wait"]

    step("1. Render moving shapes, and a robot that explores, as h264 files", "make_synthetic", data / "videos",
         "--clips", arguments.clips, "--val-clips", arguments.val_clips, *LOOKS, *seed)  # fmt: skip
    step("", "make_synthetic", data / "trajectories", "--robot",
         "--trajectories", arguments.trajectories, "--val-trajectories", 0, *ROBOT, *seed)  # fmt: skip
    step("2. Pack them into shards", "make_shards", data / "videos" / "train", train)
    step("", "make_shards", data / "videos" / "val", val)
    step("", "make_shards", data / "trajectories" / "train", robot, "--trajectories", "droid")
    step("3. Pretrain, cool down at a higher resolution with longer clips; on the frozen encoder: learn what a robot's "
         "actions do, and probe", *launch)  # fmt: skip
    step("   The same probe on an encoder that was never trained", *launch,
         "--stages", "probe", "probe.init_from=untrained", f"run.dir={untrained}")  # fmt: skip
    for stage, out in (("cooldown", run / "consolidated"), ("action", run / "world_model")):
        shutil.rmtree(out, ignore_errors=True)  # may be an earlier demo's, of another checkpoint
        step("4. Consolidate the sharded checkpoints" if stage == "cooldown" else "", "consolidate", run / stage,
             "--to", "safetensors", "--out", out)  # fmt: skip

    print("\n5. Load them back and measure them on held-out clips and in episodes with the robot", flush=True)
    from vjepa_scale.demo.summary import measure_demo, table
    from vjepa_scale.report.write import write_run_report

    summary = measure_demo(
        recipe, train, val, untrained=untrained, episodes=arguments.episodes, seed=arguments.data_seed
    )
    summary["seconds"] = round(time.monotonic() - began, 1)
    write_json(run / "summary.json", summary)
    print()
    for line in table(summary):
        print(line)
    write_run_report(run, run / "report.html")
    print(f"""
{summary["seconds"]:.0f} seconds. docs/learning.md says what to expect of these figures.
  {run / "report.html"}    open this one in a browser: curves, masks, features, results
  {run / "consolidated"}   weights and config.json, for vjepa_scale.load_encoder
  {run / "world_model"}    the same for vjepa_scale.load_world_model
  {run / "pictures"}       masks.png: what is seen and what predicted; features.png: features as colours beside
                           their frames; episode.png, landscape.png: a planned episode, the energy of its first action
  {run}/STAGE/metrics.jsonl, {run / "probe" / "evaluation.json"}, {run / "summary.json"}
Next: your own videos with {command("make_shards")}; {command("launch")} vitg_384 --dry-run""")
    return 0


def shards_of(recipe: Recipe) -> tuple[Path, Path, Path]:
    """Returns the demo's shard folders, DATA/shards/{train,val,robot}. Raises UserError where they are elsewhere."""
    paths = {name: Path(recipe.data.sets[name].path) for name in ("synthetic", "held_out", "robot")}
    train, val, robot = paths.values()
    if train.parent.name != "shards" or {path.parent for path in paths.values()} != {train.parent}:
        named = ", ".join(map(str, paths.values()))
        raise UserError(f"{named} do not lie in one DATA/shards", where="data.sets", fix="use the recipe demo as it is")
    return train, val, robot


def step(title: str, tool: str, *arguments: object) -> None:
    """Prints a command, runs it and prints its duration; exits with its exit code if it fails."""
    began = time.monotonic()
    words = [str(word) for word in arguments]
    if title:
        print(f"\n{title}")
    print("$", command(tool), shlex.join(words), flush=True)
    done = subprocess.run(module_command(tool, *words), env=module_environment())
    if done.returncode != 0:
        sys.exit(done.returncode)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
