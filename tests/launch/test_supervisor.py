"""The process above a rank: it ends as the rank ends, and judges the rank's progress in a time of its own."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chain import write_recipe
from tests.processes import LIMIT_S, ROOT
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch import supervisor, worker
from vjepa_scale.launch.oom_kills import oom_kills
from vjepa_scale.launch.supervisor import PEER_GRACE_S, Supervisor
from vjepa_scale.recipe import load_recipe, stages_of
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
    assert all((row["rank"], row["step"], row["bystander"]) == (1, 3, False) for row in reports)


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


class Rank:
    """A rank by hand, and its supervisor. Its peer is rank 0."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, answers: bool = True, waits: bool = False) -> None:
        self.failures = folder / "failures"
        self.failures.mkdir()
        self.page = Page(step=-1)
        self.progress = Progress(page=self.page, step_s=20, outside_s=80)
        self.supervisor = Supervisor(2**22 + 1, self.page, ranks=RANKS, failures=self.failures, logs=folder / "logs")
        self.sent: list[int] = []

        def asked(_: float) -> None:
            if answers:
                self.page.answered, self.page.waits = self.page.asked, int(waits)

        patch.setattr(supervisor.time, "sleep", asked)
        patch.setattr(self.supervisor, "forward", lambda number, _=None: self.sent.append(number))

    def turns(self, seconds: float) -> list[int]:
        """The signals that the rank has got after so many further seconds."""
        for _ in range(int(seconds / 0.5)):
            self.supervisor.turn(0.5)
        return self.sent

    def peer_fails(self, name: str = "7.0.json") -> None:
        row = {"rank": 0, "step": 1, "kind": "E", "message": "", "user_error": False, "bystander": False, "log": None}
        (self.failures / name).write_text(json.dumps(row))

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
    monkeypatch.setattr(rank.supervisor, "_peers_reports", lambda: pytest.fail("it has looked"))
    for step in range(1, 9):
        rank.progress.begin(step, first=False)
        rank.turns(4.5)


def test_reports_of_an_earlier_run_of_the_same_name_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's: address, port and count of restarts."""
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "7.0.json").write_text("{}")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    rank = Rank(tmp_path, monkeypatch)
    rank.progress.begin(1, first=False)
    rank.turns(15)
    assert rank.account() is None


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


# -- the kernel's counter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "file", "content", "count"),
    [
        ("0::/job_7/step_0\n", "job_7/step_0/memory.events", "low 0\noom 3\noom_kill 2\n", 2),
        ("0::/../elsewhere\n", "memory.events", "oom_kill 1\n", 1),  # a container sees its own group as the mount
        ("5:cpu,memory:/slurm/job_7\n", "memory/slurm/job_7/memory.oom_control", "under_oom 0\noom_kill 4\n", 4),
        ("0::/\n", "memory.other", "oom_kill 1\n", 0),
        ("", "memory.events", "oom_kill 1\n", 0),
    ],
)
def test_the_kernels_counter_of_kills(groups: str, file: str, content: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(groups)
    path = tmp_path / "mount" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert oom_kills(tmp_path / "cgroup", tmp_path / "mount") == count
    assert oom_kills(tmp_path / "none", tmp_path / "mount") == 0


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
