"""A rank whose device computes wrong or slowly, or that waits for its data: it is named, and only it."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.chain import RECIPE, write_recipe
from tests.processes import run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.guard_sections import DeviceCheckConfig
from vjepa_scale.run.events import History
from vjepa_scale.run.failures import report_failure, worst_failure
from vjepa_scale.training import device_check, device_watch
from vjepa_scale.training.device_check import CheckResult, DeviceProducts
from vjepa_scale.training.device_watch import MOST_ROWS, DeviceWatch, PeerDeviceError, WrongDeviceError
from vjepa_scale.training.stragglers import WAITS_STEPS, LateData, Reference, SlowDevices
from vjepa_scale.training.trainer import train_stage

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]


# -- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*device_check.SHAPES["cpu"], (96, 4096, 512)])
def test_the_exact_product_is_numpys(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    left, right, expected = device_check._product(shape, 1, dtype)
    a, b = (matrix.double().numpy().astype(np.int64) for matrix in (left, right))
    assert np.array_equal(a @ b, expected.double().numpy())
    assert min(np.count_nonzero(a) / a.size, np.count_nonzero(b) / b.size) > 0.99  # nearly all of them take part
    # Even the sum of an element's positive terms alone is an integer that float32 holds exactly, so any order is exact.
    assert ((np.abs(a) @ np.abs(b) + np.abs(a @ b)) // 2).max() <= 2**24


@pytest.mark.parametrize("dtype", TYPES)
def test_parts_of_a_sum_may_be_rounded(dtype: torch.dtype) -> None:
    """As split-K kernels do, which round the sums of blocks to bfloat16."""
    left, right, expected = device_check._product((16, 256, 24), 0, dtype)
    parts = [left[:, at : at + 64] @ right[at : at + 64] for at in range(0, 256, 64)]
    assert torch.equal(sum(parts[1:], parts[0]), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_device_that_works_gives_the_expected_sums(dtype: torch.dtype) -> None:
    products = DeviceProducts(CPU, dtype)
    assert products.check().sums == products.expected == products.check().sums


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bit", [0, 1, 6, 14])
def test_one_wrong_bit_is_seen(dtype: torch.dtype, bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    products = DeviceProducts(CPU, dtype)
    monkeypatch.setattr(device_check, "multiply", lambda a, b: with_a_wrong_bit(a @ b, bit))
    found = products.check().sums
    assert [a == b for a, b in zip(found, products.expected, strict=True)][:3] == [False] * 3


def with_a_wrong_bit(result: Tensor, bit: int = 3) -> Tensor:
    kind = torch.int32 if result.dtype == torch.float32 else torch.int16
    result.view(kind)[5, 11] ^= 1 << bit
    return result


def test_a_gpus_time_is_that_of_the_fastest_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stub of CUDA's events: each burst lies between two of them, and only the second is waited for."""
    done: list[str] = []
    milliseconds = iter([9.0, 4.0, 8.0, 5.0, 7.0])

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            assert end is not self
            return next(milliseconds)

    products = DeviceProducts(CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda *_, out: done.append("product"))
    products._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    assert products._timed(torch.ones(1), torch.ones(1), torch.ones(1)) == 0.004
    burst = ["record", *["product"] * device_check._IN_A_BURST[torch.bfloat16], "record", "wait"]
    assert done == burst * 5


def test_a_gpu_is_named_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid="5f3c0000-0000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("SLURMD_NODENAME", "n07")
    found = device_watch._rank_device(torch.device("cuda", 1))
    assert found == device_watch.RankDevice("n07", "cuda:1 (NVIDIA H100 80GB HBM3, GPU-5f3c0000-0000)")


# -- decisions -----------------------------------------------------------------------------------------------------

EXACT = (10, 20, 30)


@pytest.mark.parametrize(
    ("of_ranks", "wrong", "inexact"),
    [
        ([EXACT, EXACT, EXACT], {}, []),
        ([EXACT, (10, 21, 31), EXACT], {1: 1}, []),  # the first sum that differs
        ([(11, 20, 30), EXACT], {0: 0}, []),  # of two ranks, the one that is not exact
        ([(11, 20, 30), (11, 20, 30), EXACT], {0: 0, 1: 0}, []),  # the majority may be wrong
        ([(10, 20, 33)] * 3, {}, [2]),  # a kind of device that rounds otherwise
        ([(10, 20, 33), (10, 20, 34), (10, 20, 33)], {1: 2}, [2]),
        ([(10, 20, 33)], {}, [2]),
    ],
)
def test_which_ranks_compute_wrong(of_ranks: list[tuple[int, ...]], wrong: dict[int, int], inexact: list[int]) -> None:
    reference = Reference(EXACT)
    assert reference.wrong(of_ranks) == wrong
    assert reference.inexact == inexact


