"""Evaluate the checkpoints of a run on held-out clips, and name the best one (docs/watching.md).

python tools/evaluate.py RUN                          what the recipe's section evaluate asks for and has no result yet
python tools/evaluate.py RUN --all-checkpoints        every checkpoint
python tools/evaluate.py RUN --stage pretrain --step 2000 --step 4000
python tools/evaluate.py RUN --train NAME --val NAME  by these labelled data sets: names in data.sets, or shard folders
python tools/evaluate.py RUN --data NAME              by one without labels

Works while the run trains. Results are appended to RUN/STAGE/evaluations.jsonl. Exit code 1 where a checkpoint could
not be evaluated.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, command, program, run_console_command
from vjepa_scale.recipe import Recipe, Stage, stages_of
from vjepa_scale.recipe.evaluate_section import EvaluateConfig, evaluation_of

# Seconds to wait for another evaluation of the same stage; a job (--due) waits as long as such an evaluation may take.
PATIENCE_S, PATIENCE_OF_A_JOB_S = 5.0, 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from vjepa_scale.checkpoint.evaluations import not_evaluated, results_of
    from vjepa_scale.checkpoint.manifest import name_of
    from vjepa_scale.monitor.evaluate import StageEvaluator
    from vjepa_scale.monitor.status import run_recipe

    recipe = _with_data(run_recipe(arguments.run), arguments)
    failures = 0
    for stage in _stages(recipe, arguments):
        config = evaluation_of(stage)
        assert config is not None
        names = {name_of(step) for step in arguments.step or ()}
        if missing := sorted(name for name in names if not (stage.checkpoints / name).is_dir()):
            raise UserError(f"no checkpoint {missing[0]}", where=stage.checkpoints, fix="a step that was saved")
        only_due = not (arguments.all_checkpoints or names)

        def choose(stage: Stage = stage, config: EvaluateConfig = config, due: bool = only_due) -> list[Path]:
            left = not_evaluated(stage, config, only_due=due)
            return [path for path in left if not names or path.name in names]  # noqa: B023 (called in this turn)

        evaluator = StageEvaluator(stage, config, device=_device(arguments.device or config.device))
        patience_s = PATIENCE_OF_A_JOB_S if arguments.due else PATIENCE_S
        failures += evaluator.evaluate(choose, patience_s=patience_s)
        for line in results_of(stage).lines() or ["nothing evaluated yet"]:
            print(f"{stage.name}  {line}", flush=True)
    return int(failures > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder: run.dir of its recipe")
    parser.add_argument("--stage", help="only this stage (default: all that train an encoder)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all-checkpoints", action="store_true", help="every checkpoint, not only those that are due")
    which.add_argument("--step", type=int, action="append", help="the checkpoint of this step; may be repeated")
    which.add_argument("--due", action="store_true", help=argparse.SUPPRESS)  # of a Slurm job of ours
    parser.add_argument("--train", metavar="SET", help="labelled examples: a name in data.sets, or a folder of shards")
    parser.add_argument("--val", metavar="SET", help="labelled clips that are classified")
    parser.add_argument("--data", metavar="SET", help="instead of --train and --val: clips without labels")
    parser.add_argument("--clips", type=int, help="held-out clips, at most (default: evaluate.clips)")
    parser.add_argument("--device", help="default: evaluate.device; auto: a GPU if there is one")
    return parser


def _device(name: str) -> str | None:
    return None if name == "auto" else name


def _with_data(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe with the command line's data in its section ``evaluate``. Raises UserError without any."""
    tree: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    section: dict[str, Any] = tree.get("evaluate", {})
    words = {word: getattr(arguments, word) for word in ("train", "val", "data") if getattr(arguments, word)}
    if words:
        section = {key: value for key, value in section.items() if key not in ("train", "val", "data")} | words
    if arguments.clips is not None:
        section["clips"] = arguments.clips
    if not any(section.get(word) for word in ("train", "val", "data")):
        raise UserError(
            "its recipe has no section evaluate",
            where=arguments.run,
            fix=f"{command('evaluate')} {arguments.run} --train SET --val SET, or --data SET without labels",
        )
    if arguments.stage:
        section.pop("stages", None)
    for word, name in words.items():
        if name not in tree["data"]["sets"]:
            if not Path(name).is_dir():
                raise UserError(
                    f"{name!r} is neither a data set of the recipe nor a folder",
                    where=f"{program('evaluate')} --{word}",
                    fix=f"one of {', '.join(tree['data']['sets'])}, or a folder of shards",
                )
            tree["data"]["sets"][name] = {"path": name, "weight": 0}
    from vjepa_scale.recipe.load import validate_recipe

    return validate_recipe(tree | {"evaluate": section}, source=arguments.run / "recipe.yaml")


def _stages(recipe: Recipe, arguments: argparse.Namespace) -> list[Stage]:
    stages = stages_of(recipe)
    if arguments.stage is not None and arguments.stage not in stages:
        raise UserError(
            f"no stage {arguments.stage!r}", where=f"{program('evaluate')} --stage", fix=f"one of {', '.join(stages)}"
        )
    found = [
        stage
        for name, stage in stages.items()
        if arguments.stage in (None, name) and evaluation_of(stage) is not None and stage.checkpoints.is_dir()
    ]
    if not found:
        raise UserError(
            "no checkpoint of a stage that trains an encoder",
            where=arguments.run / (arguments.stage or ""),
            fix="a stage of masked prediction, such as pretrain or cooldown, that has saved one",
        )
    return found


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
