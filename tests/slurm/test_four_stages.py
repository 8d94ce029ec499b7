"""pretrain → cooldown → action → probe by one launch on a real Slurm: the run of this machine without Slurm, again.

On two nodes with a rank each, the last stage on one node with two ranks; without Slurm, the finished run of two
processes that all tests share goes on.
"""

import json
import shutil
from pathlib import Path

import torch

from tests.chain import PROBE, checkpoint_tensors, launch, metrics, write_four_stages
from tests.slurm.chain import Run
from tests.slurm.cluster import Cluster

Sets = dict[str, Path]
LAST = {"pretrain": 12, "cooldown": 18, "action": 8, "probe": 6}


def test_one_launch_runs_all_four(
    cluster: Cluster, finished: Path, two_data_sets: Sets, four_stage_data: Sets, tmp_path: Path
) -> None:
    sets = (two_data_sets, four_stage_data)
    shutil.copytree(finished, tmp_path / "here")
    launch(write_four_stages(tmp_path / "here.yaml", tmp_path / "here", *sets, launch={"tasks_per_node": 2}))
    on_slurm = {"nodes": 2, "tasks_per_node": 1, "timeout_min": 30, "profile": "sandbox"}
    probe = {**PROBE, "launch": {"nodes": 1, "tasks_per_node": 2}}
    # No loader workers: each is one more start of Python with PyTorch.
    sections = {"launch": on_slurm, "probe": probe, "data": {"workers": 0}}
    there = write_four_stages(tmp_path / "there.yaml", tmp_path / "there", *sets, **sections)
    run = Run(cluster, tmp_path / "there", there)
    run.launch("--wait")

    assert {name: stage["state"] for name, stage in run.status().items()} == dict.fromkeys(LAST, "done")
    jobs = [run.job_id(stage) for stage in LAST]
    for stage, job in zip(LAST, jobs, strict=True):
        row = cluster.wait_for(job)
        nodes = "1" if stage == "probe" else "2"
        assert (row["JobState"], row["NumNodes"], row["NumTasks"]) == ("COMPLETED", nodes, "2")
    began = {stage: run.events("started", stage=stage)[0]["time"] for stage in LAST}
    ended = {stage: run.events("done", stage=stage)[0]["time"] for stage in LAST}
    for before, after in zip(list(LAST)[:-1], list(LAST)[1:], strict=True):
        assert ended[before] < began[after]
    for stage, step in LAST.items():
        assert metrics(run.folder, stage) == metrics(tmp_path / "here", stage)
        found, expected = (
            checkpoint_tensors(folder / stage / "checkpoints" / f"step_{step:08d}", scratch)
            for folder, scratch in ((run.folder, tmp_path / "a"), (tmp_path / "here", tmp_path / "b"))
            if scratch.mkdir(exist_ok=True) is None
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), stage
    ours, theirs = (
        json.loads((folder / "probe" / "evaluation.json").read_text()) for folder in (run.folder, tmp_path / "here")
    )
    assert ours["best"] == theirs["best"]