def test_the_reference_stays() -> None:
    reference = Reference(EXACT)
    reference.wrong([(10, 20, 33)] * 2)
    assert reference.wrong([(10, 20, 33), (10, 20, 30)]) == {1: 2}
    reference = Reference(EXACT)
    reference.wrong([EXACT])
    assert reference.wrong([(10, 20, 33)]) == {0: 2}  # one rank alone that was right before


@pytest.mark.parametrize(
    ("checks", "named"),
    [
        # Checks of four ranks; after which check which rank is named (−: no longer).
        ([[1, 1, 1, 1.5]] * 3, [(3, "3")]),
        ([[1, 1, 1, 1.5]] * 2, []),
        ([[1, 1, 1, 1.29]] * 5, []),
        ([[1, 1, 1, 1.5], [1, 1, 1, 1.5], [1, 1, 1, 1], [1, 1, 1, 1.5], [1, 1, 1, 1.5]], []),
        ([[1, 1, 1, 1.5]] * 5 + [[1, 1, 1, 1]], [(3, "3"), (6, "-3")]),
        ([[1.5, 1.5, 1.5, 1.5]] * 4, []),  # all alike: another kind of GPU
        ([[9, 1, 1, 2]] * 3, [(3, "0"), (3, "3")]),
        ([[1, 2]] * 3, [(3, "1")]),  # of two ranks
        ([[5]] * 4, []),
        ([[0, 0, 0, 0]] * 3, []),
    ],
)
def test_which_devices_are_slow(checks: list[list[float]], named: list[tuple[int, str]]) -> None:
    slow, found = SlowDevices(1.3, 3), []
    for number, seconds in enumerate(checks, start=1):
        found += [(number, f"{'-' * finding.over}{finding.rank}") for finding in slow.add(seconds)]
    assert found == named


def test_no_factor_no_judgement() -> None:
    slow = SlowDevices(None, 1)
    assert not slow.add([1, 1, 100])


@pytest.mark.parametrize(
    ("waited", "seconds", "late"),
    [
        ([0.01, 0.01, 0.30], 1.0, [2]),
        ([0.01, 0.01, 0.04], 1.0, []),  # less than 5 % of the time
        ([0.20, 0.20, 0.30], 1.0, []),  # the storage is slow for all
        ([0.00, 0.00, 0.30], 1.0, [2]),
        ([0.00, 0.30], 1.0, [1]),
        ([0.30], 1.0, []),
        ([0.00, 0.00, 0.00], 0.0001, []),
    ],
)
def test_which_ranks_wait_for_their_data(waited: list[float], seconds: float, late: list[int]) -> None:
    data = LateData()
    found = [(step, f.rank) for step in range(1, 2 * WAITS_STEPS + 1) for f in data.add(waited, seconds)]
    assert found == [(WAITS_STEPS, rank) for rank in late]  # once
    calm = [(f.rank, f.over) for _ in range(WAITS_STEPS) for f in data.add([0.0] * len(waited), 1.0)]
    assert calm == [(rank, True) for rank in late]


# -- processes -----------------------------------------------------------------------------------------------------


def _watched(ranks: Ranks, trouble: str) -> tuple[list[dict[str, Any]], str]:
    """Four checks and two windows of steps of three ranks, of which rank 1 has trouble."""
    rows: list[dict[str, Any]] = []
    log: Any = SimpleNamespace(event=lambda kind, **row: rows.append({"event": kind, **row}))
    cfg = DeviceCheckConfig(every=50, window=2)
    watch = DeviceWatch(cfg, device=CPU, dtype=torch.float32, ranks=ranks, log=log)
    watch._slow = SlowDevices(cfg.slow_factor, cfg.window)  # of a GPU
    seconds = 1.5 if trouble == "slow" and ranks.rank == 1 else 1.0
    watch._products._timed = lambda *_: seconds  # type: ignore[union-attr, method-assign]
    waited = [0.01, 0.3 if trouble == "data" else 0.01, 0.01]
    try:
        watch.check(0)
        if trouble == "wrong" and ranks.rank == 1:
            device_check.multiply = lambda a, b: with_a_wrong_bit(a @ b)
        for step in range(2 * WAITS_STEPS):
            watch.after(step, waited, seconds=1.0)
    except (WrongDeviceError, PeerDeviceError) as error:
        return rows, f"{type(error).__name__}: {error}"
    return rows, ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("trouble", "found"),
    [("wrong", ("wrong", 50, None)), ("slow", ("slow", 50, 1.5)), ("data", ("data", 100, 30)), ("", None)],
)
def test_rank_1_of_three_is_named(trouble: str, found: tuple[str, int, float | None] | None) -> None:
    (rows, error), (rows_1, error_1), (rows_2, error_2) = run_processes(_watched, 3, trouble)
    assert rows_1 == rows_2 == []  # rank 0 writes
    assert [(row["problem"], row["step"], row["times"]) for row in rows] == ([found] if found else [])
    assert all((row["event"], row["rank"], row["device"], row["over"]) == ("device", 1, "cpu", False) for row in rows)
    kinds = [text.partition(":")[0] for text in (error, error_1, error_2)]
    assert kinds == (["PeerDeviceError", "WrongDeviceError", "PeerDeviceError"] if trouble == "wrong" else [""] * 3)
    if trouble == "wrong":
        said = r"wrong results: rank 1 on .+, cpu: a product of 128×256 and 256×128 numbers; since the check at step 0"
        assert all(re.search(said, text) for text in (error, error_1, error_2))


