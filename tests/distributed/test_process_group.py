"""How processes meet: through a file, under torchrun, alone; and what is said when they do not."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

from tests.processes import ENGINE, LIMIT_S, run_processes
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.process_group import build_mesh

ROOT = Path(__file__).parents[2]


def ranks_of(rank: int, world_size: int, job: str = "job") -> Ranks:
    return Ranks(rank, world_size, rank, world_size, job, "submitit-local", job)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_that_is_absent_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.device"):
        process_group.start(ranks_of(0, 1), ENGINE.model_copy(update={"device": "cuda"}), rendezvous=tmp_path)
    assert not dist.is_initialized()


def test_replicas_that_do_not_divide_are_a_user_error_before_anyone_waits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 processes do not divide into 2 replicas"):
        process_group.start(ranks_of(0, 3), ENGINE.model_copy(update={"replicate": 2}), rendezvous=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["torchrun", "submitit-local"])
def test_a_gpus_group_is_bound_to_it(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NCCL connects at once, on this process's own GPU."""
    asked: list[dict[str, object]] = []
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda **asked_for: asked.append(asked_for))
    monkeypatch.setattr(process_group, "_open_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(process_group, "barrier", lambda: None)
    ranks = Ranks(2, 4, 2, 4, "job", source, "job")  # type: ignore[arg-type]
    process_group.start(ranks, ENGINE.model_copy(update={"device": "cuda"}), rendezvous=tmp_path)
    assert chosen == [torch.device("cuda", 2)]
    assert [(a["backend"], a["device_id"], a["rank"]) for a in asked] == [
        ("cpu:gloo,cuda:nccl", torch.device("cuda", 2), 2)
    ]


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    soon = ENGINE.model_copy(update={"timeout_s": 1})
    with pytest.raises(RuntimeError, match=r"2 of 3 processes did not come .* rank 1, 2"):
        process_group.start(ranks_of(0, 3), soon, rendezvous=tmp_path)
    assert not dist.is_initialized()


def test_an_absent_rank_0_is_named_with_the_file(tmp_path: Path) -> None:
    soon = ENGINE.model_copy(update={"timeout_s": 1})
    (tmp_path / "earlier-start").write_text("127.0.0.1:1\n")  # another start's file is not looked at
    with pytest.raises(RuntimeError, match=rf"rank 1 of 2: rank 0 did not write {tmp_path}/job"):
        process_group.start(ranks_of(1, 2), soon, rendezvous=tmp_path)


def _files_after_start(ranks: Ranks, folder: str) -> tuple[list[str], int, str]:
    process_group.stop()
    again = ranks_of(ranks.rank, ranks.world_size, "second")
    process_group.start(again, ENGINE.model_copy(update={"threads": 2}), rendezvous=Path(folder))
    process_group.barrier()
    while ranks.rank and os.listdir(folder):  # rank 0 removes the file right after the others may go on
        time.sleep(0.01)
    return os.listdir(folder), torch.get_num_threads(), str(dist.get_backend())


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_address_is_removed_once_all_have_met(world_size: int, tmp_path: Path) -> None:
    for files, threads, backend in run_processes(_files_after_start, world_size, str(tmp_path)):
        assert (files, threads, backend) == ([], 2, "gloo")


def _mesh(ranks: Ranks) -> tuple[tuple[str, ...] | None, list[int], list[int]]:
    hybrid = build_mesh("cpu", world_size=4, replicate=2, timeout_s=60)
    flat = build_mesh("cpu", world_size=4, replicate=1, timeout_s=60)
    assert flat.mesh_dim_names == ("shard",)
    group = dist.get_process_group_ranks(hybrid.get_group("shard"))
    return hybrid.mesh_dim_names, list(hybrid.get_coordinate() or ()), group


@pytest.mark.distributed
def test_neighbours_shard_together() -> None:
    names, coordinates, groups = zip(*run_processes(_mesh, 4), strict=True)
    assert set(names) == {("replicate", "shard")}
    assert list(coordinates) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert list(groups) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def _waiting_in(ranks: Ranks, dimension: str) -> str:
    group = build_mesh("cpu", world_size=4, replicate=2, timeout_s=1).get_group(dimension)
    said = ""
    if ranks.rank == 0:
        try:
            dist.all_reduce(torch.ones(()), group=group)
        except RuntimeError as error:
            said = str(error)
    process_group.barrier()  # the others come here only: rank 0's peer in that group is late for ever
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("dimension", ["replicate", "shard"])
def test_groups_of_a_hybrid_mesh_wait_no_longer_than_they_are_told(dimension: str) -> None:
    said, *_ = run_processes(_waiting_in, 4, dimension)
    assert "1000ms" in said.replace(" ", "")


TORCHRUN_TASK = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.schema import EngineConfig
ranks = detect_ranks()
process_group.start(ranks, EngineConfig(device="cpu", timeout_s=60), rendezvous=Path("never/used"))
total = torch.tensor(ranks.rank + 1)
dist.all_reduce(total)
sys.stdout.write(f"{ranks.source} {int(total)}\\n")
process_group.exit_cleanly(0)
"""


@pytest.mark.distributed
def test_torchrun(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TORCHRUN_TASK)
    launcher = multiprocessing.get_context("forkserver").Process(target=_torchrun, args=(tmp_path,))
    launcher.start()
    launcher.join(LIMIT_S)
    launcher.kill()
    launcher.join()
    assert launcher.exitcode == 0, (tmp_path / "stderr").read_text()
    assert sorted((tmp_path / "stdout").read_text().split("\n")) == ["", "torchrun 3", "torchrun 3"]
    assert not (tmp_path / "never").exists()


def _torchrun(folder: Path) -> None:
    """torchrun's own main, in a process that has imported PyTorch already."""
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SUBMITIT"))]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", "task.py"])


def _fail_on_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("planted")
    process_group.barrier()


@pytest.mark.distributed
def test_a_failing_rank_ends_the_others_at_once() -> None:
    with pytest.raises(AssertionError, match="planted") as failure:
        run_processes(_fail_on_rank_1, 3)
    assert "rank 0" in str(failure.value)
    assert "rank 2" in str(failure.value)
    assert "did not end in time" not in str(failure.value)  # they did not wait for the group's time-out
