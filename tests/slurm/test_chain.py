"""The chain of stages on a real Slurm: submitted with one command, ended with the weights of a run without Slurm."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.chain import launch, metrics, tool, write_recipe
from tests.slurm.chain import NODES, TASKS, Run, assert_same_training, make_run
from tests.slurm.cluster import PATIENCE_S, Cluster

Sets = dict[str, Path]


@pytest.fixture(scope="module")
def local(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain → cooldown on this machine, without Slurm, in as many processes; consolidated."""
    folder = tmp_path_factory.mktemp("local")
    recipe = write_recipe(folder / "r.yaml", folder / "run", two_data_sets, launch={"tasks_per_node": NODES * TASKS})
    launch(recipe)
    tool("consolidate", folder / "run", "--to", "safetensors", "--out", folder / "weights")
    return folder


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_one_command_and_what_is_submitted_is_what_was_printed(
    cluster: Cluster, two_data_sets: Sets, local: Path, tmp_path: Path
) -> None:
    evaluate = {"data": "right", "clips": 4, "workers": 0, "stages": ["pretrain"], "launch": {"cpus_per_task": 1}}
    run = make_run(cluster, tmp_path, two_data_sets, launch={"profile": "sandbox"}, evaluate=evaluate)
    printed = run.launch("--dry-run", "--print-sbatch")
    assert not run.folder.exists()  # a dry run writes nothing

    said = cluster.run(run.command(run.recipe, "--cluster", "slurm", "--wait")).stdout  # as a user types it
    assert "pretrain/constant  step 12/12" in said
    assert "cooldown/decay  step 18/18" in said
    jobs = {stage: run.job_id(stage) for stage in ("pretrain", "cooldown")}
    for stage, job in jobs.items():
        row = cluster.wait_for(job)  # the run is done a moment before its job
        assert (row["JobState"], row["NumNodes"], row["NumTasks"]) == ("COMPLETED", "2", "4")
        assert row["JobName"] == f"run-{stage}"
        submitted = cluster.run(["scontrol", "write", "batch_script", job, "-"]).stdout
        expected = printed.partition(f"# -- {stage}.sbatch\n")[2].partition("# -- ")[0]
        expected = expected.replace("JOB_ID_OF_PRETRAIN", jobs["pretrain"])
        assert submitted.strip() == expected.strip()
        assert (run.folder / "launches" / "0001" / f"{stage}.sbatch").read_text().strip() == expected.strip()
    started = [run.events("started", stage=stage)[0] for stage in jobs]
    assert started[1]["time"] > run.events("done")[0]["time"]  # afterok

    for stage in jobs:
        assert metrics(run.folder, stage) == metrics(local / "run", stage)
    assert_evaluated_by_jobs_of_their_own(cluster, run, printed)
    tool("consolidate", run.folder, "--to", "safetensors", "--out", tmp_path / "weights")
    assert_same_weights(tmp_path / "weights", local / "weights")


def assert_evaluated_by_jobs_of_their_own(cluster: Cluster, run: Run, printed: str) -> None:
    """Rank 0 had them submitted; training has not waited for them, so the last one may still be at work."""
    script = (run.folder / "launches" / "0001" / "evaluate-pretrain.sbatch").read_text()
    assert printed.partition("# -- evaluate-pretrain.sbatch\n")[2].partition("# -- ")[0].strip() == script.strip()
    assert "--dependency=singleton" in script
    path = run.folder / "pretrain" / "evaluations.jsonl"

    def steps() -> list[int]:
        return sorted(json.loads(line)["step"] for line in path.read_text().splitlines()) if path.exists() else []

    cluster.wait_until(lambda: steps() == [4, 5, 8, 12], PATIENCE_S, "four evaluations")
    best = run.status()["pretrain"]["best"]
    assert best["knn"] is None
    assert best["evaluated"] == 4


def test_a_plain_user_in_a_folder_with_a_space(
    plain_user_cluster: Cluster, two_data_sets: Sets, finished: Path
) -> None:
    """On two nodes with a rank each: as the run of two processes that all tests share."""
    cluster = plain_user_cluster
    folder = cluster.folder / "my runs"
    cluster.run(["mkdir", str(folder)])
    sets = {name: cluster.folder / name for name in two_data_sets}
    for name, path in two_data_sets.items():
        shutil.copytree(path, sets[name])
    run = Run(
        cluster, folder / "first run", make_run(cluster, cluster.folder, sets, launch={"tasks_per_node": 1}).recipe
    )
    said = run.launch(f"run.dir={run.folder}", "--wait")
    assert "cooldown/decay  step 18/18" in said
    assert run.folder.stat().st_uid != 0
    assert cluster.wait_for(run.job_id())["JobState"] == "COMPLETED"
    for stage in ("pretrain", "cooldown"):
        assert metrics(run.folder, stage) == metrics(finished, stage)
    assert {name: stage["state"] for name, stage in run.status().items()} == {"pretrain": "done", "cooldown": "done"}


def test_the_batch_script_for_sites_without_submitit(
    cluster: Cluster, two_data_sets: Sets, finished: Path, tmp_path: Path
) -> None:
    """slurm/stage.sbatch: two jobs by hand, the first told to save on its way.

    On two nodes with a rank each: as the run of two processes that all tests share.
    """
    run = make_run(cluster, tmp_path, two_data_sets, launch={"tasks_per_node": 1})
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/%j.out"]

    def submit(stage: str, *options: str) -> str:
        sbatch = ["env", f"PYTHON={sys.executable}", "sbatch", "--parsable", *size, *options]
        return cluster.run([*sbatch, "slurm/stage.sbatch", str(run.recipe), stage]).stdout.strip()

    first = submit("pretrain")
    second = submit("cooldown", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    cluster.wait_until(lambda: run.steps() >= 2, PATIENCE_S, "two steps", job_id=first)
    cluster.scancel("--signal=USR2", first)
    cluster.wait_for(second, ("COMPLETED",))
    assert cluster.job(first)["Restarts"] == "1"
    assert [row["signal"] for row in run.events("interrupted")] == ["SIGUSR2"]
    for stage, step in (("pretrain", 12), ("cooldown", 18)):
        assert_same_training(run.folder, finished, stage, step, tmp_path)
    assert {name: stage["state"] for name, stage in run.status().items()} == {"pretrain": "done", "cooldown": "done"}


def test_srun_without_any_launcher_and_a_shell_that_forgot_srun(
    cluster: Cluster, two_data_sets: Sets, local: Path, tmp_path: Path
) -> None:
    """The entry by itself: srun's tasks find each other; in the batch shell of four tasks it refuses to train alone."""
    run = make_run(cluster, tmp_path, two_data_sets)
    entry = [sys.executable, "-m", "vjepa_scale.launch.worker", str(run.recipe), "pretrain"]
    cluster.run(["srun", "--nodes=2", "--ntasks-per-node=2", *entry])
    assert metrics(run.folder, "pretrain") == metrics(local / "run", "pretrain")

    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", wrap=subprocess.list2cmdline([*entry[:-1], "cooldown"]))
    cluster.wait_for(job, ("FAILED",))
    assert "SLURM_NTASKS is 4" in cluster.output(job).read_text()
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert not (run.folder / "cooldown" / "metrics.jsonl").exists()
