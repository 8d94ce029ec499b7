#!/usr/bin/env python3
"""Run a recipe's stages: here, or (through submitit) on Slurm.

python tools/launch.py recipes/demo.yaml --cluster local --wait
python tools/launch.py recipes/vitg_384.yaml --dry-run
python tools/launch.py recipes/demo.yaml pretrain.steps=50 --dump-order 0:2
"""

import argparse
import subprocess
import sys
from pathlib import Path

from vjepa_scale.core.errors import run_command
from vjepa_scale.core.files import write_atomic
from vjepa_scale.launch import plan
from vjepa_scale.recipe import load_recipe, recipe_yaml


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. pretrain.steps=100")
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local")
    parser.add_argument("--stages", help="comma-separated; default: all of the recipe")
    parser.add_argument("--wait", action="store_true", help="stay until the last stage is complete, showing its lines")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--dump-order", metavar="FIRST:LAST", help="print every clip of these global steps and stop")
    arguments = parser.parse_intermixed_args()

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    stages = plan.chosen_stages(recipe, arguments.stages.split(",") if arguments.stages else None)
    if arguments.dump_order:
        for line in plan.order_lines(recipe, stages, arguments.dump_order):
            print(line)
        return 0
    with plan.errors_name(arguments.recipe):
        description = list(plan.describe(recipe, stages))
    remaining = [] if arguments.dry_run else plan.check(recipe, stages, source=arguments.recipe)
    print("\n".join(description))
    if arguments.dry_run:
        return 0
    if not remaining:
        print("every stage is already complete")
        return 0
    run_folder = Path(recipe.run.dir)
    write_atomic(run_folder / "recipe.yaml", recipe_yaml(recipe))
    if arguments.cluster == "local" and not arguments.wait:
        return _in_background(run_folder, remaining)
    from vjepa_scale.launch.local import StageFailedError, run_chain
    from vjepa_scale.launch.slurm import submit_chain

    try:
        if arguments.cluster == "slurm":
            submit_chain(recipe, remaining, wait=arguments.wait)
        else:
            run_chain(recipe, remaining)
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _in_background(run_folder: Path, stages: list[str]) -> int:
    """The same command with --wait, in a session of its own, so that closing the terminal does not end it."""
    log = run_folder / "launch.log"
    command = [sys.executable, __file__, str(run_folder / "recipe.yaml"), "--stages", ",".join(stages), "--wait"]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    print(f"started as process {process.pid}; follow it with: tail -f {log}")
    return 0


if __name__ == "__main__":
    run_command(main)
