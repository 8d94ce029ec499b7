"""A profile beside a recipe: what they must agree on; what a launch says where they do not, or no cluster answers."""

from pathlib import Path

import pytest

from tests.chain import RECIPE, launch, tool, write_recipe
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.launch.sbatch import requested_gpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus_per_node: 4", ("gpus_per_node", 4)),
        ("gpus_per_node: 0", None),
        ("gpus_per_node: 0\ngres: gpu:8", None),
        ("partition: gpu", None),
        ("gres: gpu", ("gres", 1)),
        ("gres: gpu:h100", ("gres", 1)),
        ("gres: gpu:8", ("gres", 8)),
        ("gres: gpu:h100:4", ("gres", 4)),
        ("gres: gres/gpu:a100:2", ("gres", 2)),
        ("gres: gpu:1g.10gb:3", ("gres", 3)),
        ("gres: gpu:h100:8(S:0-1)", ("gres", 8)),
        ("gres: 'gpu:a100:2,nvme:1,gpu:v100:3'", ("gres", 5)),
        ("gres: nvme:3", None),
    ],
)
def test_the_gpus_that_a_profile_requests(text: str, expected: tuple[str, int] | None, tmp_path: Path) -> None:
    """As Slurm's documentation of --gres says: name[[:type]:count], and the default count is 1."""
    (tmp_path / "site.yaml").write_text(text)
    assert requested_gpus(load_profile(str(tmp_path / "site.yaml"))) == expected


def commands_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("sbatch", "squeue", "srun"):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")


@pytest.fixture
def planned(two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A dry run for GPUs on Slurm, with two processes on a node and a profile that each test writes.

    sbatch refuses nothing.
    """
    commands_of_slurm(tmp_path, monkeypatch, "exit 0")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    words = ("engine.device=cuda", "launch.tasks_per_node=2", "launch.timeout_min=60", "--cluster", "slurm")
    return [recipe, f"launch.profile={tmp_path / 'site.yaml'}", *words, "--dry-run"]


@pytest.mark.parametrize(("text", "key"), [("gpus_per_node: 1", "gpus_per_node"), ("gres: gpu:h100:1", "gres")])
def test_fewer_gpus_than_processes_are_refused(text: str, key: str, planned: list[object], tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(text)
    done = tool("launch", *planned, check=False)
    assert done.returncode == 2
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("refused now: "))
    assert line.startswith(f"refused now: {tmp_path / 'recipe.yaml'}:launch.tasks_per_node: 2 processes per node")
    assert f"{key} of {profile} requests 1 GPUs" in line
    assert tool("launch", *planned, "engine.device=cpu").returncode == 0
    refused = tool("launch", *planned[:-1], check=False)  # before anything is submitted, or Slurm is looked for
    assert (refused.returncode, refused.stderr) == (2, f"error: {line.removeprefix('refused now: ')}\n")
    assert not (tmp_path / "run").exists()


def test_the_plan_says_which_gpus_stay_idle(planned: list[object], tmp_path: Path) -> None:
    for text, idle in (("gres: gpu:8", "6 of 8 GPUs stay idle"), ("gres: gpu:2", None), ("gpus_per_node: 0", None)):
        (tmp_path / "site.yaml").write_text(text)
        plan = tool("launch", *planned).stdout
        assert (idle in plan) if idle else ("idle" not in plan)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("partition: YOUR_PARTITION", "partition"),
        ("environment: {IMAGE: YOUR_IMAGE}", "environment.IMAGE"),
        ("modules: [gcc, YOUR_MODULE]", "modules.1"),
    ],
)
def test_scripts_are_printed_with_what_is_refused(
    text: str, key: str, planned: list[object], two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("partition: gpu")
    done = tool("launch", *planned, "--print-sbatch")
    assert done.stderr == ""
    profile.write_text(text)
    done = tool("launch", *planned, "--print-sbatch", f"data.sets.left.path={tmp_path / 'none'}", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("# -- pretrain.sbatch\n#!/bin/bash")
    first, second = done.stderr.splitlines()
    assert str(tmp_path / "none") in first
    assert f"{profile}:{key}: YOUR_" in second


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        # Slurm 22.05 and 23.11: slurmctld is down; no slurm.conf and no DNS record; the file is named but missing.
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", "here"),
        (
            "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sbatch: error: fetch_config: DNS SRV lookup failed\n"
            "sbatch: fatal: Could not establish a configuration source",
            "here",
        ),
        ("sbatch: fatal: s_p_parse_file: unable to status file /etc/slurm/slurm.conf: No such file", "here"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", "sinfo"),
    ],
)
def test_without_a_cluster_that_answers(
    said: str, fix: str, planned: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu")
    commands_of_slurm(tmp_path, monkeypatch, f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    expected = {"here": "--cluster local trains on this machine", "sinfo": "sinfo, sacctmgr"}[fix]
    for words, line in ((planned, "refused now: Slurm would refuse"), (planned[:-1], "error: ")):
        done = tool("launch", *words, check=False)
        assert done.returncode == 2
        last = (done.stdout + done.stderr).splitlines()[-1]
        assert last.startswith(line)
        assert expected in last
        assert (fix == "here") == ("--cluster local" in last)


SHORT = RECIPE["pretrain"] | {"steps": 2, "phases": [{"name": "all", "start_lr": 1e-4}]}


def test_the_plan_says_what_a_stage_starts_from(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        pretrain=SHORT,
        cooldown=None,
        checkpoint={"every": 1, "keep": 2},
    )
    assert "pretrain: 2 steps, starts fresh\n" in tool("launch", recipe, "--dry-run").stdout
    launch(recipe)
    assert "pretrain: 2 steps, complete\n" in tool("launch", recipe, "--dry-run").stdout
    last = tmp_path / "run/pretrain/checkpoints/step_00000002"
    last.rename(tmp_path / "elsewhere")
    assert "pretrain: 2 steps, resumes from step_00000001\n" in tool("launch", recipe, "--dry-run").stdout
