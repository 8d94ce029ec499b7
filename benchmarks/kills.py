"""Kills a run at random moments, and compares it with an undisturbed one, to the bit.

    python benchmarks/kills.py [--kills 20] [--seed 1] [--steps 120] [--ranks 2] [--out runs/kills] [--shards FOLDER]

Trains a tiny recipe of two stages and four phases twice on this machine: several ranks, one loader worker each,
checkpoints written in the background. The limits of a spike are so low that training rolls back now and then. The
second run gets SIGKILLs, one by one. Each hits the launcher, the launcher with all that it has started, a rank, or a
loader worker, as soon as the run has come to a random step, and a random fraction of a second later. After the launcher
has died, the same command is given again. If the ranks of a dead launcher still train, it must refuse, and
``launch.py cancel`` ends them first.

Prints what each kill hit. Then compares the consolidated weights (the bytes of model.safetensors) and all rows of
metrics.jsonl, without columns that depend on the machine, and the spikes. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import yaml

from vjepa_scale.core.errors import EXIT_USER_ERROR, run_command
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.core.worker_pool import kill_processes, process_tree
from vjepa_scale.run.columns import column_of

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "cooldown")
VICTIMS = ("launcher", "launcher and its ranks", "rank", "rank", "loader worker", "loader worker")
# The longest wait after the step at which a kill is due: a step, with its loading and a save, takes less.
DELAY_S = 0.4
# So low a limit that the noise of a tiny network is a spike now and then: kills also hit rollbacks, and what follows.
SPIKES = {
    "action": "rollback",
    "window": 8,
    "deviations": 2.0,
    "loss_factor": 1.02,
    "grad_norm_factor": 1.02,
    "in_a_row": 1000,
    "per_1000": 1000,
    "rollbacks": 1000,
}
STILL_TRAINING = "another process is training this stage"


class Launcher(Protocol):
    """A launcher at work; subprocess.Popen is one."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


# (recipe, standard output and error) -> the launcher
Start = Callable[[Path, IO[str]], Launcher]
Tool = Callable[..., None]


@dataclass(frozen=True)
class Kill:
    """One kill. step: rows of metrics of all stages, at that moment."""

    victim: str
    pid: int
    step: int


