"""The process above a rank: it ends as the rank ends, and judges the rank's progress in a time of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.chain import write_recipe
from tests.processes import LIMIT_S, ROOT
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch import supervisor, worker
from vjepa_scale.launch.peers import Peers
from vjepa_scale.launch.supervisor import PEER_GRACE_S, Supervisor
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.run.failures import worst_failure
from vjepa_scale.run.progress import PARTS, Page, Progress, part_of, step_of

RANKS = Ranks(1, 2, 1, 2, "7", "submitit-local", "7")

# -- as a process: its end is the rank's ---------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch.supervisor import supervised
from vjepa_scale.run.progress import Progress

folder, how = Path(sys.argv[1]), sys.argv[2]

def rank(page):
    Progress(page=page, step_s=100).begin(3, first=False)
    (folder / "pid").write_text(str(os.getpid()))
    if how == "value":
        return 40
    if how == "exit":
        sys.exit(75)
    if how == "user":
        raise UserError("no such key", where="a.yaml", fix="another")
    if how == "error":
        raise KeyError("x")
    if how == "quiet":
        os._exit(3)
    if how in ("SIGKILL", "SIGSEGV"):
        os.kill(os.getpid(), getattr(signal, how))
    heard = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: heard.append(signal.Signals(number).name))
    (folder / "listens").touch()
    while len(heard) < 2:
        time.sleep(0.01)
    return heard

def main():
    ranks = Ranks(1, 1, 0, 1, "7", "single", "7")
    value = supervised(rank, ranks=ranks, failures=folder / "failures", logs=folder / "logs")
    print(value, os.getpid() != int((folder / "pid").read_text()), "torch" in sys.modules)

run_command(main)
"""


# What two attempts have in common, whatever their process ids.
CAUSES = {"quiet": "exit code 3, load", "SIGKILL": "SIGKILL, load", "SIGSEGV": "SIGSEGV, load"}


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(folder), how]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("how", "code", "out", "err", "kind"),
    [
        ("value", 0, "40 True False\n", "", None),
        ("exit", 75, "", "", None),
        ("user", 2, "", "error: a.yaml: no such key (another)\n", None),
        ("error", 1, "", "RankError: KeyError: 'x'\n", None),
        ("quiet", 3, "", "ended with exit code 3 and no error message\n", ("Ended", True)),
        ("SIGKILL", 137, "", "ended by SIGKILL\n", ("Killed", False)),
        ("SIGSEGV", 139, "", "ended by SIGSEGV\n", ("Killed", True)),
    ],
)
def test_a_supervisor_ends_as_its_rank(
    how: str, code: int, out: str, err: str, kind: tuple[str, bool] | None, tmp_path: Path
) -> None:
    """kind: of the report that it writes because the rank could not, and whether that would come again."""
    process = start(tmp_path, how)
    said = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, said[0]) == (code, out)
    assert said[1].endswith(err)
    if how == "error":
        assert 'raise KeyError("x")' in said[1] or "in rank" in said[1]  # the rank's own traceback
    reports = [json.loads(path.read_text()) for path in (tmp_path / "failures").glob("*.json")]
    assert [(row["kind"], row["recurs"]) for row in reports] == ([] if kind is None else [kind])
    assert [row["cause"] for row in reports] == ([] if kind is None else [CAUSES[how]])
    assert all((row["rank"], row["step"], row["bystander"]) == (1, 3, False) for row in reports)


def test_the_end_of_a_rank_is_told_while_the_file_server_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ranks.json")  # whoever opens it waits for ever
    process = start(tmp_path, "SIGKILL")
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 137
    assert said.startswith("error: rank 1 (node ")
    assert said.endswith("ended by SIGKILL\n")


def test_signals_reach_the_rank_and_it_dies_with_its_supervisor(tmp_path: Path) -> None:
    process = start(tmp_path, "listen")
    wait_for(lambda: (tmp_path / "listens").exists())
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert sorted(out[: out.index("]")].strip("[").replace("'", "").split(", ")) == ["SIGTERM", "SIGUSR2"]

    (tmp_path / "listens").unlink()
    process = start(tmp_path, "listen")
    wait_for(lambda: (tmp_path / "listens").exists())
    rank = int((tmp_path / "pid").read_text())
    process.kill()
    process.communicate(timeout=LIMIT_S)
    wait_for(lambda: not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().split()[2])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- its judgement, turn by turn; nothing here waits ---------------------------------------------------------------


