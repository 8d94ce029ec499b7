"""The batch script that evaluates a stage's checkpoints, and what is passed to sbatch from inside a job."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chain import write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.evaluation_job import evaluation_script, submit_evaluation
from vjepa_scale.launch.record import planned_launch
from vjepa_scale.recipe import Stage, load_recipe, stages_of

PROFILE = """
partition: train
account: lab
gres: gpu:h100:8,license:2
exclusive: true
modules: [cuda]
"""


def stage_of(folder: Path, trains_on: str = "auto", **evaluate: Any) -> Stage:
    (folder / "site.yaml").write_text(PROFILE)
    recipe = write_recipe(
        folder / "recipe.yaml",
        folder / "run",
        {"left": folder / "no", "right": folder / "no"},
        launch={"profile": str(folder / "site.yaml"), "cluster": "slurm"},
        engine={"device": trains_on},
        evaluate={"data": "left", **evaluate},
    )
    return stages_of(load_recipe(recipe))["pretrain"]


def options(stage: Stage) -> set[str]:
    script = evaluation_script(stage, planned_launch(stage.recipe))
    assert script is not None
    return set(re.findall(r"^#SBATCH (--.*)$", script, re.MULTILINE))


@pytest.mark.parametrize(
    ("device", "evaluate", "gpus", "partition"),
    [
        ("auto", {}, 1, "train"),
        ("cpu", {}, None, "train"),
        ("auto", {"device": "cpu"}, None, "train"),
        ("auto", {"launch": {"gpus": 2, "partition": "short"}}, 2, "short"),
        ("auto", {"launch": {"gpus": 0}}, None, "train"),
    ],
)
def test_its_options_are_the_sites_with_its_own_gpus(
    device: str, evaluate: dict[str, Any], gpus: int | None, partition: str, tmp_path: Path
) -> None:
    found = options(stage_of(tmp_path, device, **evaluate))
    assert {f"--partition={partition}", "--account=lab", "--dependency=singleton", "--nodes=1"} <= found
    assert [text for text in found if "gpu" in text] == ([f"--gpus-per-node={gpus}"] if gpus else [])
    assert "--gres=license:2" in found
    assert not any(text.startswith("--exclusive") for text in found)


def test_it_runs_the_command_for_what_is_due(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    script = evaluation_script(stage, planned_launch(stage.recipe)) or ""
    assert f"-m vjepa_scale.commands.evaluate {tmp_path}/run --stage pretrain --due" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for where in ("job", "off"):
        stage = stage_of(tmp_path, where=where)
        assert evaluation_script(stage, planned_launch(stage.recipe)) is None


def test_a_job_submits_it_without_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(tmp_path)
    with pytest.raises(UserError, match="no batch script"):
        submit_evaluation(stage)
    launches = tmp_path / "run" / "launches"
    for number in ("0001", "0002"):
        (launches / number).mkdir(parents=True)
        (launches / number / "evaluate-pretrain.sbatch").touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "sbatch": f'echo "$@" > {tmp_path}/words; env > {tmp_path}/environment; echo "17;here"; exit $STATUS',
        "squeue": f'case "$*" in *"--states PENDING"*) cat {tmp_path}/waiting;; esac',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/mine.conf")
    monkeypatch.setenv("STATUS", "0")
    submit_evaluation(stage)
    assert (tmp_path / "words").read_text().split() == ["--parsable", f"{launches}/0002/evaluate-pretrain.sbatch"]
    slurm = [line for line in (tmp_path / "environment").read_text().splitlines() if line.startswith("SLURM_")]
    assert slurm == ["SLURM_CONF=/etc/slurm/mine.conf"]

    monkeypatch.setenv("STATUS", "1")
    with pytest.raises(UserError, match="Slurm refused the evaluation"):
        submit_evaluation(stage)

    # One waits, and will find what is due now. One that runs may have looked for the last time.
    (tmp_path / "waiting").write_text(f"16 {launches}/0002/evaluate-pretrain.sbatch\n")
    (tmp_path / "words").unlink()
    submit_evaluation(stage)
    assert not (tmp_path / "words").exists()
