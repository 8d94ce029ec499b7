"""pretrain → cooldown → action → probe what each takes from the one before, and leaves alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import ACTION, PROBE, checkpoint_tensors, launch, metrics, write_four_stages
from tests.training.test_kill import Run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Sets = dict[str, Path]
ONE_PHASE = {"steps": 2, "phases": ACTION["phases"][:1]}
LAST = {"pretrain": 12, "cooldown": 18, "action": 8, "probe": 6}


def tensors(run_dir: Path, stage: str, scratch: Path) -> dict[str, torch.Tensor]:
    """Of a stage's last checkpoint, by PyTorch's own converter."""
    scratch.mkdir(parents=True, exist_ok=True)
    return checkpoint_tensors(run_dir / stage / "checkpoints" / f"step_{LAST[stage]:08d}", scratch)


def network(found: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}


def test_the_frozen_encoder_is_the_cooldowns_target_to_the_bit(four_stages: Path, tmp_path: Path) -> None:
    target = network(tensors(four_stages, "cooldown", tmp_path), "target_encoder")
    trained = network(tensors(four_stages, "cooldown", tmp_path), "encoder")
    assert any(not torch.equal(target[name], trained[name]) for name in target)
    for stage in ("action", "probe"):
        found = tensors(four_stages, stage, tmp_path)
        frozen = network(found, "encoder")
        assert frozen.keys() == target.keys()
        for name, value in target.items():
            assert torch.equal(frozen[name], value), f"{stage}: {name}"
        assert not any(
            name.startswith(("target_encoder.", "predictor.", "optimizer.exp_avg.encoder.")) for name in found
        )


def test_what_the_stages_tell(four_stages: Path) -> None:
    rows = metrics(four_stages, "action")
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["phase"] for row in rows] == ["warmup"] * 2 + ["constant"] * 3 + ["decay"] * 3
    assert rows[-1]["lr"] == 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["teacher_loss"] + row["rollout_loss"], rel=1e-5)
        assert row["copy_loss"] > 0
    manifest = json.loads((four_stages / "action" / "checkpoints" / "step_00000008" / "manifest.json").read_text())
    told = manifest["trajectories"]["robot"]
    assert (told["records"], told["fps"]) == (6, 4.0)
    assert len(told["actions"]["mean"]) == len(told["states"]["std"]) == 7
    evaluation = json.loads((four_stages / "probe" / "evaluation.json").read_text())
    assert 0 <= evaluation["best"]["accuracy"] <= 1
    assert evaluation["clips"] == 8


def test_killed_in_the_action_stage_and_resumed(
    two_data_sets: Sets, four_stage_data: Sets, four_stages: Path, tmp_path: Path
) -> None:
    """kill -9 after a checkpoint inside the stage: the rest, and the probe, as if nothing had been. On 2 processes
    before and after, beside a run that was never killed."""
    sections: dict[str, Any] = {"launch": {"tasks_per_node": 2}, "checkpoint": {"every": 2}, "data": {"workers": 0}}
    expected = tmp_path / "whole"
    shutil.copytree(four_stages, expected)
    shutil.rmtree(expected / "action")
    killed = tmp_path / "killed"
    shutil.copytree(expected, killed)
    launch(write_four_stages(tmp_path / "a.yaml", expected, two_data_sets, four_stage_data, **sections))
    recipe = write_four_stages(tmp_path / "b.yaml", killed, two_data_sets, four_stage_data, **sections)
    saved = killed / "action" / "checkpoints" / "step_00000004"
    assert Run(recipe).kill_when(saved.exists)
    launch(recipe)
    assert metrics(killed, "action") == metrics(expected, "action")
    ours, theirs = tensors(killed, "action", tmp_path / "k"), tensors(expected, "action", tmp_path / "e")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"action": {**ACTION, "mixture": {"left": 1}}}, ("data.sets.left.path", "no trajectories")),
        ({"action": {**ACTION, "clip": {"frames": 100, "size": 32}, **ONE_PHASE}}, ("no record lasts", "100 frames")),
        ({"action": {**ACTION, "init_from": "probe"}}, ("action.init_from", "no earlier stage")),
        ({"action": {**ACTION, "init_from": None}}, ("action", "init_from")),
        ({"action": {**ACTION, "rollout_steps": 5}}, ("action.clip.frames", "rollout")),
        ({"probe": {**PROBE, "evaluate_on": "nowhere"}}, ("probe.evaluate_on", "nowhere")),
        ({"probe": {**PROBE, "evaluate_on": "left"}}, ("probe.evaluate_on", "trained on")),
        ({"action": {**ACTION, "init_from": None, "continue_from": "cooldown"}}, ("action.continue_from", "init_from")),
        ({"probe": {**PROBE, "heads": 5}}, ("probe.heads", "width 48")),
        ({"probe": {**PROBE, "labels_per_class": 9}}, ("fewer than 9", "probe.labels_per_class")),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    two_data_sets: Sets, four_stage_data: Sets, tmp_path: Path, sections: dict[str, Any], said: tuple[str, ...]
) -> None:
    recipe = write_four_stages(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, four_stage_data, **sections)
    done = launch(recipe, check=False)
    assert done.returncode == 2
    assert all(word in done.stderr for word in said), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


def test_another_objective_does_not_resume(
    two_data_sets: Sets, four_stage_data: Sets, four_stages: Path, tmp_path: Path
) -> None:
    shutil.copytree(four_stages, tmp_path / "run")
    changed = {"action": {**ACTION, "rollout_steps": 1}}
    recipe = write_four_stages(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, four_stage_data, **changed)
    done = launch(recipe, check=False)
    assert done.returncode == 2
    assert "action.rollout_steps: 2 then, 1 now" in done.stderr
