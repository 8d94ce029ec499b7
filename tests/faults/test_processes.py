"""What a user sees when a process of a run dies, stops or hangs: real processes, and the words that are recorded."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import launch, metrics, write_recipe
from tests.processes import LIMIT_S

pytestmark = pytest.mark.distributed

Sets = dict[str, Path]


class Run:
    """A run of two ranks in a folder, launched in this process, to which something happens after some steps."""

    def __init__(self, folder: Path, sets: Sets, **sections: Any) -> None:
        self.folder = folder / "run"
        self.stage = self.folder / "pretrain"
        usual: dict[str, Any] = {
            "launch": {"tasks_per_node": 2, "max_restarts": 0},
            "data": {"workers": 0},
            "pretrain": {"steps": 60},
            "cooldown": None,
        }
        self.recipe = write_recipe(folder / "recipe.yaml", self.folder, sets, **{**usual, **sections})
        self.trouble: list[BaseException] = []

    def launch(self, happens: Callable[["Run"], object], *words: str, at: int = 6) -> Any:
        """Launches, and calls ``happens`` in a thread once ``at`` steps are recorded."""

        def watch() -> None:
            try:
                self.wait_until(lambda: self.steps() >= at)
                happens(self)
            except BaseException as error:  # noqa: BLE001 (raised in the test)
                self.trouble.append(error)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        done = launch(self.recipe, *words, check=False)
        thread.join(LIMIT_S)
        if self.trouble:
            raise self.trouble[0]
        return done

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def steps(self) -> int:
        path = self.stage / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def rank(self, rank: int) -> psutil.Process:
        """As a user finds it: ranks.json."""
        place = json.loads((self.stage / "ranks.json").read_text())["ranks"][rank]
        assert place["rank"] == rank
        return psutil.Process(place["pid"])

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.stage / "history.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in rows if row["event"] == name]

    def send(self, rank: int, number: signal.Signals) -> None:
        self.rank(rank).send_signal(number)


def place(run: Run, rank: int) -> str:
    found = json.loads((run.stage / "ranks.json").read_text())["ranks"][rank]
    return f"rank {rank} (node {found['node']}, pid {found['pid']})"


@pytest.mark.fault(
    "processes",
    "one rank is killed (SIGKILL), and no restart is allowed",
    "the job ends with 1: `Killed at step 12: rank 1 (node c1, pid 123) ended by SIGKILL`, in history, "
    "`status` and on the console",
)
def test_a_rank_that_is_killed_is_named(two_data_sets: Sets, tmp_path: Path) -> None:
    run = Run(tmp_path, two_data_sets)
    done = run.launch(lambda run: run.send(1, signal.SIGKILL))
    assert done.returncode == 1
    (failed,) = run.events("failed")
    assert (failed["kind"], failed["rank"], failed["recurs"]) == ("Killed", 1, False)
    assert failed["message"] == f"{place(run, 1)} ended by SIGKILL"
    assert failed["step"] in (run.steps() - 1, run.steps(), run.steps() + 1)
    assert done.stderr.startswith(f"error: pretrain: Killed at step {failed['step']}: {failed['message']}; not started")
    assert done.stderr.count("\n") == 1


@pytest.mark.fault(
    "processes",
    "a rank is stopped (SIGSTOP) for longer than `guards.step_limit_s`",
    "the job ends: `rank 1 (…) did not answer for 15 s, last seen in step 12 "
    "(forward, stopped); noticed by rank 0 at step 12`; the stacks of the ranks that waited are in `RUN/STAGE/stacks`",
)
@pytest.mark.slow
def test_a_rank_that_is_stopped_for_longer_than_the_limit_is_named(two_data_sets: Sets, tmp_path: Path) -> None:
    data = {"workers": 0, "faults": {"decode_timeout_s": 10}}
    run = Run(tmp_path, two_data_sets, data=data, guards={"step_limit_s": 15})
    done = run.launch(lambda run: run.send(1, signal.SIGSTOP))
    assert done.returncode == 1
    (failed,) = run.events("failed")
    assert (failed["kind"], failed["rank"], failed["recurs"]) == ("Hung", 1, False)
    said, _, noticed = failed["message"].partition("; noticed by ")
    assert said.startswith(f"{place(run, 1)} did not answer for 15 s, last seen in step {failed['step']} (")
    assert said.endswith(", stopped)")
    assert noticed.startswith("rank 0 at step ")
    assert failed["message"] in done.stderr
    # Of the rank that waited, the stacks.
    (stacks,) = (run.stage / "stacks").glob("hung_*")
    assert stacks.name.endswith("_rank_0.txt")
    assert stacks.read_text().startswith("rank 0 waits for its peers in step ")


@pytest.mark.slow
@pytest.mark.fault(
    "processes",
    "a rank is stopped for less than the limit",
    "nothing: it goes on",
)
def test_a_rank_that_is_stopped_for_less_goes_on(two_data_sets: Sets, tmp_path: Path) -> None:
    def stop_and_continue(run: Run) -> None:
        run.send(1, signal.SIGSTOP)
        time.sleep(7)  # peers have begun to look for reports by then
        run.send(1, signal.SIGCONT)

    run = Run(tmp_path, two_data_sets, pretrain={"steps": 12})
    done = run.launch(stop_and_continue, at=3)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(run.folder, "pretrain")] == list(range(12))
    assert not run.events("failed")
    assert not (run.stage / "failures").exists()


@pytest.mark.slow
@pytest.mark.fault(
    "processes",
    "a rank is gone with the process that supervises it, as with its node",
    "`Lost at step 12: rank 1 (…) ended without a word; noticed by rank 0 at step 12`",
)
def test_a_rank_whose_supervisor_is_killed_is_named_by_its_absence(two_data_sets: Sets, tmp_path: Path) -> None:
    run = Run(tmp_path, two_data_sets)
    done = run.launch(lambda run: psutil.Process(run.rank(1).ppid()).kill())
    assert done.returncode == 1
    (failed,) = run.events("failed")
    assert (failed["kind"], failed["rank"]) == ("Lost", 1)
    assert failed["message"].startswith(f"{place(run, 1)} ended without a word; noticed by rank 0 at step ")
    assert failed["message"] in done.stderr


# -- loader workers --------------------------------------------------------------------------------

DATA = {"workers": 1, "faults": {"decode_timeout_s": 14, "item_timeout_s": 15}}


def own_copy(sets: Sets, folder: Path) -> Sets:
    return {name: Path(shutil.copytree(shards, folder / name)) for name, shards in sets.items()}


def make_the_file_server_hang(sets: Sets) -> None:
    """Every further ``open`` of a shard waits for ever: each becomes a pipe into which nobody writes."""
    for shards in sets.values():
        for tar in shards.glob("*.tar"):
            os.mkfifo(tar.with_suffix(".pipe"))
            tar.with_suffix(".pipe").rename(tar)


def loader_workers() -> list[psutil.Process]:
    """By the file in memory for their stacks (core/stacks.py). They are children of the tests' fork server."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError, psutil.Error):
            names = [os.readlink(handle) for handle in Path(f"/proc/{process.pid}/fd").iterdir()]
            if any("vjepa_stacks of loader worker" in name for name in names):
                found.append(process)
    return found