def main(argv: Sequence[str] | None = None, *, start: Start | None = None, tool: Tool | None = None) -> int:
    """start, tool: how a launcher is started, and how another tool is run; tests have faster ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120, help="of both stages together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--shards", type=Path, help="of videos; default: some are rendered")
    arguments = parser.parse_args(argv)
    start, tool = start or start_launcher, tool or run_tool
    out = arguments.out.resolve()
    shards = (arguments.shards or make_shards(out / "data", tool)).resolve()

    # Both train in the same folder, whose path is part of the consolidated file, and are renamed then.
    run = new_run(out, shards, steps=arguments.steps, ranks=arguments.ranks)
    began = time.monotonic()
    with open(out / "undisturbed.log", "w") as log:
        code = start(recipe_of(run), log).wait()
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with {code}: see {log.name}")
    print(f"undisturbed run: {arguments.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    undisturbed = consolidated(run, out / "undisturbed", tool)

    run = new_run(out, shards, steps=arguments.steps, ranks=arguments.ranks)
    print("kill | of                     | after rows", flush=True)
    with open(out / "killed.log", "w") as log:
        killer = Killer(run, log, start, tool)
        kills = killer.run(random.Random(arguments.seed), arguments.kills, arguments.steps)
    problems = left_behind(run)
    killed = consolidated(run, out / "killed", tool)
    problems += differences(undisturbed, killed)
    print(f"{len(kills)} kills, {killer.launches} launches, {killer.refused} refused because ranks still trained")
    rollbacks = sum(row["action"] == "rollback" for row in spikes_of(killed))
    print(f"{rollbacks} rollbacks, {len(spikes_of(killed)) - rollbacks} skipped steps")
    print("\n".join(problems) or "consolidated weights and all rows of metrics are equal to the bit")
    return 1 if problems or len(kills) < arguments.kills else 0


def new_run(out: Path, shards: Path, *, steps: int, ranks: int) -> Path:
    """Returns the folder of a run that is not there yet; its recipe is beside it."""
    shutil.rmtree(out / "run", ignore_errors=True)
    write_recipe(out / "run", shards, steps=steps, ranks=ranks)
    return out / "run"


def consolidated(run: Path, name: Path, tool: Tool) -> Path:
    """Renames a finished run, after its weights were written into its folder ``weights``. Returns its new path."""
    tool("consolidate", run, "--out", run / "weights")
    shutil.rmtree(name, ignore_errors=True)
    return run.rename(name)


class Killer:
    """Launches a run, kills parts of it, and launches it again until it is complete."""

    def __init__(self, run: Path, log: IO[str], start: Start, tool: Tool) -> None:
        self._run, self._log, self._start, self._tool = run, log, start, tool
        self.launches = self.refused = 0

    def run(self, dice: random.Random, count: int, steps: int) -> list[Kill]:
        """Returns the kills; fewer than ``count`` if the run was complete before."""
        due = sorted(dice.randrange(steps) for _ in range(count))
        planned = [(step, dice.choice(VICTIMS), dice.uniform(0, DELAY_S)) for step in due]
        kills: list[Kill] = []
        launcher = self._launch()
        try:
            for number, (step, victim, delay_s) in enumerate(planned, start=1):
                while rows_of(self._run) < step and launcher.poll() is None:
                    time.sleep(0.005)
                time.sleep(delay_s)
                hit = self._kill(launcher, victim, dice)
                if hit is None:
                    break
                kills.append(hit)
                print(f"{number:4} | {hit.victim:<22} | {hit.step:10}", flush=True)
                if victim.startswith("launcher"):
                    launcher.wait()
                    launcher = self._launch_again()
            if (code := launcher.wait()) != 0:
                raise SystemExit(f"the killed run ended with {code}: see {self._log.name}")
        finally:
            kill_processes(process_tree(launcher.pid))  # after an error or Ctrl-C
        return kills

    def _launch(self) -> Launcher:
        self.launches += 1
        return self._start(recipe_of(self._run), self._log)

    def _launch_again(self) -> Launcher:
        """Gives the same command again. While a dead launcher's ranks train, it is refused: cancel ends them."""
        while True:
            before, submitted = Path(self._log.name).stat().st_size, launches_of(self._run)
            launcher = self._launch()
            while launcher.poll() is None and launches_of(self._run) == submitted:
                time.sleep(0.02)
            said = Path(self._log.name).read_bytes()[before:].decode(errors="replace")
            if launcher.poll() != EXIT_USER_ERROR or STILL_TRAINING not in said:
                return launcher
            self.refused += 1
            self._tool("launch", "cancel", self._run)

    def _kill(self, launcher: Launcher, victim: str, dice: random.Random) -> Kill | None:
        """Waits until there is such a process, and kills it; returns None if the run has ended before."""
        while launcher.poll() is None:
            tree = process_tree(launcher.pid)
            ranks, workers = ranks_and_workers(tree)
            found = {"rank": ranks, "loader worker": workers}.get(victim, tree[:1])
            if found:
                process = dice.choice(sorted(found, key=lambda process: process.pid))
                step = rows_of(self._run)
                if victim == "launcher and its ranks":
                    kill_processes(tree)
                    psutil.wait_procs(tree[1:])
                else:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
                return Kill(victim, process.pid, step)
            time.sleep(0.005)
        return None