PEERS = {"rank": 0, "step": 1, "kind": "E", "message": "", "user_error": False, "bystander": False, "log": None}


class Rank:
    """A rank by hand, and its supervisor. Its peer is rank 0."""

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        *,
        answers: bool = True,
        waits: bool = False,
        ranks: Ranks = RANKS,
    ) -> None:
        self.failures = folder / "failures"
        self.failures.mkdir(parents=True, exist_ok=True)
        self.page = Page(step=-1)
        self.progress = Progress(page=self.page, step_s=20, outside_s=80)
        self.supervisor = Supervisor(2**22 + 1, self.page, ranks=ranks, failures=self.failures, logs=folder / "logs")
        self.sent: list[int] = []

        def asked(_: float) -> None:
            if answers:
                self.page.answered, self.page.waits = self.page.asked, int(waits)

        patch.setattr(supervisor.time, "sleep", asked)
        patch.setattr(supervisor, "LOOK_WAIT_S", LIMIT_S)
        patch.setattr(supervisor, "FILES_S", LIMIT_S)
        patch.setattr(self.supervisor, "forward", lambda number, _=None: self.sent.append(number))

    def turns(self, seconds: float) -> list[int]:
        """The signals that the rank has got after so many further seconds."""
        for _ in range(int(seconds / 0.5)):
            self.supervisor.turn(0.5)
        return self.sent

    def peer_fails(self, name: str = "7.0.json") -> None:
        (self.failures / name).write_text(json.dumps(PEERS))

    def account(self) -> dict[str, Any] | None:
        path = self.failures / "7.1.supervisor.json"
        return json.loads(path.read_text()) if path.exists() else None


def test_a_step_has_its_limit_and_each_step_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch)
    for step in range(4):
        rank.progress.begin(step, first=step == 0)
        rank.progress.enter("forward")
        assert not rank.turns(80 if step == 0 else 20)  # the first one compiles
    assert rank.account() is None
    rank.turns(1)
    found = rank.account()
    assert found is not None
    assert (found["step"], found["account"]["part"], found["account"]["overdue"]) == (3, "forward", True)
    assert not rank.sent  # its peers write theirs first
    assert rank.turns(6) == [signal.SIGKILL]


@pytest.mark.parametrize(
    ("answers", "waits", "bystander", "recurs"),
    [(True, True, True, True), (True, False, False, True), (False, False, False, False)],
)
def test_what_an_account_says(
    answers: bool, waits: bool, bystander: bool, recurs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(tmp_path, monkeypatch, answers=answers, waits=waits)
    rank.progress.begin(1, first=False)
    rank.turns(21)
    found = rank.account()
    assert found is not None
    assert (found["bystander"], found["recurs"]) == (bystander, recurs)
    assert (found["account"]["answered"], found["account"]["waits"]) == (answers, waits)


def test_work_between_steps_has_a_longer_limit_and_an_end_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(tmp_path, monkeypatch)
    rank.turns(500)  # imports have none
    for part in ("setup", "save", "evaluation"):
        rank.progress.enter(part)
        rank.turns(80)
    for _ in range(5):  # an evaluation that comes further
        rank.progress.beat()
        rank.turns(80)
    rank.progress.rest()
    rank.peer_fails()
    assert not rank.turns(500)
    assert rank.account() is None


def test_a_peers_failure_ends_a_rank_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch, waits=True)
    rank.peer_fails("8.0.json")  # another job's
    rank.peer_fails("7.1.json")  # its own
    rank.progress.begin(1, first=False)
    rank.turns(15)
    assert rank.account() is None
    rank.peer_fails()
    rank.turns(2.5)
    found = rank.account()
    assert found is not None
    assert (found["bystander"], found["account"]["overdue"]) == (True, False)
    assert not rank.turns(PEER_GRACE_S - 3)  # it may end by itself, with its own words
    assert rank.turns(3.5) == [signal.SIGKILL]


