"""Stages of other names than the four: what a recipe may say of them, and the one line that refuses what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chain import ACTION, PROBE, RECIPE
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import load_recipe, recipe_yaml, stages_of
from vjepa_scale.recipe.load import validate_recipe

# In an order that is not the alphabet's: each may start from one before it.
NAMED: dict[str, Any] = {
    "probe_few": {"kind": "probe", **PROBE},
    "finetune": {"kind": "action", **ACTION},
    "decay2": {**RECIPE["cooldown"], "kind": "jepa", "continue_from": "cooldown"},
    "behind": {"kind": "probe", **PROBE, "init_from": "decay2"},
}
TREE: dict[str, Any] = {
    **RECIPE,
    "run": {"dir": "run", "seed": 5},
    "data": {
        **RECIPE["data"],
        "sets": {"left": {"path": "a"}, "right": {"path": "b"}}
        | {name: {"path": name, "weight": 0} for name in ("robot", "held_out")},
    },
    "model": {**RECIPE["model"], "action_predictor": {"width": 48, "depth": 2, "heads": 2, "grid": 4}},
    **NAMED,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE, sort_keys=False))
    return path


def test_they_are_stages_after_the_four(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    stages = stages_of(loaded)
    assert {name: stage.kind for name, stage in stages.items()} == {
        "pretrain": "jepa",
        "cooldown": "jepa",
        "probe_few": "probe",
        "finetune": "action",
        "decay2": "jepa",
        "behind": "probe",
    }
    assert [stages[name].phases[0].first for name in NAMED] == [0, 0, 18, 0]
    assert stages["decay2"].phases[0].start_lr == 1e-6  # where the cooldown ended
    assert [stage.folder for stage in stages.values()] == [Path("run") / name for name in stages]
    assert stages["finetune"].data.sampling == "time"
    assert stages["behind"].data_sets == ["left", "held_out"]
    again = tmp_path / "again.yaml"
    again.write_text(recipe_yaml(loaded))
    assert load_recipe(again) == loaded
    # As a checkpoint keeps it.
    kept = json.loads(json.dumps(loaded.model_dump(mode="json", exclude_none=True)))
    assert list(stages_of(validate_recipe(kept, source="manifest.json"))) == list(stages)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("probe_few.kind=prob", "command line:probe_few: no kind of stage 'prob'; there are jepa, action, probe"),
        ("probe_few.kind=[probe]", "command line:probe_few: no kind of stage ['probe']; there are jepa, action, probe"),
        ("probe_few.kind=null", "command line:probe_few: no kind of stage None; there are jepa, action, probe"),
        ("probe_few.lr_scale=[1]", "command line:probe_few.lr_scale: unknown key (did you mean 'lr_scales'?)"),
        ("probe_few.xyz=1", "command line:probe_few.xyz: unknown key (known here: kind, launch, steps, clip, "),
        ("probe_few.xyz=1", ", evaluate_on, lr_scales, weight_decays, depth, heads, eps, "),
        ("finetune.xyz=1", ", init_without, rollout_steps, crop_aspect, loss_exponent)"),
        ("decay2.rollout_steps=1", ", continue_from, init_from, init_without)"),
        ("decay2.clip.fames=4", "command line:decay2.clip.fames: unknown key (did you mean 'frames'?)"),
        ("decay2.launch.node=4", "command line:decay2.launch.node: unknown key (did you mean 'nodes'?)"),
        ("decay2.steps=0", "command line:decay2.steps: must be greater than 0, not 0"),
        ("probe_few.heads=5", "command line:probe_few.heads: 5 heads do not divide the encoder's width 48"),
        ("probe_few.evaluate_on=left", "command line:probe_few.evaluate_on: 'left' is trained on in phase 'decay'"),
        ("finetune.rollout_steps=9", "recipe.yaml:finetune.clip.frames: a rollout of 9 steps needs more than 4 frames"),
        ("finetune.init_from=decay2", "command line:finetune.init_from: 'decay2' is no earlier stage of this recipe"),
        ("decay2.continue_from=finetune", "command line:decay2.continue_from: 'finetune' has another objective"),
        ("cooldown=null", "recipe.yaml:probe_few.init_from: 'cooldown' is no earlier stage of this recipe"),
        ("probe_2={steps: 1, phases: []}", "command line:probe_2: unknown key (a stage of this name needs kind: "),
        ("another={steps: 1}", "another: unknown key (known here: run, launch, engine, data, model, masks, jepa, "),
        ("others={}", "command line:others: unknown key (known here: run, launch, engine, data, model, masks, jepa, "),
        ("others.decay3.kind=jepa", "command line:others: unknown key (known here: run, launch, engine, data, "),
        ("cooldown.kind=probe", "cooldown is of kind jepa, not 'probe': give that stage another name"),
    ],
)
def test_mistakes_name_file_and_key(recipe: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(recipe, [override])
    assert said in str(refused.value)


def test_an_override_of_a_copied_stage_leaves_the_first_alone(recipe: Path) -> None:
    """YAML's own way to say that one stage is as another: an alias, of which PyYAML makes the same object."""
    text = yaml.safe_dump({name: value for name, value in TREE.items() if name not in NAMED}, sort_keys=False)
    first = "cooldown:\n"
    assert first in text
    text = text.replace(first, "cooldown: &cooldown\n")
    recipe.write_text(f"{text}decay2:\n  <<: *cooldown\n  kind: jepa\n")
    stages = stages_of(load_recipe(recipe, ["decay2.clip.frames=16", "decay2.phases.0.final_lr=0"]))
    assert [stages[name].phases[0].frames for name in ("cooldown", "decay2")] == [8, 16]
    assert [stages[name].phases[0].final_lr for name in ("cooldown", "decay2")] == [1e-6, 0]


@pytest.mark.parametrize("name", ["launches", "code", "a/../../b", ".hidden", "a,b", "a b", ""])
def test_names_that_cannot_be_folders_of_the_run(recipe: Path, name: str) -> None:
    recipe.write_text(yaml.safe_dump({**TREE, name: NAMED["decay2"]}, sort_keys=False))
    with pytest.raises(UserError, match="cannot be a stage's name") as refused:
        load_recipe(recipe)
    assert str(refused.value).startswith(f"{recipe}:{name}: ")


@pytest.mark.parametrize(
    ("above", "overrides", "left"),
    [
        ({"probe_few": None}, [], ["finetune", "decay2", "behind"]),
        ({"probe_few": None}, ["finetune=null"], ["decay2", "behind"]),
        ({"behind": None, "decay2": None}, [], ["probe_few", "finetune"]),
        ({"finetune": {"steps": 9}}, ["behind=null"], ["probe_few", "finetune", "decay2"]),
        ({"more": NAMED["finetune"]}, [], ["probe_few", "finetune", "decay2", "behind", "more"]),
        ({"more": NAMED["finetune"]}, ["more=null"], ["probe_few", "finetune", "decay2", "behind"]),
    ],
)
def test_a_file_above_takes_away_changes_and_adds(
    recipe: Path, tmp_path: Path, above: dict[str, Any], overrides: list[str], left: list[str]
) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(yaml.safe_dump({"extends": "recipe.yaml", **above}))
    stages = stages_of(load_recipe(top, overrides))
    assert list(stages) == ["pretrain", "cooldown", *left]
    if above == {"finetune": {"steps": 9}}:
        assert stages["finetune"].phases[-1].end == 9
        assert stages["finetune"].config.crop_aspect == (0.9, 0.9)