@pytest.mark.fault(
    "data",
    "the file server of the shards hangs",
    "the attempt ends after `data.faults.item_timeout_s` and names shard, record and loader worker; restarts follow",
)
@pytest.mark.slow
def test_a_file_server_that_hangs_ends_the_attempt_and_names_worker_and_shard(
    two_data_sets: Sets, tmp_path: Path
) -> None:
    sets = own_copy(two_data_sets, tmp_path)
    run = Run(tmp_path, sets, data=DATA, pretrain={"steps": 1000})
    done = run.launch(lambda run: make_the_file_server_hang(sets))
    assert done.returncode == 2
    (failed,) = run.events("failed")
    assert (failed["kind"], failed["user_error"]) == ("PassingError", False)  # with restarts, another attempt follows
    assert re.search(
        r"(left|right)/[^/ ]*\.tar: loader worker 0 \(pid \d+, sleeping\) has come no further for 15 s; "
        r"it began record \d+ of '(left|right)' last",
        failed["message"],
    )
    assert failed["message"] in done.stderr


@pytest.mark.fault(
    "processes",
    "a loader worker is stopped between two clips",
    "the attempt ends after `data.faults.item_timeout_s` and names the worker; restarts follow",
)
@pytest.mark.slow
def test_a_loader_worker_that_is_stopped_ends_the_attempt_and_is_named(two_data_sets: Sets, tmp_path: Path) -> None:
    stopped: list[int] = []

    def stop_a_worker(run: Run) -> None:
        """Between two clips: while its rank stands still, it has nothing to do once it has loaded ahead."""
        ranks = [run.rank(rank) for rank in range(2)]
        for rank in ranks:
            rank.suspend()
        worker = loader_workers()[0]
        used: list[float] = []
        while len(used) < 5 or len(set(used[-5:])) > 1 or worker.status() != "sleeping":
            used.append(sum(worker.cpu_times()[:2]))
            time.sleep(0.2)
        worker.suspend()
        stopped.append(worker.pid)
        for rank in ranks:
            rank.resume()

    run = Run(tmp_path, two_data_sets, data=DATA, pretrain={"steps": 1000})
    run.launch(stop_a_worker)
    (failed,) = run.events("failed")
    assert failed["kind"] == "PassingError"
    assert f"loader worker 0 (pid {stopped[0]}, stopped) has come no further for 15 s" in failed["message"]


@pytest.mark.fault(
    "signals",
    "Ctrl-C while the ranks wait for data that does not come",
    "ranks end within seconds, at the last checkpoint; exit code 130",
)
@pytest.mark.slow
def test_ctrl_c_while_the_ranks_wait_for_data(two_data_sets: Sets, tmp_path: Path) -> None:
    sets = own_copy(two_data_sets, tmp_path)

    def interrupt(run: Run) -> None:
        make_the_file_server_hang(sets)
        seen = -1
        while run.steps() != seen:
            seen = run.steps()
            time.sleep(3)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's

    run = Run(tmp_path, sets, data={"workers": 1}, pretrain={"steps": 1000})
    done = run.launch(interrupt)
    assert done.returncode == 130
    (row,) = run.events("interrupted")
    saved = [row["step"] for row in run.events("saved")]
    assert (row["signal"], row["step"]) == ("SIGTERM", saved[-1])
    assert run.events("cancelled")
    assert not run.events("failed")
