"""kill -9 at any moment, then the same command: the run that results is the run that was never killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.chain import ROOT, checkpoint_tensors, launch, metrics, write_recipe
from tests.processes import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SWITCH = 80, 25
LONG = {
    "launch": {"tasks_per_node": 2},
    "checkpoint": {"every": 4, "keep": 2},
    "pretrain": {
        "steps": STEPS,
        "phases": [
            {"name": "warmup", "steps": SWITCH, "start_lr": 1e-4, "final_lr": 1e-3},
            {"name": "constant", "clip": {"frames": 4, "size": [40, 32]}, "mixture": {"left": 1, "right": 3}},
        ],
    },
}


class Run:
    """The launcher and all its processes, as one process group."""

    def __init__(self, recipe: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "launch.py", recipe, "--wait"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def kill_when(self, condition: Callable[[], bool], *, timeout: float = LIMIT_S) -> bool:
        """kill -9 everything as soon as the condition holds; False where the run ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.0005)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return True


def newest_step(run_dir: Path) -> int:
    path = run_dir / "pretrain" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


@pytest.mark.fault(
    "processes",
    "launcher, ranks and workers are killed together: at a change of phases, inside a save in the background, at "
    "random moments",
    "the same command resumes; metrics and all tensors of the checkpoints are those of an undisturbed run, to the bit",
)
def test_five_kills_change_nothing(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    undisturbed = write_recipe(tmp_path / "undisturbed.yaml", tmp_path / "undisturbed", two_data_sets, **LONG)
    began = time.monotonic()
    launch(undisturbed)
    duration = time.monotonic() - began  # without the start of its processes, which the first that is killed adds

    run_dir = tmp_path / "killed"
    recipe = write_recipe(tmp_path / "killed.yaml", run_dir, two_data_sets, **LONG)
    checkpoints = run_dir / "pretrain" / "checkpoints"

    def in_a_save() -> bool:
        # A checkpoint under construction, after at least one whole one.
        return any(checkpoints.glob("step_*")) and any(checkpoints.glob(".step_*.tmp/*"))

    def at_the_switch() -> bool:
        return newest_step(run_dir) >= SWITCH - 2

    dice = random.Random(20)
    kills = 0
    left_unfinished = False
    for moment in ("switch", "save", "time", "time", "time"):
        began = time.monotonic()
        run = Run(recipe)
        if moment == "time":
            # Uniform over a run: start, loader start, steps, saves. A machine that
            # has become faster since is caught by the step.
            alarm, last = time.monotonic() + dice.uniform(0.0, 1.0) * duration, 40 + 13 * (kills - 2)
            kills += run.kill_when(
                lambda alarm=alarm, last=last: time.monotonic() > alarm or newest_step(run_dir) >= last
            )
        elif moment == "save":
            kills += run.kill_when(in_a_save)
            left_unfinished = any(checkpoints.glob(".step_*.tmp"))
        else:
            kills += run.kill_when(at_the_switch)
            duration += time.monotonic() - began
            assert SWITCH - 2 <= newest_step(run_dir) <= SWITCH + 1
        print(f"killed ({moment}) at step {newest_step(run_dir)}")
    launch(recipe)

    assert kills == 5
    assert left_unfinished, "no kill fell inside a save"
    for stage, last in (("pretrain", f"step_{STEPS:08d}"), ("cooldown", f"step_{STEPS + 6:08d}")):
        assert metrics(run_dir, stage) == metrics(tmp_path / "undisturbed", stage)
        expected = checkpoint_tensors(tmp_path / "undisturbed" / stage / "checkpoints" / last, tmp_path)
        found = checkpoint_tensors(run_dir / stage / "checkpoints" / last, tmp_path)
        assert expected.keys() == found.keys()
        assert any(name.startswith("optimizer.exp_avg_sq.") for name in found)
        assert any(name.startswith("target_encoder.") for name in found)
        for name in expected:
            assert torch.equal(expected[name], found[name]), f"{stage}: {name}"
        assert not any((run_dir / stage / "checkpoints").glob(".step_*"))
