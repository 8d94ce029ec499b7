"""``profile.steps``: what a run writes, that it changes no number, and the table against PyTorch's own sums."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tests.chain import launch, metrics, tool, write_recipe
from vjepa_scale.core.log import region
from vjepa_scale.recipe.log_sections import ProfileConfig
from vjepa_scale.training.profiling import StepProfiler
from vjepa_scale.training.step_table import OPERATORS, PARTS, in_words, table_of

CPU = torch.device("cpu")


def read_trace(file: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(file.read_bytes()))


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_a_profiled_run_has_traces_tables_and_the_same_numbers(
    finished: Path, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The same pretraining as that of ``finished``, over the edge of two phases, with a checkpoint."""
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", run, two_data_sets, launch={"tasks_per_node": 2}, checkpoint={"every": 7, "keep": 2}
    )
    launch(recipe, "--stages", "pretrain", "profile={steps: [4, 7], ranks: [0, 1]}")
    assert metrics(run, "pretrain") == metrics(finished, "pretrain")

    folder = run / "pretrain" / "profile" / "steps_4_7"
    kinds = ("table.json", "table.txt", "trace.json.gz")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank_{rank}.{kind}" for rank in (0, 1) for kind in kinds
    ]
    for rank in (0, 1):
        names = [event["name"] for event in read_trace(folder / f"rank_{rank}.trace.json.gz")["traceEvents"]]
        micro_batches = 2
        assert {part: names.count(part) for part in PARTS} == {
            "load": 3,
            "forward": 3 * micro_batches,
            "backward": 3 * micro_batches,
            "observe": 2,  # of step 6: before its reduction, and after its update
            "reduce": 3,
            "optimizer": 3,
            "ema": 3,
            "save": 2,  # the end of the phase, and checkpoint.every
        }
        table = json.loads((folder / f"rank_{rank}.table.json").read_text())
        assert [row["step"] for row in table["steps"]] == [4, 5, 6]
        for row in table["steps"]:
            assert sum(row["host"].values()) == pytest.approx(row["seconds"], abs=1e-5)
            assert all(value > 0 for part, value in row["host"].items() if part not in ("observe", "save", "other"))
            assert 0 < row["collectives"] < row["seconds"]
        assert [row["host"]["save"] > 0 for row in table["steps"]] == [True, False, True]
        text = (folder / f"rank_{rank}.table.txt").read_text()
        assert "aten::addmm" in text
        assert "GPU" not in text


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["profile.steps=[10,14]"], "\nprofile steps 10 to 13, of pretrain and cooldown, on ranks 0\n", 0),
        (["profile.steps=[12,14]"], "\nprofile steps 12 to 13, of cooldown, on ranks 0\n", 0),
        (
            ["profile.steps=[30,32]"],
            "\n  warning: profile.steps [30, 32]: no stage trains these steps: pretrain has steps 0 to 11, "
            "cooldown has steps 12 to 17\n",
            0,
        ),
        (
            ["profile={steps: [3, 4], ranks: [0, 8]}"],
            "profile.ranks: no rank 8: 'pretrain' has 1 processes (numbers from 0 to 0)\n",
            2,
        ),
        (["profile.steps=[4,4]"], "steps [4, 4] is not a range of 1 to 20 steps", 2),
        (["profile.steps=[0,21]"], "steps [0, 21] is not a range of 1 to 20 steps", 2),
    ],
)
def test_a_dry_run_says_what_will_be_profiled(
    words: list[str], said: str, code: int, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    done = tool("launch", recipe, "--dry-run", *words, check=False)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


# -- which steps ---------------------------------------------------------------------------------------------------


def profiled(folder: Path, steps: range, *, rank: int = 0, stop_in: int | None = None) -> list[str]:
    """The folders that a rank writes of the steps [3, 6] in an attempt at these steps. stop_in: a signal comes in it"""
    profiler = StepProfiler(ProfileConfig(steps=(3, 6)), folder=folder, rank=rank, device=CPU)
    for step in steps:
        profiler.before(step)
        with region("forward"):
            torch.ones(2) + 1
        if step == stop_in:
            break
        profiler.after(step)
    profiler.finish()
    found = sorted((folder / "profile").glob("*"))
    for one in found:
        table = json.loads((one / "rank_0.table.json").read_text())
        first, end = map(int, one.name.split("_")[1:])
        assert [row["step"] for row in table["steps"]] == list(range(first, end))
        assert all(row["host"]["forward"] > 0 for row in table["steps"])
    return [one.name for one in found]


def test_the_first_step_is_profiled_and_the_last_is_not(tmp_path: Path) -> None:
    assert profiled(tmp_path, range(10)) == ["steps_3_6"]


def test_a_stop_inside_and_the_resume_profile_all_steps_together(tmp_path: Path) -> None:
    assert profiled(tmp_path, range(10), stop_in=4) == ["steps_3_5"]
    assert profiled(tmp_path, range(5, 10)) == ["steps_3_5", "steps_5_6"]


@pytest.mark.parametrize(("steps", "rank"), [(range(3), 0), (range(6, 9), 0), (range(10), 1)])
def test_other_steps_and_ranks_write_nothing(steps: range, rank: int, tmp_path: Path) -> None:
    assert profiled(tmp_path, steps, rank=rank) == []


def test_a_full_disk_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").touch()  # no folder can be made there
    profiler = StepProfiler(ProfileConfig(steps=(3, 4)), folder=tmp_path, rank=0, device=CPU)
    profiler.before(3)
    profiler.after(3)
    assert "the profile is not written" in caplog.text


def test_a_trace_without_valid_json_is_there_without_a_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = profile.export_chrome_trace

    def damaged(self: profile, path: str) -> None:
        usual(self, path)
        Path(path).write_text(Path(path).read_text().rstrip().removesuffix("}"))

    monkeypatch.setattr(profile, "export_chrome_trace", damaged)
    profiler = StepProfiler(ProfileConfig(steps=(3, 4)), folder=tmp_path, rank=0, device=CPU)
    profiler.before(3)
    profiler.after(3)
    assert "has no table: its trace is not valid JSON" in caplog.text
    assert [path.name for path in (tmp_path / "profile" / "steps_3_4").iterdir()] == ["rank_0.trace.json.gz"]


# -- the table -----------------------------------------------------------------------------------------------------


def test_operators_are_those_of_pytorchs_own_table(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with profile(activities=[ProfilerActivity.CPU]) as running, record_function("step 0"):
        for _ in range(5):
            network(torch.randn(32, 64)).sum().backward()
    running.export_chrome_trace(str(tmp_path / "trace.json"))
    found = table_of(json.loads((tmp_path / "trace.json").read_text()))["operators"]
    wanted = {row.key: row for row in running.key_averages() if not row.is_user_annotation}
    assert len(found) == OPERATORS < len(wanted)
    for row in found:
        theirs = wanted[row["name"]]
        assert row["calls"] >= theirs.count  # PyTorch joins an operator and its only part if they have one name
        assert row["host"] * 1e6 == pytest.approx(theirs.self_cpu_time_total, abs=0.1)
    assert found[0]["host"] * 1e6 == pytest.approx(max(row.self_cpu_time_total for row in wanted.values()), rel=0.01)


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": args.pop("tid", 1), "args": args}


def test_work_of_a_gpu_counts_for_the_part_that_launched_it() -> None:
    """A trace as PyTorch writes it with CUDA, by hand; the host is ahead of the GPU. Not measured on one."""
    s = 1e6
    table = table_of(
        {
            "traceEvents": [
                event("user_annotation", "step 7", 0, 10 * s),
                event("user_annotation", "load", 0, 1 * s),
                event("user_annotation", "forward", 1 * s, 2 * s),
                event("user_annotation", "backward", 3 * s, 2 * s),
                event("gpu_user_annotation", "forward", 2 * s, 9 * s),
                # forward: a product, 3 s on the GPU from 2 on
                event("cpu_op", "aten::linear", 1 * s, 1 * s, **{"External id": 1}),
                event("cpu_op", "aten::mm", 1.2 * s, 0.5 * s, **{"External id": 2}),
                event("cuda_runtime", "cudaLaunchKernel", 1.3 * s, 0.1 * s, correlation=11, **{"External id": 2}),
                event("kernel", "sm90_gemm", 2 * s, 3 * s, tid=7, correlation=11, **{"External id": 2}),
                # backward, in autograd's thread: a kernel without an operator, 2 s from 5 on
                event("cuda_driver", "cuLaunchKernelEx", 3.5 * s, 0.1 * s, tid=2, correlation=12),
                event("kernel", "triton_fused", 5 * s, 2 * s, tid=7, correlation=12),
                # a collective from 4 to 9, of which nothing hides the time from 7 on
                event("cuda_runtime", "cudaLaunchKernel", 3.8 * s, 0.1 * s, tid=2, correlation=13),
                event("kernel", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", 4 * s, 5 * s, tid=8, correlation=13),
                # after the parts, a copy to the host
                event("cuda_runtime", "cudaMemcpyAsync", 8 * s, 0.1 * s, correlation=14),
                event("gpu_memcpy", "Memcpy DtoH", 9 * s, 0.5 * s, tid=7, correlation=14),
                # another step's
                event("kernel", "sm90_gemm", 12 * s, 3 * s, tid=7, correlation=15),
            ]
        }
    )
    (step,) = table["steps"]
    assert (step["step"], step["seconds"]) == (7, 10.0)
    nothing = dict.fromkeys(PARTS, 0.0)
    assert step["host"] == nothing | {"load": 1.0, "forward": 2.0, "backward": 2.0, "other": 5.0}
    assert step["device"] == nothing | {"forward": 3.0, "backward": 2.0, "other": 0.5}
    assert (step["busy"], step["collectives"], step["exposed"]) == (5.5, 5.0, 2.0)
    rows = {row["name"]: (row["device"], row["host"], row["calls"]) for row in table["operators"]}
    assert rows["aten::mm"] == (3.0, 0.5, 1)
    assert rows["aten::linear"] == (0.0, 0.5, 1)
    assert rows["triton_fused"] == (2.0, 0.0, 1)
    assert "exposed" in in_words(table)
