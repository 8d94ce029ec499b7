"""Which ranks are named when the others have lost them: reports of ranks and of their supervisors, by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vjepa_scale.run.failures import worst_failure

JOB = "100.0-0"


def place(rank: int) -> dict[str, Any]:
    return {"rank": rank, "node": f"c{rank // 2}", "pid": 50 + rank, "gpu": str(rank % 2)}


def report(rank: int, kind: str = "ValueError", step: int | None = 12, **values: Any) -> dict[str, Any]:
    usual = {"message": "words", "user_error": False, "bystander": False, "log": None}
    return {"rank": rank, "kind": kind, "step": step, **usual, **values}


def bystander(rank: int) -> dict[str, Any]:
    return report(rank, "RuntimeError", message="Connection closed by peer\nmore", bystander=True)


def account(rank: int, step: int = 12, **values: Any) -> dict[str, Any]:
    usual = {"place": place(rank), "part": "forward", "waited_s": 20.4, "overdue": True, "answered": True}
    found = {**usual, "waits": False, "state": "sleeping", **values}
    waits = found["waits"] or (found["answered"] and not found["overdue"])
    return report(rank, "Hung", step, message="x", bystander=waits, recurs=found["answered"], account=found)


WAITS = {"waits": True, "part": "reduce"}
STOPPED = {"answered": False, "state": "stopped"}
ONE = "rank 1 (node c0, pid 51, GPU 1)"


@pytest.mark.parametrize(
    ("reports", "ranks", "rank", "kind", "recurs", "message"),
    [
        # A rank that tells its own error, or whose supervisor does, is the cause, whoever has lost it.
        ([bystander(0), report(1)], 2, 1, "ValueError", True, "words"),
        ([bystander(0), report(1, "Killed", recurs=False)], 2, 1, "Killed", False, "words"),
        ([report(1, "Killed"), report(2, "UserError", user_error=True)], 3, 2, "UserError", True, "words"),
        ([account(0, **WAITS), report(1, "Killed"), account(2, **STOPPED)], 3, 1, "Killed", True, "words"),
        # One that is gone, with its supervisor: all that is left is who has said nothing.
        (
            [bystander(0), bystander(2)],
            3,
            1,
            "Lost",
            False,
            f"{ONE} ended without a word; noticed by rank 0 at step 12: RuntimeError: Connection closed by peer",
        ),
        # A whole node; and a peer that was asked, and had not lost anybody yet.
        (
            [bystander(0), account(1, overdue=False, **WAITS)],
            4,
            2,
            "Lost",
            False,
            "node c1 (ranks 2, 3) ended without a word; noticed by rank 0 at step 12: "
            "RuntimeError: Connection closed by peer",
        ),
        # A collective's own time-out came first: the one that does not answer is to blame, not one that computes.
        (
            [bystander(0), account(1, overdue=False, **STOPPED), account(2, overdue=False)],
            3,
            1,
            "Lost",
            False,
            f"{ONE} did not answer for 20 s, last seen in step 12 (forward, stopped); noticed by rank 0 at step 12: "
            "RuntimeError: Connection closed by peer",
        ),
        # One that computes, and had time left, is not the cause.
        (
            [bystander(0), account(1, overdue=False, part="ema")],
            3,
            2,
            "Lost",
            False,
            "rank 2 (node c1, pid 52, GPU 0) ended without a word; noticed by rank 0 at step 12: RuntimeError: "
            "Connection closed by peer",
        ),
        ([bystander(0), bystander(1)], 2, 0, "RuntimeError", True, "Connection closed by peer\nmore"),
        ([bystander(0)], None, 0, "RuntimeError", True, "Connection closed by peer\nmore"),  # of a run without places
        # Nobody has come further for too long.
        (
            [account(0, **WAITS), account(1, **STOPPED)],
            2,
            1,
            "Hung",
            False,
            f"{ONE} did not answer for 20 s, last seen in step 12 (forward, stopped); noticed by rank 0 at step 12",
        ),
        (
            [account(0, 13, **WAITS), account(1, part="ema"), account(2, 13, **WAITS)],
            3,
            1,
            "Hung",
            True,
            f"{ONE} has not come further for 20 s, last seen in step 12 (ema); noticed by rank 0 at step 13",
        ),
        (
            [account(0, **WAITS), account(2, **WAITS)],
            3,
            1,
            "Hung",
            False,
            f"{ONE} did not answer for 20 s; noticed by rank 0 at step 12",
        ),
        (
            [account(0, **WAITS), account(1, **WAITS)],
            2,
            0,
            "Hung",
            True,
            "2 ranks waited for 20 s for collectives or devices, in reduce",
        ),
        # Its peers end by gloo's own time-out meanwhile.
        (
            [bystander(0), account(1, **STOPPED)],
            2,
            1,
            "Hung",
            False,
            f"{ONE} did not answer for 20 s, last seen in step 12 (forward, stopped); noticed by rank 0 at step 12",
        ),
    ],
)
def test_who_is_named(
    reports: list[dict[str, Any]],
    ranks: int | None,
    rank: int,
    kind: str,
    recurs: bool,
    message: str,
    tmp_path: Path,
) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    for row in reports:
        own = ".supervisor" if "account" in row or row["kind"] == "Killed" else ""
        (failures / f"{JOB}.{row['rank']}{own}.json").write_text(json.dumps(row))
    (failures / "99.0-0.1.json").write_text(json.dumps(report(1, "KeyError")))  # of another job
    if ranks is not None:
        (tmp_path / "ranks.json").write_text(json.dumps({"job": JOB, "ranks": [place(n) for n in range(ranks)]}))
    found = worst_failure(failures, "100.*-0")
    assert found is not None
    assert (found["rank"], found["kind"], found.get("recurs", True)) == (rank, kind, recurs)
    assert found["message"] == message


def test_of_many_ranks_some_are_named(tmp_path: Path) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    (failures / f"{JOB}.0.json").write_text(json.dumps(bystander(0)))
    (tmp_path / "ranks.json").write_text(json.dumps({"job": JOB, "ranks": [place(n) for n in range(512)]}))
    found = worst_failure(failures, JOB)
    assert found is not None
    # So many are not the cause: they were ended before they could say anything.
    assert found["rank"] is None
    assert found["message"].startswith("511 of 512 ranks left no report; noticed by rank 0 at step 12: RuntimeError")
    for rank in range(300):
        (failures / f"{JOB}.{rank}.json").write_text(json.dumps(bystander(rank)))
    found = worst_failure(failures, JOB)
    assert found is not None
    assert found["rank"] == 300
    assert found["message"].count("rank ") == 9  # eight, and the one that has noticed it
    assert "rank 307 (node c153, pid 357, GPU 1) and 204 more ended without a word" in found["message"]


# On the GPUs of 16 ranks. Innocent ranks block where they launch kernels; NCCL's watchdog aborts them.
ON_GPU = {"part": "backward"}
OF_16 = "rank 15 (node c7, pid 65, GPU 1)"


def aborted(rank: int, **values: Any) -> dict[str, Any]:
    cause = {"cause": "SIGABRT, backward", "message": f"rank {rank} ended by SIGABRT"}
    return report(rank, "Killed", **{**cause, "bystander": True, "recurs": False, **values})


@pytest.mark.parametrize(
    ("reports", "rank", "kind", "recurs", "message"),
    [
        # The node of two ranks, or a rank, is gone.
        ([aborted(n) for n in range(14)], 14, "Lost", False, "node c7 (ranks 14, 15) ended without a word; noticed"),
        ([aborted(n) for n in range(15)], 15, "Lost", False, f"{OF_16} ended without a word; noticed by rank 0"),
        ([aborted(n) for n in range(8, 15)], None, "Lost", False, "9 of 16 ranks left no report; noticed by rank 8"),
        # One that tells its end is the cause, whichever wrote first.
        (
            [*(aborted(n) for n in range(15)), report(15, "Killed", cause="SIGSEGV, backward")],
            15,
            "Killed",
            True,
            "words",
        ),
        ([*(aborted(n) for n in range(15)), report(15)], 15, "ValueError", True, "words"),
        ([*(aborted(n, bystander=False) for n in range(15)), report(15)], 15, "ValueError", True, "words"),
        ([aborted(n) for n in range(16)], 0, "Killed", False, "rank 0 ended by SIGABRT"),
        # One does not answer; all others, which are overdue, too, launch kernels behind a collective.
        (
            [*(account(n, **ON_GPU) for n in range(15)), account(15, part="reduce", **{"answered": False})],
            15,
            "Hung",
            False,
            f"{OF_16} did not answer for 20 s, last seen in step 12 (reduce); noticed by rank 0 at step 12",
        ),
        # One is behind, and one of those loads.
        (
            [*(account(n, 13, **ON_GPU) for n in range(15)), account(15, 12, **ON_GPU)],
            15,
            "Hung",
            True,
            f"{OF_16} has not come further for 20 s, last seen in step 12 (backward); noticed by rank 0 at step 13",
        ),
        (
            [*(account(n, **ON_GPU) for n in range(15)), account(15, part="load")],
            15,
            "Hung",
            True,
            f"{OF_16} has not come further for 20 s, last seen in step 12 (load); noticed by rank 0 at step 12",
        ),
        # A kernel that never ends: nobody knows whose.
        (
            [account(n, part="forward" if n else "backward") for n in range(16)],
            0,
            "Hung",
            False,
            "16 ranks waited for 20 s for collectives or devices, in backward, forward",
        ),
        # By number, not by the names of files: 2 before 10. Several that load may have a file server in common.
        (
            [account(n, part="load") if n in (2, 10) else account(n, **ON_GPU) for n in range(16)],
            2,
            "Hung",
            False,
            "rank 2 (node c1, pid 52, GPU 0) has not come further for 20 s, last seen in step 12 (load); "
            "rank 10 (node c5, pid 60, GPU 0) has not come further for 20 s, last seen in step 12 (load); noticed",
        ),
        # Of the ranks that hang, the one that is least far.
        (
            [
                account(n, 12 + (n != 15), part="ema", answered=False) if n > 5 else account(n, **WAITS)
                for n in range(16)
            ],
            15,
            "Hung",
            False,
            f"{OF_16} did not answer for 20 s, last seen in step 12 (ema); rank 6 (",
        ),
    ],
)
def test_of_16_ranks_on_gpus(
    reports: list[dict[str, Any]], rank: int | None, kind: str, recurs: bool, message: str, tmp_path: Path
) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    for row in sorted(reports, key=lambda row: str(row["rank"])):
        (failures / f"{JOB}.{row['rank']}.supervisor.json").write_text(json.dumps(row))
    (tmp_path / "ranks.json").write_text(json.dumps({"job": JOB, "ranks": [place(n) for n in range(16)]}))
    found = worst_failure(failures, JOB)
    assert found is not None
    assert (found["rank"], found["kind"], found.get("recurs", True)) == (rank, kind, recurs)
    assert found["message"].startswith(message)


def test_of_equal_failures_the_earliest_is_named_and_of_the_same_the_first_rank(tmp_path: Path) -> None:
    rows = [report(2, message="lost"), report(10, message="nan"), report(11, message="nan")]
    for seconds, row in zip((50, 30, 20), rows, strict=True):
        path = tmp_path / f"{JOB}.{row['rank']}.json"
        path.write_text(json.dumps(row))
        os.utime(path, (seconds, seconds))
    found = worst_failure(tmp_path, JOB)
    assert found is not None
    assert found["rank"] == 10


def test_jobs_of_torchrun_may_have_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "failures"
    folder.mkdir()
    (folder / "[::1]:29500-0.0.json").write_text(json.dumps(bystander(0)))
    places = {"job": "[::1]:29500-0", "ranks": [place(0), place(1)]}
    (tmp_path / "ranks.json").write_text(json.dumps(places))
    found = worst_failure(folder, "[::1]:29500-0")
    assert found is not None
    assert (found["kind"], found["rank"]) == ("Lost", 1)


@pytest.mark.parametrize("content", ["", "[]", '{"job": "7", "ranks": []}', '{"job": "100.0-0"}', '{"ranks": 3}'])
def test_without_a_list_of_this_start_nobody_is_missing(content: str, tmp_path: Path) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    (failures / f"{JOB}.0.json").write_text(json.dumps(bystander(0)))
    (tmp_path / "ranks.json").write_text(content)
    found = worst_failure(failures, JOB)
    assert found is not None
    assert found["kind"] == "RuntimeError"
