"""What status says of a run that is alive and not well: signs of a collapse, ranks that hold up the others."""

from tests.monitor.run_by_hand import Run, job
from vjepa_scale.monitor.status import render


def test_signs_of_a_collapse_are_those_of_the_last_attempt(run: Run) -> None:
    run.submit("pretrain")
    run.start("pretrain")
    run.train("pretrain", 0, 5)
    sign = {"column": "effective_rank", "value": 1.25, "limit": 2.0, "step": 4}
    run.add("pretrain", "collapse", job="100.0-0", **sign)
    status = run.look(job("RUNNING"))
    assert status.stages[0].signs == ["effective_rank 1.25 (limit 2) at step 4"]
    assert "signs of a collapse: effective_rank 1.25" in render(status)
    run.start("pretrain", restart=1, step=4)
    assert run.pretrain(job("RUNNING")).signs == []


def test_ranks_that_hold_up_the_others_are_named(run: Run) -> None:
    """By the last row about each problem of a rank, since the last start."""
    run.submit("pretrain")
    run.start("pretrain")
    run.train("pretrain", 0, 5)
    row = {"rank": 5, "node": "n07", "device": "cuda:1 (H100)", "share": None, "over": False, "step": 3000}
    for change in (
        {"problem": "slow", "times": 1.42},
        {"problem": "data", "times": None, "share": 0.31},
        {"problem": "slow", "times": 1.9, "rank": 6},
        {"problem": "slow", "times": 1.0, "rank": 6, "over": True},
        {"problem": "slow", "times": "1.5", "rank": 7},  # no whole row
    ):
        run.add("pretrain", "device", job="100.0-0", **(row | change))
    status = run.look(job("RUNNING"))
    slow = "rank 5 on n07, cuda:1 (H100): slow: its matrix products take 1.42 times as long as the other ranks"
    late = "rank 5 on n07, cuda:1 (H100): waits for its data, 31% of the time"
    assert status.stages[0].stragglers == [f"{slow} (at step 3000)", f"{late} (at step 3000)"]
    assert "straggler: rank 5 on n07" in render(status)
    run.start("pretrain", restart=1, step=4)
    assert run.pretrain(job("RUNNING")).stragglers == []


# -- in Slurm --------------------------------------------------------------------------------------------
