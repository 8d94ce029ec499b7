"""Run a recipe's stages on Slurm (through submitit) or on this machine; show, follow and cancel runs.

python tools/launch.py recipes/vitg_384.yaml --dry-run
python tools/launch.py recipes/vitg_384.yaml launch.profile=mine --dry-run --print-sbatch
python tools/launch.py recipes/vitg_384.yaml launch.profile=mine
python tools/launch.py status RUN [--json]     state of each stage; exit code 1 if one failed
python tools/launch.py follow RUN              log of rank 0, until the last stage ends (Ctrl-C leaves the run alone)
python tools/launch.py cancel RUN              end its jobs; the same launch continues it later
python tools/launch.py publish RUN [--to wandb,tensorboard]    send its metrics there (docs/watching.md)

The same launch command again refuses a run that is at work and continues one that has stopped. VJEPA_LOG=debug (or
warning, error) in the environment sets the level of its processes' logs.
"""

import argparse
import difflib
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from vjepa_scale.core.errors import EXIT_USER_ERROR, UserError, run_command
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.core.installed import (
    as_called,
    command,
    module_command,
    module_environment,
    program,
    run_console_command,
)
from vjepa_scale.recipe import Recipe, Stage
from vjepa_scale.recipe.load import recipe_file

COMMANDS = ("status", "follow", "cancel", "publish")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return look_after(argv[0], argv[1:])
    arguments = _parser().parse_intermixed_args(argv)
    if not Path(arguments.recipe).exists() and (close := difflib.get_close_matches(arguments.recipe, COMMANDS, n=1)):
        raise UserError("no such command", where=arguments.recipe, fix=f"{close[0]} RUN")
    arguments.recipe = str(recipe_file(arguments.recipe))
    from vjepa_scale.launch import plan  # imports torch, which status does not need
    from vjepa_scale.training.planned_start import load_for_training

    overrides = [*arguments.overrides, *([f"launch.cluster={arguments.cluster}"] if arguments.cluster else [])]
    recipe = load_for_training(arguments.recipe, overrides)
    stages = plan.chosen_stages(recipe, arguments.stages.split(",") if arguments.stages else None)
    if arguments.dump_order:
        for line in plan.order_lines(stages, arguments.dump_order):
            print(line)
        return 0
    cluster = plan.chosen_cluster(recipe)
    if arguments.print_sbatch:
        return _print_scripts(stages, cluster, arguments)
    where = plan.site(recipe)
    with plan.errors_name(arguments.recipe):
        description = list(plan.describe(stages, where=where))
    if arguments.dry_run:
        print("\n".join(description))
        # Users plan a cluster run on a laptop, so packages missing on this machine are no error of recipe or data.
        if lacking := plan.machine_lacks(stages, source=arguments.recipe, cluster=cluster):
            print(f"not on this machine: {lacking}")
        return _print_objections(stages, cluster, arguments.recipe, sys.stdout)
    return _launch(recipe, stages, cluster, description, arguments, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. pretrain.steps=100")
    parser.add_argument("--cluster", choices=["auto", "local", "slurm"], help="launch.cluster of the recipe")
    parser.add_argument("--stages", help="comma-separated; default: all of the recipe")
    parser.add_argument("--wait", action="store_true", help="stay until the last stage is complete, showing its lines")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; exit code 2 where a launch would be refused"
    )
    parser.add_argument(
        "--print-sbatch",
        action="store_true",
        help="with --dry-run: print the batch scripts instead; refusals go to stderr",
    )
    parser.add_argument("--dump-order", metavar="FIRST:LAST", help="print every clip of these global steps and stop")
    return parser