def test_a_problem_that_comes_and_goes_is_not_reported_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    log: Any = SimpleNamespace(event=lambda kind, **row: rows.append(row))
    places = [device_watch.RankDevice("n1", "cpu"), device_watch.RankDevice("n2", "cpu")]
    monkeypatch.setattr(process_group, "from_all", lambda _: places)
    ranks = Ranks(0, 2, 0, 2, "job", "single", "job")
    watch = DeviceWatch(DeviceCheckConfig(every=None), device=CPU, dtype=torch.float32, ranks=ranks, log=log)
    for step in range(40 * WAITS_STEPS):
        watch.after(step, [0.0, 0.3 * (step // WAITS_STEPS % 2)], seconds=1.0)
    assert len(rows) == MOST_ROWS
    assert {(row["rank"], row["node"]) for row in rows} == {(1, "n2")}


def test_null_never_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceProducts, "check", lambda self: pytest.fail("checked"))
    ranks = Ranks(0, 1, 0, 1, "job", "single", "job")
    log: Any = SimpleNamespace(event=None)
    watch = DeviceWatch(DeviceCheckConfig(every=None), device=CPU, dtype=torch.float32, ranks=ranks, log=log)
    watch.check(0)
    watch.after(999, [0.0], seconds=1.0)


def test_devices_that_round_otherwise_are_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sums = DeviceProducts(CPU, torch.float32).expected
    monkeypatch.setattr(DeviceProducts, "check", lambda self: CheckResult((sums[0] + 1, *sums[1:]), 1.0))
    ranks = Ranks(0, 1, 0, 1, "job", "single", "job")
    log: Any = SimpleNamespace(event=None)
    watch = DeviceWatch(DeviceCheckConfig(), device=CPU, dtype=torch.float32, ranks=ranks, log=log)
    with caplog.at_level(logging.WARNING):
        watch.check(0)
        watch.check(1000)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("no device gives the exact result of a product of 128×256 and 256×128 numbers")


def train_with_a_wrong_device(ranks: Ranks, recipe: Path) -> str:
    """Rank 1's products are wrong from the second check on."""
    process_group.stop()  # the stage makes its own
    stage = stages_of(load_recipe(recipe))["pretrain"]
    calls = []

    def wrong_later(left: Tensor, right: Tensor) -> Tensor:
        calls.append(left)
        late = len(calls) > len(device_check.SHAPES["cpu"])
        return with_a_wrong_bit(left @ right) if ranks.rank == 1 and late else left @ right

    device_check.multiply = wrong_later
    try:
        train_stage(stage, ranks)
    except RuntimeError as error:
        report_failure(stage.failures, ranks, 4, error, logs=stage.logs)
        return type(error).__name__
    return ""


@pytest.mark.distributed
def test_a_wrong_device_ends_the_training(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """After the check at step 4 nothing is saved, and the report to show is that of the rank itself."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        data={"workers": 0},
        guards={"check_devices": {"every": 4}},
        checkpoint={"every": 2, "keep": 9, "background": False},
        pretrain=RECIPE["pretrain"] | {"steps": 6, "phases": [{"name": "only", "start_lr": 1e-4}]},
        cooldown=None,
    )
    assert run_processes(train_with_a_wrong_device, 2, recipe) == ["PeerDeviceError", "WrongDeviceError"]
    stage = stages_of(load_recipe(recipe))["pretrain"]
    (row,) = (row for row in History(stage.folder).rows() if row["event"] == "device")
    assert (row["rank"], row["problem"], row["step"]) == (1, "wrong", 4)
    assert sorted(path.name for path in stage.checkpoints.glob("step_*")) == ["step_00000002"]
    assert len(list(stage.failures.iterdir())) == 2
    failure = worst_failure(stage.failures, "*")
    assert failure is not None
    assert (failure["rank"], failure["kind"]) == (1, "WrongDeviceError")
