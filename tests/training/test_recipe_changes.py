"""The table of docs/recipes.md, "What may change on a resume": each of its keys, against what a resume compares."""

import re
from pathlib import Path

import pytest

from tests.chain import ROOT, write_recipe
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.recipe_changes import recipe_changes

SECTION = (ROOT / "docs/recipes.md").read_text().partition("## What may change on a resume\n")[2].partition("\n###")[0]
ROWS = dict(re.findall(r"^\| ((?:`|a data|learning).+?) \| (.+) \|$", SECTION, re.MULTILINE))
# By the first word of each row of the table: changes of it.
MAY = {
    "launch.*": ["launch.nodes=2", "launch.timeout_min=3", "pretrain.launch={nodes: 2}", "launch.tasks_per_node=2"],
    "engine.*": [
        "engine.activation_checkpointing=full",
        "engine.kind=deepspeed",
        "engine.compile=true",
        "engine.threads=2",
    ],
    "micro_batch": ["pretrain.micro_batch=4"],
    "data.workers": ["data.workers=3", "data.prefetch=5", "data.faults.max_rate=0.5"],
    "guards.*": [
        "guards.spikes.action=rollback",
        "guards.spikes.deviations=null",
        "guards.check_devices.every=null",
        "guards.step_limit_s=50",
    ],
    "checkpoint.*": [
        "checkpoint.every=7",
        "checkpoint.keep=9",
        "log.every=2",
        "log.effective_rank_every=5",
        "profile={steps: [3, 5], ranks: [0, 1], memory: true, slow_factor: null}",
    ],
    "data.sets.NAME.path": ["data.sets.left.path=elsewhere"],
    "a data set of weight 0": ["data.sets.third={path: third, weight: 0}"],
    "steps": ["pretrain.steps=24", "pretrain.phases.1.final_lr=0.001"],
}
REFUSED = {
    "run.seed": ["run.seed=9", "data.seed=9", "data.fps=2", "data.augment.flip=0", "model.predictor.depth=3"],
    "masks.*": ["masks.group=8", "optimizer.eps=1.0e-7", "engine.precision=bfloat16"],
    "jepa.*": ["jepa.ema_momentum=0.5", "jepa.loss_exponent=2"],
    "clip": ["pretrain.clip.size=[40, 40]", "pretrain.global_batch=16", "pretrain.mixture={left: 1}"],
    "learning rates": ["pretrain.phases.0.final_lr=0.5"],
    "continue_from": ["pretrain.init_from=elsewhere"],
}


def changed(overrides: list[str], folder: Path, step: int) -> list[str]:
    path = write_recipe(folder / "recipe.yaml", folder / "run", {"left": folder, "right": folder})
    done, today = (stages_of(load_recipe(path, words))["pretrain"] for words in ([], overrides))
    return recipe_changes(done, today, first=0, step=step)


def test_the_table_has_these_rows() -> None:
    for verdict, rows in (("may", MAY), ("refused", REFUSED)):
        for word in rows:
            (said,) = [text for key, text in ROWS.items() if key.replace("`", "").startswith(word)]
            assert verdict in said, word
    assert len(ROWS) == len(MAY) + len(REFUSED)


@pytest.mark.parametrize("word", [word for words in MAY.values() for word in words])
def test_a_key_that_may_change(word: str, tmp_path: Path) -> None:
    assert changed([word], tmp_path, step=5) == []


@pytest.mark.parametrize("word", [word for words in REFUSED.values() for word in words])
def test_a_key_that_may_not(word: str, tmp_path: Path) -> None:
    assert changed([word], tmp_path, step=5)