def _launch(
    recipe: Recipe,
    stages: list[Stage],
    cluster: str,
    description: list[str],
    arguments: argparse.Namespace,
    overrides: Sequence[str],
) -> int:
    from vjepa_scale.launch import plan
    from vjepa_scale.launch.record import record_launch
    from vjepa_scale.run.lock import only_launcher_of

    run = Path(recipe.run.dir)
    remaining = plan.check(stages, source=arguments.recipe, cluster=cluster, repair=partial(print, flush=True))
    if not remaining:
        print("\n".join([*description, "every stage is already complete"]))
        return 0
    if cluster == "local" and not arguments.wait:
        names = ",".join(stage.name for stage in remaining)
        print("\n".join(description), flush=True)
        return _in_background(remaining[0], [arguments.recipe, *overrides, "--stages", names])
    with only_launcher_of(run):
        plan.refuse_if_at_work(recipe)  # another launch may have started meanwhile
        print("\n".join(description), flush=True)
        launch = record_launch(remaining, cluster=cluster)
        if cluster == "local":
            from vjepa_scale.launch.local import LocalChain, StageFailedError, StoppedError

            try:
                LocalChain(launch).run(remaining)
            except StageFailedError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            except StoppedError as stopped:
                print(f"stopped by {stopped}: the same command goes on", file=sys.stderr)
                return stopped.exit_code
            return 0
        from vjepa_scale.launch.slurm import submit_chain

        submit_chain(remaining, launch)
    if not arguments.wait:
        print(f"look after it with: {command('launch')} status|follow|cancel {run}")
        return 0
    return look_after("follow", [str(run)])


def _print_scripts(stages: list[Stage], cluster: str, arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        raise UserError("--print-sbatch only prints", where="command line", fix="give --dry-run too")
    if cluster != "slurm":
        raise UserError(
            "no sbatch command here", where="launch.cluster", fix="--cluster slurm prints them all the same"
        )
    from vjepa_scale.launch.record import planned_launch
    from vjepa_scale.launch.slurm import scripts

    for name, text in scripts(stages, planned_launch(stages[0].recipe)).items():
        print(f"# -- {name}.sbatch\n{text}")
    return _print_objections(stages, cluster, arguments.recipe, sys.stderr)


def _print_objections(stages: list[Stage], cluster: str, source: str, to: TextIO) -> int:
    """Prints why a launch would be refused now. Returns the exit code of a dry run."""
    from vjepa_scale.launch import plan

    problems = list(plan.objections(stages, source=source, cluster=cluster))
    for problem in problems:
        print(f"refused now: {problem}", file=to)
    return EXIT_USER_ERROR if problems else 0


def _in_background(first: Stage, again: list[str]) -> int:
    """Starts the same command with --wait in a new session, so that closing the terminal does not end it."""
    run = Path(first.recipe.run.dir)
    log = run / "launch.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        said = output.tell()
        process = subprocess.Popen(
            module_command("launch", *again, "--cluster", "local", "--wait"),
            env=module_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # Importing PyTorch, here and in each rank, takes most of the time until the first line of the run.
    print(f"process {process.pid} starts {first.name!r} in the background and writes {log}", flush=True)
    history = first.folder / "history.jsonl"
    while not any(row.get("pid") == process.pid for row in read_jsonl(history)):
        if (code := process.poll()) is not None:
            words = log.read_bytes()[said:].decode(errors="replace")
            print(words or f"error: {log}: nothing was written: is the disk full?\n", end="", file=sys.stderr)
            return code
        time.sleep(0.1)
    print(
        f"started as process {process.pid}, which writes {log}: what is opened, loaded and built, then steps\n"
        f"look after it with: {command('launch')} status|follow|cancel {run}"
    )
    return 0


def look_after(asked: str, words: Sequence[str]) -> int:
    """``status RUN [--json]``, ``follow RUN``, ``cancel RUN``, ``publish RUN [--to SINKS]``."""
    parser = argparse.ArgumentParser(prog=f"{program('launch')} {asked}", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run folder: run.dir of its recipe")
    if asked == "status":
        parser.add_argument("--json", action="store_true", help="for programs")
    if asked == "publish":
        parser.add_argument("--to", help="wandb, tensorboard or wandb,tensorboard; default: as log of its recipe says")
    arguments = parser.parse_args(words)
    if asked == "follow":
        from vjepa_scale.monitor.follow import follow

        return follow(arguments.run)
    if asked == "publish":
        from vjepa_scale.monitor.publish import publish

        return publish(arguments.run, arguments.to.split(",") if arguments.to else None)
    if asked == "cancel":
        from vjepa_scale.monitor.cancel import cancel

        return cancel(arguments.run)
    from vjepa_scale.monitor.status import as_json, read_status, render

    status = read_status(arguments.run)
    print(as_json(status) if arguments.json else render(status))
    return status.exit_code


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
