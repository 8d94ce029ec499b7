"""A run that an earlier commit began goes on with today's code as if nothing had changed, to the bit.

That commit's own code, from this repository's history, makes the shards, trains one run to its end and begins another,
each in processes of its own. Its layout of the package was another (parallel/ is distributed/ today), so everything
that a run keeps on disk is read here by code that did not write it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.chain import ROOT, checkpoint_tensors, launch, metrics, tool
from tests.processes import LIMIT_S
from vjepa_scale import load_encoder

# Of the first test, which begins with both runs of the earlier commit.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

EARLIER = "4f00ce053f7e77167f53ce427c756a9b3c46827f"  # the last commit before the rooms of the package got new names
LAST = {"pretrain": 40, "cooldown": 46, "action": 8, "probe": 6}
INTERRUPTED_AFTER = 9  # neither the end of a phase nor a multiple of checkpoint.every

# Run with the earlier commit's tests/chain.py: its tools make the shards and train, by a recipe with that day's keys.
PREPARE = """
import sys
from pathlib import Path
from tests.chain import launch, make_data, make_four_stage_data, write_four_stages
folder = Path(sys.argv[1])
sets = make_data(folder)
more = make_four_stage_data(folder, sets)
sections = {"launch": {"tasks_per_node": 2}, "pretrain": {"steps": 40}}
for name in ("begun", "whole"):
    recipe = write_four_stages(folder / f"{name}.yaml", folder / name, sets, more, **sections)
launch(recipe)
"""
FEATURES = """
import sys
import torch
import vjepa_scale
clips, out = sys.argv[2:]
with torch.no_grad():
    torch.save(vjepa_scale.load_encoder(sys.argv[1])(torch.load(clips)), out)
"""


class Earlier:
    """The earlier commit's code, run in processes of its own.

    code: its checkout;  folder: of its data and runs
    """

    def __init__(self, code: Path, folder: Path) -> None:
        self.code, self.folder = code, folder

    def start(self, *words: object) -> subprocess.Popen[str]:
        """``python WORDS``, which imports vjepa_scale and tests from the checkout."""
        environment = {**os.environ, "PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.code, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words: object, accepted: int = 0) -> str:
        """What it prints; AssertionError where it ends with another exit code than ``accepted``."""
        return finished(self.start(*words), accepted)

    def tool(self, name: str, *words: object) -> str:
        return self.run(f"tools/{name}.py", *words)


def finished(process: subprocess.Popen[str], accepted: int) -> str:
    try:
        printed, errors = process.communicate(timeout=4 * LIMIT_S)  # of four stages
    finally:
        process.kill()
    assert process.returncode == accepted, f"exit code {process.returncode}\n{printed}\n{errors}"
    return printed


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Earlier]:
    """The earlier commit with its shards; the run ``whole`` of four stages, which was never interrupted; begun.yaml."""
    folder = tmp_path_factory.mktemp("an earlier commit")
    code = folder / f"checkout-{os.getpid()}"  # git's own record of it is named after the folder
    if git("cat-file", "-e", f"{EARLIER}^{{commit}}").returncode != 0:
        pytest.skip(f"needs commit {EARLIER} in this checkout's history: git fetch --unshallow")
    added = git("worktree", "add", "--detach", "--quiet", code, EARLIER)
    assert added.returncode == 0, added.stderr
    try:
        earlier = Earlier(code, folder)
        earlier.run("-c", PREPARE, folder)
        yield earlier
    finally:
        git("worktree", "remove", "--force", code)


def git(*words: object) -> subprocess.CompletedProcess[str]:
    """Of this checkout, whoever owns it, and not of one that a hook has put into the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *map(str, words)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


@pytest.fixture(scope="module")
def begun(earlier: Earlier) -> Path:
    """A run that the earlier commit was told to stop (SIGTERM) in the midst of pretrain."""
    launcher = earlier.start("tools/launch.py", earlier.folder / "begun.yaml", "--wait")
    run = earlier.folder / "begun"
    try:
        interrupt(launcher, run / "pretrain")
    finally:
        finished(launcher, 128 + signal.SIGTERM)
    return run


def interrupt(launcher: subprocess.Popen[str], stage: Path) -> None:
    """SIGTERM to the launcher after INTERRUPTED_AFTER steps. Its ranks stand still until the signal has come to them:
    however fast they are, they do not reach the stage's end before."""
    wait_until(lambda: newest_step(stage) >= INTERRUPTED_AFTER, launcher)
    submitted = next(row for row in rows(stage / "history.jsonl") if row["event"] == "submitted")
    ranks = psutil.Process(int(submitted["job_id"])).children()
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    try:
        launcher.send_signal(signal.SIGTERM)
        wait_until(lambda: all(is_pending(signal.SIGTERM, rank.pid) for rank in ranks), launcher)
    finally:
        for rank in ranks:
            rank.resume()


