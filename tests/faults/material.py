"""A run that has stopped in the middle, to be damaged; and ranks that train on from it, several runs one after another.

Only the start of processes is expensive here, so all cases of a file share one pair of ranks.
"""

import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tests.processes import run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.trainer import train_stage


def stopped_run(finished: Path, folder: Path) -> Path:
    """A copy of the finished run as it was killed in step 9 of 12: checkpoints of steps 5 (end of a phase) and 8.

    Its recipe, without loader workers, is ``recipe.yaml`` in ``folder``. Returns the run.
    """
    run = folder / "run"
    shutil.copytree(finished / "pretrain", run / "pretrain", ignore=shutil.ignore_patterns("step_00000012", "logs"))
    shutil.copy(finished / "recipe.yaml", run)
    history = run / "pretrain" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    ended = next(i for i, row in enumerate(rows) if row["event"] == "saved" and row["step"] == 12)
    write_rows(history, [row for row in rows[:ended] if row["event"] != "submitted"])  # its launcher may be alive
    metrics = run / "pretrain" / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:10]))
    recipe = yaml.safe_load((finished.parent / "recipe.yaml").read_text())
    recipe["run"]["dir"] = str(run)
    recipe["data"]["workers"] = 0
    del recipe["cooldown"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_recipe(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    recipe = yaml.safe_load(path.read_text())
    change(recipe)
    path.write_text(yaml.safe_dump(recipe))


def train_each(recipes: Mapping[str, Path], *, ranks: int = 2) -> dict[str, str]:
    """Trains the pretraining of each recipe, one after another, in the same processes.

    Returns how each ended: "done", or rank 0's exception as "Type: message"
    """
    return dict(zip(recipes, run_processes(_train_each, ranks, list(recipes.values()))[0], strict=True))


def _train_each(ranks: Ranks, recipes: list[Path]) -> list[str]:
    process_group.stop()  # each run makes its own
    ended = []
    for number, recipe in enumerate(recipes):
        stage = stages_of(load_recipe(recipe))["pretrain"]
        try:
            train_stage(stage, replace(ranks, job=f"{ranks.job}-{number}"))
            ended.append("done")
        except Exception as error:  # noqa: BLE001 (the test tells which one it expects)
            traceback.print_exc()
            ended.append(f"{type(error).__name__}: {error}")
            process_group.stop()
    return ended
