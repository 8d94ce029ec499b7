"""What a user sees when a process of a run dies, stops or hangs: real processes, and the words that are recorded."""

import json
import os
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
