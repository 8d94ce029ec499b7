"""Where one state of a stage ends and another begins: both sides of each comparison of monitor/stage_state.py."""

from types import SimpleNamespace
from typing import cast

import pytest

from tests.monitor.run_by_hand import Run, job
from vjepa_scale.monitor.stage_state import _is_late, _slurm_restart, _stands_still
from vjepa_scale.monitor.states import StageStatus


@pytest.mark.parametrize(
    ("idle_s", "step_s", "still"),
    [
        (None, 1.0, False),
        (300.0, None, False),  # five minutes …
        (300.5, None, True),
        (300.0, 1.0, False),
        (300.5, 15.0, True),
        (300.5, 15.5, False),  # … and 20 of its steps
        (400.0, 20.0, False),
        (400.5, 20.0, True),
    ],
)
def test_a_stage_stands_still_after_twenty_steps_and_five_minutes(
    idle_s: float | None, step_s: float | None, still: bool
) -> None:
    status = SimpleNamespace(idle_s=idle_s, step_s=step_s)
    assert _stands_still(cast("StageStatus", status)) is still


@pytest.mark.parametrize(
    ("idle_s", "step_s", "late"),
    [
        (None, 1.0, False),
        (60.0, None, False),
        (60.5, None, True),
        (60.5, 12.0, True),
        (60.5, 12.5, False),
        (100.0, 20.0, False),
        (100.5, 20.0, True),
    ],
)
def test_a_step_is_late_after_five_of_them_and_a_minute(idle_s: float | None, step_s: float | None, late: bool) -> None:
    status = SimpleNamespace(idle_s=idle_s, step_s=step_s)
    assert _is_late(cast("StageStatus", status)) is late


@pytest.mark.parametrize(("restarts", "state"), [(0, "running"), (1, "running"), (2, "starting")])
def test_an_attempt_is_of_the_present_start_unless_slurm_counts_a_later_one(
    restarts: int, state: str, run: Run
) -> None:
    """The history tells of start 1; an answer of Slurm's may be some seconds old."""
    run.submit("pretrain")
    run.start("pretrain", restart=0)
    run.start("pretrain", restart=1, ago=50)
    assert run.pretrain(job("RUNNING", restarts=restarts)).state == state


@pytest.mark.parametrize(
    ("starts", "restarts", "attempt", "silent"),
    [(0, 0, 0, 0), (0, 1, 2, 1), (1, 0, 1, 0), (1, 1, 2, 1), (1, 2, 3, 2), (3, 2, 3, 2), (3, 0, 3, 2)],
)
def test_attempts_are_those_of_the_history_or_of_slurm_whichever_are_more(
    starts: int, restarts: int, attempt: int, silent: int, run: Run
) -> None:
    """silent: how many are said to have ended without an error message"""
    run.submit("pretrain")
    for restart in range(starts):
        run.start("pretrain", restart=restart)
    stage = run.pretrain(job("RUNNING", restarts=restarts))
    assert stage.attempt == attempt
    assert stage.endings == ["ended without an error message"] * silent


@pytest.mark.parametrize(("later_s", "told"), [(3600.0, True), (-3600.0, False), (None, False)])
def test_a_start_is_expected_only_in_the_future(later_s: float | None, told: bool, run: Run) -> None:
    run.submit("pretrain")
    start_time = None if later_s is None else run.now + later_s
    stage = run.pretrain(job("PENDING", reason="Priority", start_time=start_time))
    assert stage.state == "pending"
    assert stage.detail.startswith("Priority, expected to start ") is told
    assert told or stage.detail == "Priority"


@pytest.mark.parametrize(("step", "state"), [(12, "damaged"), (11, "stopped")])
def test_a_stage_was_done_where_it_came_to_the_end_of_today(step: int, state: str, run: Run) -> None:
    """The last checkpoint is gone; or the recipe has become longer since."""
    run.submit("pretrain")
    run.start("pretrain")
    run.add("pretrain", "done", step=step)
    assert run.pretrain(None).state == state


def test_seconds_to_go_end_at_zero(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.train("pretrain", 0, 11)
    assert run.pretrain(job("RUNNING")).eta_s == pytest.approx(2.0)
    run.train("pretrain", 11, 12)
    assert run.pretrain(job("RUNNING")).eta_s == 0


@pytest.mark.parametrize(
    ("name", "restart"), [("100.0-3", 3), ("100.*-12", 12), ("100.1-0", 0), ("h:29500-0", None), ("100", None)]
)
def test_the_start_of_a_slurm_job_is_in_its_name(name: str, restart: int | None) -> None:
    assert _slurm_restart(name) == restart
