"""A second stage of each kind, by a name of its own, works wherever the four do: in one run, by the launcher."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import ACTION, PROBE, RECIPE, checkpoint_tensors, launch, metrics, tool, write_four_stages
from vjepa_scale.checkpoint.load import load_action_predictor

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

ONE = [{"name": "all", "start_lr": 1e-3}]
NAMED: dict[str, Any] = {
    "probe_few": {"kind": "probe", **PROBE, "clip": {"frames": 4, "size": 32}, "eps": 1e-6, "steps": 2, "phases": ONE},
    "finetune": {"kind": "action", **ACTION, "steps": 2, "phases": ONE},
    "decay2": {**RECIPE["cooldown"], "kind": "jepa", "continue_from": "cooldown", "steps": 2},
}
WITHOUT: dict[str, Any] = {"action": None, "probe": None, "checkpoint": {"background": False}}
LAST = {"probe_few": 2, "finetune": 2, "decay2": 20}


def test_a_second_stage_of_each_kind(
    finished: Path, two_data_sets: dict[str, Path], four_stage_data: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    data = two_data_sets, four_stage_data
    recipe = write_four_stages(tmp_path / "recipe.yaml", run, *data, **WITHOUT, **NAMED)

    planned = tool("launch", recipe, "--dry-run").stdout
    assert "probe_few: 2 steps, starts from the weights of cooldown" in planned
    assert "decay2: 2 steps, continues from cooldown" in planned
    assert "all: steps 0 to 1" in planned
    assert "decay: steps 18 to 19" in planned
    assert "refused" not in planned
    order = tool("launch", recipe, "--stages", "decay2", "--dump-order", "18:20").stdout.splitlines()
    assert len(order) == 1 + 2 * 8

    said = launch(recipe).stdout
    assert "5-NN" in said  # the probes' table
    status = json.loads(tool("launch", "status", run, "--json").stdout)
    assert {stage["name"]: stage["state"] for stage in status["stages"]} == dict.fromkeys(
        ["pretrain", "cooldown", *NAMED], "done"
    )
    for name, last in LAST.items():
        assert [row["step"] for row in metrics(run, name)] == [last - 2, last - 1]
    evaluation = json.loads((run / "probe_few" / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["origin"]["stage"]) == (2, "cooldown")
    assert "every stage is already complete" in launch(recipe).stdout

    # A finished stage refuses another recipe, or another kind.
    for word, change in (
        ("finetune.rollout_steps: 2 then, 1 now", {"finetune": {**NAMED["finetune"], "rollout_steps": 1}}),
        ("probe_few.depth: 2 then, 1 now", {"probe_few": {**NAMED["probe_few"], "depth": 1}}),
        ("decay2.kind: jepa then, action now", {"decay2": NAMED["finetune"]}),
    ):
        changed = write_four_stages(tmp_path / "changed.yaml", run, *data, **WITHOUT, **{**NAMED, **change})
        refused = launch(changed, check=False)
        assert refused.returncode == 2
        assert word in refused.stderr
    (tmp_path / "without.yaml").write_text("extends: recipe.yaml\nprobe_few: null\n")
    assert "probe_few" not in tool("launch", tmp_path / "without.yaml", "--dry-run").stdout

    # Its weights, by the stage and by the run: the last stage that trains an encoder, and the last action predictor.
    for source, stage in ((run / "decay2", "decay2"), (run, "decay2"), (run / "finetune", "finetune")):
        out = tmp_path / f"of {source.name}"
        tool("consolidate", source, "--out", out)
        assert json.loads((out / "config.json").read_text())["stage"] == stage
    stored = checkpoint_tensors(run / "finetune" / "checkpoints" / "step_00000002", tmp_path)
    for name, value in load_action_predictor(run).state_dict().items():
        assert torch.equal(value, stored[f"action_predictor.{name}"])
    classifier = tmp_path / "classifier"
    tool("consolidate", run / "probe_few", "--to", "huggingface", "--out", classifier)
    assert len(json.loads((classifier / "config.json").read_text())["id2label"]) == evaluation["classes"]