def ranks_and_workers(tree: Sequence[psutil.Process]) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Returns the ranks and the loader workers in the process tree of a local launcher.

    A rank and all that it starts write into the rank's log. Its workers are children of its fork server. A process
    that only waits for the rank counts as a rank.
    """
    parents = {process.pid: process for process in tree}
    logs = {process.pid: _log_of(process) for process in tree}
    ranks: dict[int, psutil.Process] = {}
    workers = []
    for process in tree:
        chain = []  # from the process up to the first one that writes into this log
        above: psutil.Process | None = process
        while above is not None and logs[above.pid] and logs[above.pid] == logs[process.pid]:
            chain.append(above)
            above = parents.get(_parent(above))
        if len(chain) == 1:
            ranks[process.pid] = process
        if len(chain) > 2 and not any(_parent(other) == process.pid for other in tree):
            workers.append(process)
            ranks.update((rank.pid, rank) for rank in chain[2:])
    return list(ranks.values()), workers


def _log_of(process: psutil.Process) -> str:
    try:
        name = os.readlink(f"/proc/{process.pid}/fd/1")
    except OSError:  # it has ended
        return ""
    return name if name.endswith("_log.out") else ""


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return 0


# -- the run ---------------------------------------------------------------------------------------


def recipe_of(run: Path) -> Path:
    return run.with_suffix(".yaml")


def write_recipe(run: Path, shards: Path, *, steps: int, ranks: int) -> None:
    """Writes the recipe of a run beside its folder: a tiny network, two stages, three phases of two geometries."""
    pretrain = max(6, 2 * steps // 3)
    recipe: dict[str, Any] = {
        "run": {"dir": str(run), "seed": 5},
        "launch": {"cluster": "local", "tasks_per_node": ranks, "max_restarts": 1000},
        "engine": {"device": "cpu", "precision": "float32", "timeout_s": 60},
        "data": {"seed": 3, "fps": 4, "lanes": 2, "workers": 1, "sets": {"videos": {"path": str(shards)}}},
        "model": {
            "encoder": {"width": 48, "depth": 2, "heads": 2},
            "predictor": {"width": 24, "depth": 2, "heads": 2},
            "patch": 8,
        },
        "masks": {"group": 4},
        "checkpoint": {"every": 5, "keep": 2, "background": True},
        "log": {"effective_rank_every": 4},
        "guards": {"spikes": SPIKES},
        "pretrain": {
            "steps": pretrain,
            "clip": {"frames": 4, "size": [32, 40]},
            "global_batch": 2 * ranks,
            "micro_batch": 1,
            "phases": [
                {"name": "warmup", "steps": pretrain // 3, "start_lr": 1e-4, "final_lr": 1e-3},
                {"name": "constant", "clip": {"frames": 4, "size": [40, 32]}},
            ],
        },
        "cooldown": {
            "continue_from": "pretrain",
            "steps": steps - pretrain,
            "clip": {"frames": 8, "size": [40, 48]},
            "global_batch": 2 * ranks,
            "micro_batch": 1,
            "phases": [{"name": "decay", "final_lr": 1e-6}],
        },
    }
    recipe_of(run).parent.mkdir(parents=True, exist_ok=True)
    recipe_of(run).write_text(yaml.safe_dump(recipe))


def rows_of(run: Path) -> int:
    """Returns the number of completed steps of all stages that the run has written down."""
    files = (run / stage / "metrics.jsonl" for stage in STAGES)
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def launches_of(run: Path) -> int:
    """Returns how often a stage of the run was handed to the local loop."""
    return sum(row["event"] == "submitted" for stage in STAGES for row in read_jsonl(run / stage / "history.jsonl"))


def left_behind(run: Path) -> list[str]:
    """Describes what must not be there: unfinished checkpoints, and clips that were blamed for a killed worker."""
    unfinished = [f"left: {path}" for path in run.glob("*/checkpoints/.step_*")]
    ledger = [row for row in read_jsonl(run / "ledger.jsonl") if row.get("event") == "substituted"]
    return unfinished + [f"a clip was replaced: {row}" for row in ledger]


def spikes_of(run: Path) -> list[dict[str, Any]]:
    """Returns the spikes of a run, in the order in which they were met."""
    return [row for row in read_jsonl(run / "ledger.jsonl") if row.get("event") == "spike"]


def differences(undisturbed: Path, killed: Path) -> list[str]:
    """Describes whether the weights or the spikes differ, and the first difference of each stage's metrics.

    Columns that depend on the machine are not compared.
    """
    weights = [(run / "weights" / "model.safetensors").read_bytes() for run in (undisturbed, killed)]
    found = [] if weights[0] == weights[1] else ["the consolidated weights differ"]
    found += [] if spikes_of(undisturbed) == spikes_of(killed) else ["the spikes in the ledger differ"]
    for stage in STAGES:
        expected, rows = (_comparable(run / stage / "metrics.jsonl") for run in (undisturbed, killed))
        if len(rows) != len(expected):
            found.append(f"{stage}: {len(rows)} rows of metrics instead of {len(expected)}")
        elif rows != expected:
            number = next(i for i, pair in enumerate(zip(rows, expected, strict=True)) if pair[0] != pair[1])
            found.append(f"{stage}: row {number} of metrics is {rows[number]} instead of {expected[number]}")
    return found


def _comparable(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not _of_machine(name)} for row in read_jsonl(file)]


def _of_machine(name: str) -> bool:
    column = column_of(name)
    return column is not None and column.of_machine


# -- processes -------------------------------------------------------------------------------------


def make_shards(folder: Path, tool: Tool) -> Path:
    """Renders videos and packs them into shards, once."""
    if not (folder / "shards" / "manifest.json").exists():
        tool("make_synthetic", folder / "videos", "--clips", 24, "--val-clips", 0, "--size", 48)
        tool("make_shards", folder / "videos" / "train", folder / "shards", "--shard-records", 10)
    return folder / "shards"


def start_launcher(recipe: Path, log: IO[str]) -> Launcher:
    words = [sys.executable, str(ROOT / "tools" / "launch.py"), str(recipe), "--wait"]
    return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def run_tool(name: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    run_command(main)
