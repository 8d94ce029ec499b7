"""Scheduled weight decay and EMA momentum in training: what the optimiser has at each step, and after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.chain import RECIPE, checkpoint_tensors, metrics, write_recipe
from tests.processes import ENGINE, LIMIT_S, run_processes
from vjepa_scale.checkpoint.manifest import write_manifest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.recipe import stages_of
from vjepa_scale.recipe.load import load_recipe
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig
from vjepa_scale.training.planned_start import source_of
from vjepa_scale.training.recipe_changes import recipe_changes
from vjepa_scale.training.trainer import train_stage

# From 0, where nothing tells a group that decays from one that does not, along half a cosine over both phases of
# twelve steps and beyond: 0.3·(1 − cos(π(s + 1)/18)), typed from numpy.
DECAY = {"start": 0.0, "final": 0.6, "shape": "cosine", "horizon": 1.5}
DECAYS = [0.00455767, 0.01809221, 0.04019238, 0.07018667, 0.10716372, 0.15]
DECAYS += [0.19739396, 0.24790555, 0.3, 0.35209445, 0.40260604, 0.45]
MOMENTUM = {"start": 0.8, "final": 1.0, "horizon": 20}
SECTION = {"weight_decay": DECAY, "ema_momentum": MOMENTUM}


def recipe_of(folder: Path, sets: dict[str, Path], **engine: Any) -> Path:
    engine = {"device": "cpu", "precision": "float32", "timeout_s": LIMIT_S, **engine}
    pretrain = {**RECIPE["pretrain"], **SECTION}
    return write_recipe(folder / "recipe.yaml", folder / "run", sets, pretrain=pretrain, cooldown=None, engine=engine)


def train(ranks: Ranks, recipe: Path, notes: Path) -> None:
    """The pretraining stage, on every rank; the groups that its optimiser has at each step go into ``notes``."""
    process_group.stop()  # the stage makes its own
    stage = stages_of(load_recipe(recipe))["pretrain"]
    if stage.recipe.engine.kind == "deepspeed":
        from vjepa_scale.distributed.zero import ZeroEngine as UsedEngine
    else:
        from vjepa_scale.distributed.fsdp import FsdpEngine as UsedEngine  # type: ignore[assignment]
    usual = UsedEngine.step

    def noted(self: Engine, lr: float) -> None:
        groups = [[group["scheduled"], group["weight_decay"]] for group in self._optimizer.param_groups]
        with notes.open("a") as file:
            file.write(json.dumps(groups) + "\n")
        usual(self, lr)

    UsedEngine.step = noted
    train_stage(stage, ranks)


def decays_in(file: Path) -> list[float]:
    """Of the groups that decay, by step; those of biases and 1-D parameters have none."""
    found = []
    for line in file.read_text().splitlines():
        groups = json.loads(line)
        assert {value for decays, value in groups if not decays} == {0.0}
        (value,) = {value for decays, value in groups if decays}
        found.append(value)
    return found


FSDP = pytest.param({}, id="fsdp")
ZERO = [
    pytest.param({"kind": "deepspeed", "zero_stage": stage}, id=f"ZeRO {stage}", marks=pytest.mark.slow)
    for stage in (1, 2, 3)
]


def _three_steps(ranks: Ranks, cfg: EngineConfig) -> dict[str, list[Any]]:
    engine = build_engine(cfg, ranks)
    with torch.device("meta"):
        network: nn.Module = nn.Linear(2, 2)
    network = engine.shard(
        network, name="n", seed=0, trainable=True, initial_value=lambda name, shape, seed: torch.ones(shape)
    )
    engine.start_optimizer(OptimizerConfig(weight_decay=0.5, eps=1e-3), {"n": network})
    for step, weight_decay in enumerate((0.0, 0.2, 0.4)):
        clip = torch.tensor([[1.0, 2.0 + step]])
        engine.backward(lambda clip=clip: network(clip).square().sum(), share=1.0, last=True)
        engine.reduced(torch.zeros(0))
        engine.set_weight_decay(weight_decay)
        engine.step(0.1)
    return {
        name: value.full_tensor().tolist() for name, value in engine.tensors({"n": network}, optimizer=False).items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("options", [FSDP, *ZERO])
def test_each_step_decays_by_its_own_weight_decay(options: dict[str, Any]) -> None:
    """Against PyTorch's AdamW; the bias never decays."""
    network = nn.Linear(2, 2)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    groups = [{"params": [network.weight]}, {"params": [network.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, eps=1e-3)
    for step, weight_decay in enumerate((0.0, 0.2, 0.4)):
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        optimizer.zero_grad()
        network(torch.tensor([[1.0, 2.0 + step]])).square().sum().backward()
        optimizer.step()
    cfg = ENGINE.model_copy(update=options)
    (found,) = run_processes(_three_steps, 1, cfg, cfg=cfg)
    for name, value in network.named_parameters():
        torch.testing.assert_close(torch.tensor(found[f"n.{name}"]), value.detach(), rtol=1e-6, atol=0)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [FSDP, ZERO[1]])
def test_each_step_has_its_values_and_a_resumed_run_the_same(
    options: dict[str, Any], two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe, run = recipe_of(tmp_path, two_data_sets, **options), tmp_path / "run"
    run_processes(train, 1, recipe, tmp_path / "whole")
    assert decays_in(tmp_path / "whole") == pytest.approx(DECAYS, rel=1e-6)
    whole = metrics(run, "pretrain")
    assert [row["weight_decay"] for row in whole] == pytest.approx(DECAYS, rel=1e-6)
    assert [row["ema"] for row in whole] == pytest.approx([0.8 + 0.01 * step for step in range(12)])

    (tmp_path / "first").mkdir()
    last = run / "pretrain" / "checkpoints" / "step_00000012"
    before = checkpoint_tensors(last, tmp_path / "first")
    shutil.rmtree(last)
    run_processes(train, 1, recipe, tmp_path / "resumed")
    assert decays_in(tmp_path / "resumed") == decays_in(tmp_path / "whole")[8:]
    assert metrics(run, "pretrain") == whole
    now = checkpoint_tensors(last, tmp_path)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


RAMP = "{start: 0.1, final: 0.5}"


@pytest.mark.parametrize(
    ("then", "now", "differences"),
    [
        ([], ["pretrain.weight_decay=0.04"], []),  # the constant by another key
        ([], ["pretrain.weight_decay=0.1"], ["weight_decay at step 0: 0.04 then, 0.1 now"]),
        ([f"pretrain.weight_decay={RAMP}"], [f"pretrain.weight_decay={RAMP}", "optimizer.weight_decay=0.9"], []),
        (
            [f"pretrain.weight_decay={RAMP}"],
            ["pretrain.weight_decay={start: 0.1, final: 0.5, horizon: 24}"],
            ["weight_decay at step 0: 0.133333333333 then, 0.116666666667 now"],
        ),
        ([f"pretrain.weight_decay={RAMP}"], ["optimizer.weight_decay=0.1"], ["weight_decay at step 4"]),
        (["pretrain.ema_momentum={final: 1}"], ["jepa.ema_momentum=0.95"], ["ema_momentum at step 4"]),
        (
            ["pretrain.ema_momentum={final: 1, horizon: 12}", "pretrain.steps=24"],
            ["pretrain.ema_momentum={final: 1}"],
            [],
        ),
        (["pretrain.phases.0.lr_horizon=10"], [], ["lr at step 0: 0.00019 then, 0.00028 now"]),
        (["pretrain.phases.0.lr_shape=cosine"], [], ["lr's shape: cosine then, linear now"]),
    ],
)
def test_what_schedules_change_of_finished_steps_is_named(
    then: list[str], now: list[str], differences: list[str], tmp_path: Path
) -> None:
    """Eight of twelve steps were trained; weight decay 0.04 and momentum 0.9 are the recipe's constants."""
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", {"left": tmp_path, "right": tmp_path})
    done, today = (stages_of(load_recipe(path, overrides))["pretrain"] for overrides in (then, now))
    found = recipe_changes(done, today, first=0, step=8)
    if not differences:
        assert found == []
    for difference in differences:
        assert any(difference in one for one in found), found


@pytest.mark.parametrize(
    ("cooldown", "refused"),
    [
        ({}, "cooldown.weight_decay=0.3,"),  # half way from 0.1 to 0.5
        ({"weight_decay": 0.3}, "cooldown.ema_momentum=0.95,"),
        ({"weight_decay": {"final": 0.4}, "ema_momentum": 0.9}, "cooldown.weight_decay.start=0.3,"),
        ({"weight_decay": 0.04, "ema_momentum": {"start": 0.95, "final": 1}}, None),
        ({"optimizer": {"weight_decay": 0.2}, "ema_momentum": 0.9}, None),
    ],
)
def test_a_cooldown_from_the_path_of_a_checkpoint_says_its_values(
    cooldown: dict[str, Any], refused: str | None, tmp_path: Path
) -> None:
    """The checkpoint is of half of a schedule; the recipe's constants are 0.04 and 0.9."""
    ramps = {"weight_decay": {"start": 0.1, "final": 0.5}, "ema_momentum": {"start": 0.9, "final": 1.0}}
    sets = {"left": tmp_path, "right": tmp_path}
    path = write_recipe(tmp_path / "then.yaml", tmp_path / "then", sets, pretrain={**RECIPE["pretrain"], **ramps})
    written = {"stage": "pretrain", "first": 0, "recipe": load_recipe(path).model_dump(mode="json", exclude_none=True)}
    checkpoint = tmp_path / "step_00000006"
    checkpoint.mkdir()
    write_manifest(checkpoint, step=6, world_size=1, files={}, extra=written)
    cooldown = {**RECIPE["cooldown"], "continue_from": str(checkpoint), **cooldown}
    cooldown["phases"] = [{"name": "decay", "start_lr": 1e-3}]
    path = write_recipe(tmp_path / "now.yaml", tmp_path / "now", sets, cooldown=cooldown)
    stage = stages_of(load_recipe(path))["cooldown"]
    if refused is None:
        assert source_of(stage) == checkpoint
        return
    with pytest.raises(UserError) as refusal:
        source_of(stage)
    assert str(refusal.value.fix).startswith(refused)


FRACTION = "steps of a phase are a fraction of the stage's: give a number"


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (["pretrain.phases.0.steps=0.5"], ["pretrain.phases.0.steps=0.5", "pretrain.steps=24"], FRACTION),
        (["pretrain.phases.0.steps=0.5"], ["pretrain.phases.0.steps=6", "pretrain.steps=24"], None),
        (["pretrain.phases.0.steps=6"], ["pretrain.phases.0.steps=7", "pretrain.steps=24"], "6 to 7 then"),
        (["pretrain.phases.0.steps=0.5"], ["pretrain.phases.0.steps=0.25"], "3 to 7 now"),
    ],
)
def test_a_longer_stage_with_a_fractional_phase(
    then: list[str], now: list[str], said: str | None, tmp_path: Path
) -> None:
    """Eight of twelve steps were trained. The hint stands only where the stage's new length has moved the phases."""
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", {"left": tmp_path, "right": tmp_path})
    done, today = (stages_of(load_recipe(path, overrides))["pretrain"] for overrides in (then, now))
    found = recipe_changes(done, today, first=0, step=8)
    if said is None:
        assert found == []
        return
    (one,) = found
    assert said in one
    assert (FRACTION in one) == (said == FRACTION)
