"""Where a run keeps what. Names only; nothing here opens a file.

<run>/recipe.yaml               the resolved recipe of the last launch
<run>/ledger.jsonl              accidents that changed the data; empty if there were none
<run>/launches/0001/            what was launched: recipe, git state, Slurm's scripts
<run>/code/<hash>/vjepa_scale/  the code that the jobs run
<run>/<stage>/history.jsonl     submitted, started, saved, interrupted, failed, done
<run>/<stage>/metrics.jsonl     a row per step
<run>/probe/evaluation.json     what the probes are worth; the stage is finished when it is there
<run>/<stage>/checkpoints/, logs/JOB_RANK_log.{out,err}, failures/JOB.RANK.json, rendezvous/
"""

from pathlib import Path

from vjepa_scale.recipe.schema import Recipe

CHECKPOINTS, LOGS, FAILURES, EVALUATION = "checkpoints", "logs", "failures", "evaluation.json"


def stage_folder(recipe: Recipe, stage: str) -> Path:
    return Path(recipe.run.dir) / stage


def checkpoints_folder(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / CHECKPOINTS


def logs_folder(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / LOGS


def failures_folder(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / FAILURES


def evaluation_file(recipe: Recipe, stage: str) -> Path:
    return stage_folder(recipe, stage) / EVALUATION
