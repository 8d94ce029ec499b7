"""When a stage is tried again: the rules of launch/retry_policy.py, case by case, on histories written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.retry_policy import Verdict, end_of_attempt, judge, refuse_endless_restarts
from vjepa_scale.run.events import Attempt, History


def failed(step: int | None = 7, kind: str = "ValueError", saved: int | None = None, **values: Any) -> Attempt:
    row = {"kind": kind, "message": "a clip", "step": step, "user_error": False, "bystander": False}
    return Attempt(saved=saved, end={"event": "failed", **row, **values})


def killed(recurs: bool = False, saved: int | None = None) -> Attempt:
    """By a signal: of SIGSEGV, SIGABRT and their like the report says that it recurs."""
    return failed(kind="Killed", saved=saved, recurs=recurs)


def interrupted(step: int | None, saved: int | None = None) -> Attempt:
    return Attempt(saved=saved, end={"event": "interrupted", "signal": "SIGUSR2", "step": step})


DONE = Attempt(saved=12, end={"event": "done", "step": 12})
SILENT = Attempt()  # ended without a word: of earlier attempts only
TWICE = "ValueError at step 7 twice in a row: it would come again"
TWICE_BEFORE = "ValueError before the first step twice in a row: it would come again"


@pytest.mark.parametrize(
    ("tried", "max_restarts", "kind", "why"),
    [
        ([DONE], 0, "done", ""),
        ([failed(), DONE], 0, "done", ""),
        # A signal: the job may be preempted as often as the cluster likes, as long as it brings a checkpoint.
        ([interrupted(7, saved=7)], 0, "again", ""),
        ([interrupted(7, saved=7)] * 9, 2, "again", ""),
        ([interrupted(None)] * 9, 0, "again", ""),  # it had not begun: nobody's failure
        ([interrupted(0)], 1, "again", ""),  # step 0 is a step, not none
        ([interrupted(0)], 0, "stop", "1 attempts in a row brought no new checkpoint"),
        # The user has something to mend, whatever else is so.
        ([failed(user_error=True)], 9, "stop", "it is for the user to mend"),
        ([failed(user_error=True)], 0, "stop", "it is for the user to mend"),
        # No restarts are wanted.
        ([failed(saved=5)], 0, "stop", "launch.max_restarts is 0"),
        ([failed(saved=5)], 1, "again", ""),
        # The same failure at the same step.
        ([failed(), failed()], 9, "stop", TWICE),
        ([failed(saved=5), failed(saved=6)], 9, "stop", TWICE),
        ([failed(), failed(message="another clip")], 9, "stop", TWICE),  # from the first step on the words may differ
        ([failed(), failed(step=8)], 9, "again", ""),
        ([failed(), failed(step=6)], 9, "again", ""),
        ([failed(), failed(kind="KeyError")], 9, "again", ""),
        ([failed(), failed(step=None)], 9, "again", ""),
        ([failed(), failed(step=8), failed()], 9, "again", ""),  # not in a row
        ([failed(), interrupted(7, saved=7), failed()], 9, "again", ""),
        ([failed(), SILENT, failed()], 9, "again", ""),
        ([failed(step=0), failed(step=0)], 9, "stop", "ValueError at step 0 twice in a row: it would come again"),
        # Before the first step, the kind is not enough.
        ([failed(step=None), failed(step=None)], 9, "stop", TWICE_BEFORE),
        ([failed(step=None), failed(step=None, message="another clip")], 9, "again", ""),
        # A supervisor's words have process ids and seconds; its cause has none.
        (
            [failed(None, "Killed", message=f"pid {n} ended", cause="SIGSEGV, setup") for n in (1, 2)],
            9,
            "stop",
            "Killed before the first step twice in a row",
        ),
        ([failed(None, "Killed", cause=name) for name in ("SIGSEGV, setup", "SIGBUS, setup")], 9, "again", ""),
        # What ranks see that have lost a peer says nothing.
        ([failed(bystander=True), failed(bystander=True)], 9, "again", ""),
        # What comes from outside says nothing either, such as SIGKILL: but a crash of the code comes again.
        ([killed(), killed()], 9, "again", ""),
        ([failed(), killed()], 9, "again", ""),
        ([killed(recurs=True), killed(recurs=True)], 9, "stop", "Killed at step 7 twice in a row: it would come again"),
        ([killed(recurs=True), killed()], 9, "again", ""),
        ([killed(), killed(), killed()], 2, "stop", "3 attempts in a row brought no new checkpoint"),
        ([killed(saved=5)] * 9, 2, "again", ""),
        # Restarts that bring nothing: the first attempt and max_restarts more, not one fewer and not one more.
        ([failed(step=1)], 1, "again", ""),
        ([failed(step=1), failed(step=2)], 1, "stop", "2 attempts in a row brought no new checkpoint"),
        ([failed(step=1), failed(step=2)], 2, "again", ""),
        ([failed(step=k) for k in (1, 2, 3)], 2, "stop", "3 attempts in a row brought no new checkpoint"),
        ([failed(step=1), SILENT, interrupted(0)], 2, "stop", "3 attempts in a row brought no new checkpoint"),
        ([failed(step=1), interrupted(None), failed(step=3)], 2, "again", ""),
        # A checkpoint, of step 0 too, begins the count anew, wherever it is in the row.
        ([failed(step=1), failed(step=2), failed(step=3, saved=3), failed(step=4), failed(step=5)], 2, "again", ""),
        ([failed(step=k, saved=0) for k in (1, 2, 3)], 2, "again", ""),
        ([failed(saved=4), *(failed(step=k) for k in (1, 2, 3))], 2, "stop", "3 attempts in a row brought no new "),
    ],
)
def test_what_follows_an_attempt(tried: list[Attempt], max_restarts: int, kind: str, why: str) -> None:
    verdict = judge(tried, max_restarts=max_restarts)
    assert (verdict.kind, verdict.why[: len(why) or None]) == (kind, why)
    assert verdict.user_error == (why == "it is for the user to mend")


def test_the_end_is_told_in_words() -> None:
    assert judge([failed(message="a clip\nof many")], max_restarts=1).ended == "ValueError at step 7: a clip"
    assert judge([interrupted(None)], max_restarts=1).ended == "SIGUSR2 before the first step"
    assert judge([interrupted(0)], max_restarts=1).ended == "SIGUSR2 at step 0"


# -- histories -----------------------------------------------------------------------------------------


def started(history: History, restart: int, job_id: str = "100") -> None:
    history.add("started", job=f"{job_id}.0-{restart}", job_id=job_id, kind="fresh", step=0)


def test_endless_restarts_by_slurm_are_refused(tmp_path: Path) -> None:
    """max_restarts 2: the fourth start of a job is refused where the three before it left no checkpoint."""
    history = History(tmp_path)

    def refuse() -> None:
        refuse_endless_restarts(history, job_id="100", max_restarts=2)

    refuse()
    for restart in range(2):
        started(history, restart)
    for restart in range(5):
        started(history, restart, job_id="99")  # of an earlier launch
    refuse()
    started(history, 2)
    with pytest.raises(UserError, match=r"launch\.max_restarts: 3 attempts in a row brought no new checkpoint"):
        refuse()
    history.add("saved", job="100.0-2", step=4)
    refuse()


def report(folder: Path, rank: int = 0, *, job: str = "100.0-0", **values: Any) -> None:
    row = {"rank": rank, "step": 7, "kind": "ValueError", "message": "a clip", "user_error": False}
    folder.mkdir(parents=True, exist_ok=True)
    content = {**row, "bystander": False, "traceback": "Traceback", "log": None, **values}
    (folder / f"{job}.{rank}.json").write_text(json.dumps(content))


def end(folder: Path, restart: int = 0, **values: Any) -> Verdict:
    job, log = f"100.*-{restart}", folder / "100_0_log.err"
    words = {"job_id": "100", "max_restarts": 3, "log": log, **values}
    return end_of_attempt(History(folder), folder / "failures", job=job, **words)


def last(folder: Path) -> dict[str, Any]:
    return History(folder).rows()[-1]


def test_a_ranks_report_becomes_the_history_once(tmp_path: Path) -> None:
    started(History(tmp_path), 0)
    report(tmp_path / "failures", 1, kind="DistBackendError", bystander=True)
    report(tmp_path / "failures", 2)
    verdict = end(tmp_path)
    assert (verdict.kind, verdict.ended) == ("again", "ValueError at step 7: a clip")
    row = last(tmp_path)
    assert (row["event"], row["rank"], row["step"], row["job_id"]) == ("failed", 2, 7, "100")
    assert "traceback" not in row
    count = len(History(tmp_path).rows())
    assert end(tmp_path) == verdict
    assert len(History(tmp_path).rows()) == count
    started(History(tmp_path), 1)
    report(tmp_path / "failures", job="100.0-1")
    assert end(tmp_path, 1).why == TWICE


def test_a_rank_that_stopped_alone_was_interrupted_at_its_last_checkpoint(tmp_path: Path) -> None:
    """A signal came while it waited for data in vain: no failure, and nothing was saved then."""
    history = History(tmp_path)
    started(history, 0)
    history.add("saved", job="100.0-0", step=8)
    report(tmp_path / "failures", 1, kind="NothingSaved", signal="SIGUSR2", step=9)
    report(tmp_path / "failures", 0, kind="RuntimeError", bystander=True, step=9)
    assert end(tmp_path, max_restarts=0).kind == "again"
    row = last(tmp_path)
    assert (row["event"], row["signal"], row["step"]) == ("interrupted", "SIGUSR2", 8)
    # Of an attempt that has saved nothing: the checkpoint that it resumed from, if there was one.
    history.add("started", job="100.0-1", job_id="100", kind="resume", step=8)
    report(tmp_path / "failures", 1, job="100.0-1", signal="SIGTERM")
    end(tmp_path, 1)
    assert (last(tmp_path)["signal"], last(tmp_path)["step"]) == ("SIGTERM", 8)
    started(history, 2)
    report(tmp_path / "failures", 1, job="100.0-2", signal="SIGTERM")
    end(tmp_path, 2)
    assert last(tmp_path)["step"] is None


def test_ranks_without_a_word_are_tried_again_until_the_restarts_are_used_up(tmp_path: Path) -> None:
    (tmp_path / "100_0_log.err").write_text("")
    verdicts = []
    for restart in range(4):
        started(History(tmp_path), restart)
        verdicts.append(end(tmp_path, restart))
    assert last(tmp_path)["kind"] == "Killed"
    assert last(tmp_path)["log"] == str(tmp_path / "100_0_log.err")
    assert [verdict.kind for verdict in verdicts] == ["again"] * 3 + ["stop"]
    assert verdicts[-1].why == "4 attempts in a row brought no new checkpoint"


def test_a_setup_that_fails_twice_in_the_same_words_stops(tmp_path: Path) -> None:
    assert end(tmp_path, setup="module load: no such module").kind == "again"
    assert (last(tmp_path)["kind"], last(tmp_path)["message"]) == ("SetupFailed", "module load: no such module")
    verdict = end(tmp_path, 1, setup="module load: no such module")
    assert (verdict.kind, verdict.why.partition(" twice")[0]) == ("stop", "SetupFailed before the first step")


def test_a_signal_before_the_ranks_could_listen_is_no_failure(tmp_path: Path) -> None:
    for restart in range(5):
        assert end(tmp_path, restart, early_signal="SIGUSR2", max_restarts=0).kind == "again"
        assert (last(tmp_path)["event"], last(tmp_path)["step"]) == ("interrupted", None)
    # Once they have begun, or left a report, it is one.
    report(tmp_path / "failures", job="100.0-5")
    assert end(tmp_path, 5, early_signal="SIGUSR2").ended == "ValueError at step 7: a clip"
    started(History(tmp_path), 6)
    assert end(tmp_path, 6, early_signal="SIGUSR2").ended.startswith("Killed before the first step")


def test_a_cancelled_stage_is_not_tried_again(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add("submitted", cluster="slurm", job_id="100")
    history.add("cancelled")
    history.add("submitted", cluster="slurm", job_id="100")
    started(history, 0)
    assert end(tmp_path).kind == "again"  # it was the launch before this one that was cancelled
    history.add("cancelled")
    assert end(tmp_path).why == "it was cancelled"


def test_on_this_machine_the_attempts_of_the_last_launch_count(tmp_path: Path) -> None:
    history = History(tmp_path)
    for _ in range(5):
        started(history, 0, job_id="99")
    history.add("submitted", cluster="local", job_id="100")
    started(history, 0)
    assert end(tmp_path, job_id=None).kind == "again"


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict("done", "done"), "the stage is complete"),
        (Verdict("again", "SIGUSR2 at step 7"), "SIGUSR2 at step 7; another attempt"),
        (
            Verdict("stop", "SIGUSR2 at step 7", "it was cancelled"),
            "SIGUSR2 at step 7; no other attempt: it was cancelled",
        ),
    ],
)
def test_a_decision_in_the_log(verdict: Verdict, words: str) -> None:
    assert f"{verdict}" == words
