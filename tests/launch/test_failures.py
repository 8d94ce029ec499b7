"""What happens to a run when a process of it dies or a clip turns out to be damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from tests.chain import ROOT, metrics, tool, write_recipe

pytestmark = pytest.mark.distributed


def rank_process(launcher: psutil.Process, rank: int) -> psutil.Process | None:
    for process in launcher.children(recursive=True):
        try:
            if process.environ().get("SUBMITIT_LOCAL_GLOBALID") == str(rank) and "submitit" in " ".join(
                process.cmdline()
            ):
                return process
        except psutil.Error:  # it ended while we looked
            continue
    return None


def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(
    two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run,
        two_data_sets,
        launch={"tasks_per_node": 2},
        pretrain={"steps": 60},
        cooldown=None,
    )
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), str(recipe), "--wait"]
    launcher = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = run / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 6):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim = rank_process(psutil.Process(launcher.pid), 1)
    assert victim is not None
    family = psutil.Process(launcher.pid).children(recursive=True)
    victim.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    _, stderr = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert stderr.startswith("error: pretrain: rank 0 failed with ")
    assert str(run / "pretrain" / "failures") in stderr
    assert stderr.count("\n") == 1
    print(f"the launcher said so {time.monotonic() - killed_at:.1f} s after the kill")
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"still running: {alive}"

    tool("launch", recipe, "--wait")
    assert [row["step"] for row in metrics(run, "pretrain")] == list(range(60))


def test_a_clip_that_does_not_decode_stops_the_run_and_is_named(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(two_data_sets["left"], shards)
    for tar in shards.glob("*.tar"):  # same sizes, other bytes: only decoding can tell
        content = bytearray(tar.read_bytes())
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".mp4"):
                    content[member.offset_data : member.offset_data + member.size] = b"\x55" * member.size
        tar.write_bytes(content)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "run", {**two_data_sets, "left": shards}, launch={"tasks_per_node": 2}
    )
    done = tool("launch", recipe, "--wait", check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "data set 'left', record 0000" in done.stderr
    assert ".tar" in done.stderr
    reports = [json.loads(path.read_text()) for path in (tmp_path / "run" / "pretrain" / "failures").glob("*.json")]
    assert any(report["user_error"] for report in reports)


def test_two_launches_cannot_train_the_same_run(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        launch={"tasks_per_node": 2},
        pretrain={"steps": 400},
        cooldown=None,
    )
    started = tool("launch", recipe)  # in the background
    assert "tail -f" in started.stdout
    pid = int(started.stdout.split("started as process ")[1].split(";")[0])
    first = psutil.Process(pid)
    try:
        log = tmp_path / "run" / "pretrain" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = tool("launch", recipe, "--wait", check=False)
        assert done.returncode == 2
        assert "another process is training this stage" in done.stderr
        assert not (tmp_path / "run" / "pretrain" / "failures").exists()  # refused before it touched anything
        rows = log.read_bytes().count(b"\n")
        while log.read_bytes().count(b"\n") < rows + 10:  # the first run goes on
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert first.is_running()
    finally:
        os.killpg(pid, signal.SIGKILL)  # a background launch is a session of its own