def wait_until(condition: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert launcher.poll() is None, "the launcher has ended"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_pending(number: signal.Signals, pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (number - 1) & 1)


def newest_step(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def code_of(run: Path, launched: str) -> Path:
    """The copy of the package that a launch's jobs imported."""
    source = json.loads((run / "launches" / launched / "source.json").read_text())
    return run / "code" / source["code_digest"] / "vjepa_scale"


def evaluation(run: Path) -> dict[str, Any]:
    """What the probe stage found, but for where the run is."""
    found: dict[str, Any] = json.loads((run / "probe" / "evaluation.json").read_text().replace(str(run), "RUN"))
    assert found["origin"]["path"] == f"RUN/cooldown/checkpoints/step_{LAST['cooldown']:08d}"
    return found


def without_ages(status: str) -> dict[str, Any]:
    """What ``status --json`` prints, but for what grows with time."""
    tree: dict[str, Any] = json.loads(status)
    for part in (tree, *tree["stages"]):
        for name in ("time", "idle_s", "checkpoint_age_s"):
            part.pop(name, None)
    return tree


def test_an_interrupted_run_goes_on_to_the_bit(earlier: Earlier, begun: Path, tmp_path: Path) -> None:
    """Through the rest of pretrain, cooldown, action and probe. ``status`` says the same before and after."""
    whole = earlier.folder / "whole"
    stopped_at = max(int(path.name.removeprefix("step_")) for path in (begun / "pretrain/checkpoints").glob("step_*"))
    assert INTERRUPTED_AFTER <= stopped_at < LAST["pretrain"]
    assert not (begun / "cooldown").exists()
    for run in (begun, whole):
        told = without_ages(tool("launch", "status", run, "--json").stdout)
        for stage in told["stages"]:
            new = ("best", "spikes", "signs", "stragglers", "late", "no_step_yet")  # what it did not know
            assert [stage.pop(name) for name in new] == [None, None, [], [], False, False]
        assert told == without_ages(earlier.tool("launch", "status", run, "--json"))
    assert [stage["state"] for stage in told["stages"]] == ["done"] * 4

    launch(earlier.folder / "begun.yaml")

    for run in (begun, whole):
        assert (code_of(run, "0001") / "parallel").is_dir()
    assert (code_of(begun, "0002") / "distributed").is_dir()
    resumed = [row for row in rows(begun / "pretrain" / "history.jsonl") if row["event"] == "started"][-1]
    assert (resumed["kind"], resumed["step"]) == ("resume", stopped_at)
    for stage, last in LAST.items():
        rows_before = metrics(whole, stage)  # there are more columns now
        known = [
            {column: row[column] for column in before}
            for row, before in zip(metrics(begun, stage), rows_before, strict=True)
        ]
        assert known == rows_before
        ours, theirs = (
            checkpoint_tensors(run / stage / "checkpoints" / f"step_{last:08d}", tmp_path) for run in (begun, whole)
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{stage}: {name}"
    assert evaluation(begun) == evaluation(whole)


def test_weights_that_it_consolidated_load(earlier: Earlier, tmp_path: Path) -> None:
    """Its folder and today's of the same checkpoint give the features that its own code computes."""
    checkpoint = earlier.folder / "whole" / "cooldown" / "checkpoints" / f"step_{LAST['cooldown']:08d}"
    earlier.tool("consolidate", checkpoint, "--out", tmp_path / "then")
    tool("consolidate", checkpoint, "--out", tmp_path / "now")
    clips = torch.randn(2, 3, 8, 40, 48, generator=torch.Generator().manual_seed(0))
    torch.save(clips, tmp_path / "clips.pt")
    earlier.run("-c", FEATURES, tmp_path / "then", tmp_path / "clips.pt", tmp_path / "features.pt")
    expected = torch.load(tmp_path / "features.pt")
    for source in (tmp_path / "then", tmp_path / "now", checkpoint):
        with torch.no_grad():
            assert torch.equal(load_encoder(source)(clips), expected), source


def test_its_shards_are_whole_and_complete(earlier: Earlier) -> None:
    """``check`` finds nothing wrong, and making them once more finds nothing to do."""
    shards = earlier.folder / "left-shards"
    manifest = (shards / "manifest.json").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert files
    for name in ("left-shards", "right-shards", "held-out-shards", "robot-shards"):
        tool("make_shards", "check", earlier.folder / name, "--decode")
    tool("make_shards", earlier.folder / "left" / "train", shards, "--shard-records", 10)
    assert (shards / "manifest.json").read_bytes() == manifest
    assert {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")} == files