def test_steps_that_are_quick_read_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch)
    looks: list[int] = []
    monkeypatch.setattr(rank.supervisor._peers, "have_failed", lambda: bool(looks.append(0)))
    for step in range(1, 9):
        rank.progress.begin(step, first=False)
        rank.turns(4.5)
    assert not looks
    # Nor do steps that usually take longer.
    for step in range(9, 20):
        rank.progress.begin(step, first=False)
        rank.turns(8)
        if step < 14:
            looks.clear()
    assert not looks
    rank.turns(5)
    assert looks


def test_many_ranks_look_seldom_and_each_at_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[float] = []
    for number in (0, 256, 511):
        looks: list[float] = []
        rank = Rank(tmp_path / str(number), monkeypatch, ranks=replace(RANKS, rank=number, world_size=512))
        rank.progress.begin(1, first=False)
        rank.progress.enter("save")  # with a longer limit
        for turn in range(140):
            look = partial(lambda looks, at: bool(looks.append(at)), looks, turn / 2)
            monkeypatch.setattr(rank.supervisor._peers, "have_failed", look)
            rank.turns(0.5)
        first.append(looks[0])
        assert {b - a for a, b in pairwise(looks)} == {16.0}
    assert first == pytest.approx([5, 13, 21], abs=0.5)


def test_reports_of_an_earlier_run_of_the_same_name_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's: address, port and count of restarts."""
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "7.0.json").write_text("{}")
    rank = Rank(tmp_path, monkeypatch, ranks=replace(RANKS, source="torchrun"))
    rank.progress.begin(1, first=False)
    rank.turns(15)
    assert rank.account() is None
    rank.peer_fails("7.0.supervisor.json")
    rank.turns(3)
    assert rank.account() is not None


def test_a_file_server_that_hangs_does_not_keep_a_rank_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = Rank(tmp_path, monkeypatch)
    for name in ("LOOK_WAIT_S", "FILES_S", "HOLD_S"):
        monkeypatch.setattr(supervisor, name, 0.01)
    hangs, looks = Event(), []

    def hang(*_: Any, **__: Any) -> bool:
        looks.append(0)
        return hangs.wait()

    monkeypatch.setattr(rank.supervisor._peers, "have_failed", hang)
    for name in ("write_report", "places_of"):
        monkeypatch.setattr(supervisor, name, lambda *_, **__: hangs.wait())
    rank.progress.begin(1, first=False)
    rank.turns(21)
    assert len(looks) == 1  # one thread waits, not one per look
    assert rank.turns(6) == [signal.SIGKILL]
    rank.supervisor.tell(signal.SIGKILL, None)
    wait_for(lambda: "(load); its report cannot be written: the file system does not answer" in capfd.readouterr().err)
    hangs.set()


