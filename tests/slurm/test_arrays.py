"""make_shards on a real Slurm: the bytes of a run without it, through kills, signals and a terminal that goes away."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT, tool
from tests.shared import contents
from tests.slurm.cluster import PATIENCE_S, Cluster, wait_until
from tests.videos import encoded

JOBS = 3
SETTINGS = ("--shard-records", "2", "--seed", "7")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good ones in two classes, and three that are broken.

    Each is a chunk of its own, so task t of three has t, t + 3, …: the first has the one that takes seconds to decode,
    after another.
    """
    folder = tmp_path_factory.mktemp("videos")
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i in range(4):
            (folder / name / f"{i}.mp4").write_bytes(encoded(8 + i + 4 * (name == "right"), rate=8))
    (folder / "left" / "empty.mp4").write_bytes(b"")
    (folder / "left" / "notes.mp4").write_text("not a video")
    (folder / "right" / "cut.mp4").write_bytes(encoded(60, faststart=True)[:-1200])
    slow = encoded(1200, rate=8, codec="jpeg2000", container="matroska", size=(480, 640))
    (folder / "left" / "3 is slow.mkv").write_bytes(slow)
    return folder


@pytest.fixture(scope="module")
def local(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a run without Slurm makes, and the summary that it prints."""
    out = tmp_path_factory.mktemp("local") / "out"
    said = tool("make_shards", videos, out, *SETTINGS, "--workers", 1).stdout
    assert json.loads((out / "manifest.json").read_text())["records"] == 9
    return out, said.replace(str(out), "OUT")


def command(videos: Path, out: Path, *words: object) -> list[str]:
    flags = ("--cluster", "slurm", "--jobs", JOBS, "--profile", "sandbox", "--cpus-per-job", 1, "--timeout-min", 5)
    return [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, (videos, out, *SETTINGS, *flags, *words))]


def submitted(out: Path, step: str) -> str:
    """The id of a step's job, or of its array, that was submitted last."""
    path = out / ".slurm" / "jobs.json"
    jobs = json.loads(path.read_text()) if path.exists() else {}
    return jobs[step]["job_id"] if step in jobs else ""


def known(out: Path) -> int:
    """How many sources have a verdict: how many chunks, which hold one each."""
    return len(list((out / ".work" / "probed").glob("[0-9]*.jsonl")))


def amid(out: Path) -> bool:
    """Whether the first task has probed a source and is at the slow one."""
    return (out / ".work" / "probed" / "000000.jsonl").exists()


def started(cluster: Cluster, videos: Path, out: Path, *words: object) -> tuple["subprocess.Popen[str]", str]:
    """The command, at work, and the id of its probe array."""
    process = cluster.popen(command(videos, out, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    cluster.wait_until(lambda: submitted(out, "finish") or process.poll() is not None, PATIENCE_S, "all are submitted")
    return process, submitted(out, "probe")


def test_the_bytes_and_the_summary_of_a_local_run(
    cluster: Cluster, videos: Path, local: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "my shards" / "made_by_jobs"
    done = cluster.run(command(videos, out))
    expected, summary = local
    assert contents(out) == contents(expected)
    assert done.stdout.replace(str(out), "OUT").endswith(summary)
    for step, tasks in (("probe", JOBS), ("plan", 1), ("write", JOBS), ("finish", 1)):
        jobs = cluster.jobs(f"made_by_jobs-{step}")
        assert [job["JobState"] for job in jobs] == ["COMPLETED"] * tasks, step
        assert {job["NumCPUs"] for job in jobs} == {"1"}
    assert re.search(r"^probe: Slurm jobs \d+_\[0-2\]$", done.stdout, re.MULTILINE)
    assert f"logs in {out}/.slurm/logs" in done.stdout

    before = len(cluster.jobs())
    again = cluster.run(command(videos, out))
    assert "already there" in again.stdout
    assert len(cluster.jobs()) == before
    assert contents(out) == contents(expected)


@pytest.mark.parametrize("how", ["KILL", "cancel"])
def test_a_task_that_is_ended_and_the_same_command_again(
    how: str, cluster: Cluster, videos: Path, local: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process, probe = started(cluster, videos, out)
    cluster.wait_until(lambda: amid(out), PATIENCE_S, "the first task has probed a source")
    if how == "KILL":
        cluster.scancel("--signal=KILL", f"{probe}_0.0")  # its step: as if it had run out of memory
    else:
        cluster.scancel(f"{probe}_0")
    said, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, said + error
    assert error.count("\n") == 1, error
    words = "failed" if how == "KILL" else "was cancelled"
    assert error.startswith(f"error: probe: Slurm job {probe}_0 {words}: {out}/.slurm/logs/{probe}_0_0_log.err")
    assert "the same command goes on" in error
    cluster.wait_until(lambda: not cluster.queue(), PATIENCE_S, "those behind it are cancelled")
    assert 3 <= known(out) < 12

    cluster.run(command(videos, out))
    assert contents(out) == contents(local[0])


def test_a_terminal_that_goes_away_and_one_that_attaches(
    cluster: Cluster, videos: Path, local: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    others = cluster.sbatch("--nodes=3", "--exclusive", wrap="sleep 600")
    cluster.wait_for(others, ("RUNNING",))
    first, probe = started(cluster, videos, out)
    cluster.run(["scontrol", "hold", submitted(out, "finish")])  # however fast it is, it does not end before the signal
    cluster.scancel(others)
    second = cluster.popen(command(videos, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    cluster.wait_until(lambda: known(out) >= 1, PATIENCE_S, "it is probed")
    first.send_signal(signal.SIGINT)
    said, error = first.communicate(timeout=PATIENCE_S)
    cluster.run(["scontrol", "release", submitted(out, "finish")])
    assert first.returncode == 130
    assert "the jobs run on; the same command follows them again" in said
    assert "Traceback" not in error
    said, error = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, said + error
    assert f"jobs of {out} are in the queue already: probe {probe}, " in said
    assert len(cluster.jobs("out-probe")) >= JOBS
    assert {job["ArrayJobId"] for job in cluster.jobs("out-probe") if job["Command"].startswith(str(out))} == {probe}
    assert contents(out) == contents(local[0])


@pytest.mark.parametrize("how", ["signal", "preemption"])
def test_tasks_that_are_told_to_make_room_come_back(
    how: str, cluster: Cluster, videos: Path, local: tuple[Path, str], tmp_path: Path
) -> None:
    """One in the middle of its work; and the last of the array, which has its id, before Python can listen."""
    prefix, profile, out = tmp_path / "early.sh", tmp_path / "early.yaml", tmp_path / "out"
    early = '[ "$SLURM_ARRAY_TASK_ID" = 2 ] && [ -z "$SLURM_RESTART_COUNT" ] && kill -USR2 $$'
    prefix.write_text(f'#!/bin/sh\n{early}\nexec "$@"\n')
    prefix.chmod(0o755)
    profile.write_text(f"partition: main\nsignal_delay_s: 20\ncontainer: {prefix}\npython: {sys.executable}\n")
    process, probe = started(cluster, videos, out, "--profile", profile)
    cluster.wait_until(lambda: amid(out), PATIENCE_S, "the first task has probed a source")
    if how == "signal":  # as before a time limit
        cluster.scancel("--signal=USR2", f"{probe}_0")
    else:
        cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", wrap="sleep 3")
    said, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said + error
    restarts = [int(cluster.job(f"{probe}_{index}")["Restarts"]) for index in range(JOBS)]
    assert restarts == [1, 0, 1] or (how == "preemption" and restarts[0] == 1 and restarts[2] >= 1)
    assert contents(out) == contents(local[0])


def test_what_cannot_be_made_or_submitted_is_one_line(cluster: Cluster, videos: Path, tmp_path: Path) -> None:
    out, profile = tmp_path / "out", tmp_path / "elsewhere.yaml"
    profile.write_text("partition: elsewhere\nsignal_delay_s: 20\n")
    for words, said in (
        (["--jobs", 1002], "--jobs: Slurm refused the job of 'probe': "),
        (["--profile", profile], f"--profile {profile}: Slurm refused the job of 'probe': "),
    ):
        done = cluster.run(command(videos, out, *words), check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
        assert ("MaxArraySize here is 1001: at most --jobs 1001" in done.stderr) == ("--jobs" in words)
        assert not out.exists()

    useless = tmp_path / "useless"
    useless.mkdir()
    (useless / "notes.txt").write_text("no video")
    for _ in range(2):
        done = cluster.run(command(useless, out, "--jobs", 1), check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: plan: Slurm job ")
        assert "none of 1 files can be used" in done.stderr
        wait_until(lambda: not cluster.queue(), PATIENCE_S, "the rest is cancelled")
