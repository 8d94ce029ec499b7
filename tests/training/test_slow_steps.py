"""A step that takes many times the median: which ones are reported, and what two ranks write while one hangs."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chain import RECIPE, write_recipe
from tests.processes import LIMIT_S, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data import loader
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.log_sections import ProfileConfig
from vjepa_scale.run.events import History
from vjepa_scale.training import slow_steps
from vjepa_scale.training.slow_steps import AT_LEAST_S, MOST_FILES, SlowSteps
from vjepa_scale.training.trainer import train_stage

STUCK = 5  # of the two ranks' run


# -- which steps, in a time of their own ---------------------------------------------------------------------------


class Run:
    """SlowSteps over steps of given seconds, turn by turn. Nothing here waits."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.slow = SlowSteps(
            ProfileConfig(**keys), folder=folder, rank=3, event=lambda kind, **row: self.events.append(row)
        )

    def steps(self, seconds: list[float], *, first: int = 0, suspended_s: float = 0.0) -> list[int]:
        """The steps that are reported. suspended_s: of the last step, in one turn"""
        before = len(self.events)
        self.slow.begin(first)
        for step, length in enumerate(seconds, start=first):
            self.slow.arm(step)
            self._turns(length, suspended_s if step == first + len(seconds) - 1 else 0.0)
            self.slow.disarm(step, seconds=length)
        return [event["step"] for event in self.events[before:]]

    def _turns(self, length: float, suspended_s: float) -> None:
        now, begun = [100.0], []

        def wait(tick: float) -> bool:
            now[0] += suspended_s if not begun and suspended_s else tick
            begun.append(tick)
            return now[0] > 100.0 + length + tick

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slow_steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
            patch.setattr(self.slow, "_ended", SimpleNamespace(wait=wait))
            self.slow._watch()


@pytest.mark.parametrize(
    ("seconds", "keys", "slow"),
    [
        ([2, 2, 2, 2, 30], {}, [4]),  # ten times the median, and 10 s
        ([2, 2, 2, 2, 15], {}, []),
        ([0.1, 0.1, 0.1, 0.1, 9], {}, []),  # less than 10 s
        ([0.1, 0.1, 0.1, 0.1, 12], {}, [4]),
        ([40, 2, 2, 2, 30], {}, [4]),  # the first step does not count
        ([2, 2, 2, 30, 30], {}, [4]),  # too few before step 3
        ([2, 2, 2, 2, 30, 2, 30], {}, [4, 6]),
        ([2, 2, 2, 2, 30], {"slow_factor": None}, []),
        ([2, 2, 2, 2, 15], {"slow_factor": 4}, [4]),
        # Until a rank has written its profile, the others wait in the step after it.
        ([2, 2, 2, 2, 30, 30, 30], {"steps": (4, 5)}, [6]),
    ],
)
def test_which_steps_are_slow(seconds: list[float], keys: dict[str, Any], slow: list[int], tmp_path: Path) -> None:
    run = Run(tmp_path, **keys)
    assert run.steps(seconds) == slow
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == [f"step_{step}_rank_3.txt" for step in slow]


def test_each_phase_has_its_own_median(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([2, 2, 2, 2])
    assert run.steps([30, 30, 30, 30, 30], first=4) == []


def test_a_suspended_job_is_not_slow(tmp_path: Path) -> None:
    assert Run(tmp_path).steps([2, 2, 2, 2, 2], suspended_s=3600.0) == []


def test_the_number_of_files_is_limited(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([2, 2, 2, 2] + [30, 2, 2] * (MOST_FILES + 3))
    assert len(list(tmp_path.rglob("*.txt"))) == MOST_FILES


# -- two ranks -----------------------------------------------------------------------------------------------------


def train_and_get_stuck(ranks: Ranks, recipe: Path) -> None:
    """Rank 1's data of one step come when both ranks have written their stacks."""
    process_group.stop()  # the stage makes its own
    slow_steps.AT_LEAST_S, slow_steps._TICK_S = 0.5, 0.05
    stage = stages_of(load_recipe(recipe))["pretrain"]
    usual = loader.load_micro_batch

    def hangs_on_the_file_server() -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(list((stage.folder / "stacks").glob(f"step_{STUCK}_rank_*.txt"))) < ranks.world_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def load(*words: Any, **more: Any) -> Any:
        if ranks.rank == 1 and words[-1][0] == STUCK:
            hangs_on_the_file_server()
        return usual(*words, **more)

    loader.load_micro_batch = load
    train_stage(stage, ranks)


@pytest.mark.distributed
def test_both_ranks_write_their_stacks_while_one_hangs(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    assert AT_LEAST_S == 10
    pretrain = RECIPE["pretrain"] | {"steps": STUCK + 1, "phases": [{"name": "only", "start_lr": 1e-4}]}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        data={"workers": 0},
        profile={"slow_factor": 1.5},
        checkpoint={"every": 100},
        pretrain=pretrain,
        cooldown=None,
    )
    run_processes(train_and_get_stuck, 2, recipe)
    stage = tmp_path / "run" / "pretrain"
    waiting, stuck = ((stage / "stacks" / f"step_{STUCK}_rank_{rank}.txt").read_text() for rank in (0, 1))
    assert "hangs_on_the_file_server" in stuck
    assert "hangs_on_the_file_server" not in waiting
    assert "in compute_gradients" in waiting  # it waits for rank 1 in a collective
    events = [row for row in History(stage).rows() if row["event"] == "slow_step" and row["step"] == STUCK]
    assert [Path(event["stacks"]).name for event in events] == [f"step_{STUCK}_rank_0.txt"]