@pytest.mark.parametrize(
    ("part", "silent_s", "step_s", "told"),
    [("backward", 6, 0, True), ("backward", 3, 0, False), ("backward", 3, 3, False), ("save", 30, 0, False)],
)
def test_a_silent_rank_is_told_of_before_the_job_ends(
    part: str, silent_s: int, step_s: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends a job in which a rank has failed: TERM, and soon KILL. A rank may also save now, and go on."""
    rank = Rank(tmp_path, monkeypatch, waits=True)
    for step in range(1, 8):
        rank.progress.begin(step, first=False)
        rank.turns(step_s)
    rank.progress.enter(part)
    rank.turns(silent_s)
    rank.supervisor.pass_on(signal.SIGTERM)
    rank.turns(1)
    assert rank.sent == [signal.SIGTERM]
    assert [path.name for path in rank.failures.iterdir()] == (["7.1.supervisor.told"] if told else [])
    found = worst_failure(rank.failures, "7")
    assert (found is not None) is told
    # A peer does not take that for a failure.
    assert not Peers(rank.failures, replace(RANKS, rank=0)).have_failed()
    # What the rank says itself counts.
    (rank.failures / "7.1.json").write_text(json.dumps({**PEERS, "rank": 1, "kind": "KeyError"}))
    found = worst_failure(rank.failures, "7")
    assert found is not None
    assert found["kind"] == "KeyError"


def test_a_rank_that_sigkill_does_not_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch)
    rank.progress.begin(1, first=False)
    rank.turns(26)
    assert rank.turns(29) == [signal.SIGKILL]
    assert rank.turns(29) == [signal.SIGKILL] * 2
    assert not rank.supervisor.cannot_be_ended
    assert rank.turns(5) == [signal.SIGKILL] * 2
    assert rank.supervisor.cannot_be_ended


LOST = "[rank1]:[E1130] [PG 0 Rank 1] ProcessGroupNCCL's watchdog got an error\n"


@pytest.mark.parametrize(
    ("number", "part", "before", "log", "world", "bystander", "recurs"),
    [
        (signal.SIGABRT, "reduce", "", "", 2, True, False),
        (signal.SIGABRT, "backward", "", LOST, 2, True, False),
        (signal.SIGABRT, "backward", "x" * 90_000, LOST, 2, True, False),
        (
            signal.SIGABRT,
            "backward",
            "",
            "terminate called after throwing an instance of 'c10::DistBackendError'",
            2,
            True,
            False,
        ),
        # Of an earlier attempt; its own device; another error; alone; another signal.
        (signal.SIGABRT, "backward", LOST, "double free or corruption\n", 2, False, True),
        (signal.SIGABRT, "backward", "", LOST + "CUDA error: an illegal memory access", 2, False, True),
        (signal.SIGABRT, "backward", "", "double free or corruption\n", 2, False, True),
        (signal.SIGABRT, "backward", "", LOST, 1, False, True),
        (signal.SIGSEGV, "reduce", "", LOST, 2, False, True),
    ],
)
def test_who_was_aborted_by_a_collective(
    number: int,
    part: str,
    before: str,
    log: str,
    world: int,
    bystander: bool,
    recurs: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's watchdog ends all ranks whose peer is gone. They stay until all have said so."""
    path = tmp_path / "logs" / "7_1_log.err"
    path.parent.mkdir()
    path.write_text(before)
    rank = Rank(tmp_path, monkeypatch, ranks=replace(RANKS, world_size=world))
    path.write_text(before + log)
    stayed: list[float] = []
    monkeypatch.setattr(rank.supervisor._peers, "wait_for_words", lambda patience_s, **_: stayed.append(patience_s))
    rank.progress.begin(5, first=False)
    rank.progress.enter(part)
    rank.supervisor.tell(number, None)
    found = rank.account()
    assert found is not None
    assert (found["kind"], found["step"], found["bystander"], found["recurs"]) == ("Killed", 5, bystander, recurs)
    assert bool(stayed) is bystander


def test_a_page_is_read_as_it_was_written() -> None:
    page = Page(step=-1)
    progress = Progress(page=page)
    assert (step_of(page), part_of(page)) == (None, "setup")
    progress.begin(0, first=True)
    assert (step_of(page), part_of(page)) == (0, "load")
    for part in PARTS:
        progress.enter(part)
        assert part_of(page) == part
    progress.enter("a region of a profile")
    assert part_of(page) == PARTS[-1]


@pytest.mark.parametrize(("ranks", "own", "limit_s"), [(1, None, 0), (2, None, 480), (1, 100, 100), (2, 100, 100)])
def test_a_single_rank_has_no_step_limit_of_its_own_accord(
    ranks: int, own: float | None, limit_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its collectives cannot time out: a step may take as long as it takes."""
    page = Page()
    monkeypatch.setattr(worker, "run_stage", lambda *given: given[2].begin(3, first=False))
    own_section = {"engine": {"timeout_s": 600}, "guards": {"step_limit_s": own}}
    recipe = write_recipe(tmp_path / "a.yaml", tmp_path / "run", {"left": tmp_path, "right": tmp_path}, **own_section)
    stage = stages_of(load_recipe(recipe))["pretrain"]
    worker._run_page(stage, Ranks(0, ranks, 0, ranks, "7", "slurm", "7"), page)
    assert page.limit_ms == 1000 * limit_s
