"""The sandbox itself: a real Slurm cluster, before anything of this project runs on it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import PATIENCE_S, SANDBOX, Cluster, wait_until

# One line for each signal; the shell's wait ends when a trap runs, so it waits again.
PRINT_SIGNALS = """#!/bin/bash
trap 'echo USR2 in $SLURM_PROCID on $SLURMD_NODENAME' USR2
echo begin $SLURM_PROCID ${SLURM_RESTART_COUNT:-0}
while true; do sleep 0.1; done
"""


# A time to sleep that finds this test run's processes among all of the machine's.
SLEEP = f"1000.{os.getpid()}"


def script(cluster: Cluster, name: str, text: str) -> Path:
    path = cluster.folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def processes_with(word: str) -> list[str]:
    """Command lines of all processes, zombies left out, that have the word in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if process.name != str(os.getpid()) and word.encode() in arguments + environment:
            found.append(arguments.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_nodes_are_idle(cluster: Cluster) -> None:
    assert list(cluster.nodes().values()) == ["idle"] * 3
    assert cluster.run(["sacct"], check=False).returncode == 1


def test_a_job_of_two_nodes_runs_on_two(cluster: Cluster) -> None:
    done = cluster.run(["srun", "-N2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME"])
    assert len(set(done.stdout.split())) == 2


def test_the_first_nodes_name_resolves_inside_a_job(cluster: Cluster) -> None:
    done = cluster.run(["srun", "-N1", "-w", cluster.node_names[1], "getent", "hosts", cluster.node_names[0]])
    assert done.stdout.startswith("127.")


def test_jobs_wait_for_each_other_and_end_with_a_failed_one(cluster: Cluster) -> None:
    first = cluster.sbatch(wrap="sleep 1; date +%s.%N")
    second = cluster.sbatch("-d", f"afterok:{first}", wrap="date +%s.%N; exit 3")
    third = cluster.sbatch("-d", f"afterok:{second}", "--kill-on-invalid-dep=yes", wrap="true")
    assert cluster.wait_for(second, "FAILED")["ExitCode"] == "3:0"
    cluster.wait_for(third, "CANCELLED")
    assert float(cluster.output(second).read_text()) > float(cluster.output(first).read_text())


def test_a_signal_reaches_every_task(cluster: Cluster) -> None:
    tasks = script(cluster, "print_signals.sh", PRINT_SIGNALS)
    job = cluster.sbatch("-N2", "--ntasks-per-node=2", wrap=f"srun {tasks}")
    output = cluster.output(job)
    cluster.wait_until(
        lambda: output.exists() and output.read_text().count("begin") == 4, PATIENCE_S, "4 tasks run", job
    )
    cluster.scancel("--signal=USR2", job)
    cluster.wait_until(lambda: output.read_text().count("USR2") == 4, PATIENCE_S, "USR2 in 4 tasks", job)
    assert cluster.state(job) == "RUNNING"


def test_a_preempted_job_gets_its_signal_and_comes_back(cluster: Cluster) -> None:
    tasks = script(cluster, "print_signals.sh", PRINT_SIGNALS)
    cluster.scontrol("update", "PartitionName=main", "GraceTime=3")
    try:
        low = cluster.sbatch("-N3", "--exclusive", "--signal=USR2@60", "--open-mode=append", wrap=f"srun {tasks}")
        output = cluster.output(low)
        cluster.wait_until(
            lambda: output.exists() and output.read_text().count("begin") == 3, PATIENCE_S, "3 tasks run", low
        )
        high = cluster.sbatch("-p", "high", "-N3", "--exclusive", wrap="true")
        cluster.wait_for(high, "COMPLETED")
        assert output.read_text().count("USR2") == 3
        assert cluster.wait_for(low, "RUNNING")["Restarts"] == "1"
    finally:
        cluster.scontrol("update", "PartitionName=main", "GraceTime=20")


def test_a_job_of_a_dead_node_starts_again_on_others(cluster: Cluster) -> None:
    job = cluster.sbatch("-N2", wrap="srun bash -c 'echo begin; sleep 1000'")
    output = cluster.output(job)
    # A node that dies while srun starts its tasks there lets srun, and so the job, fail.
    cluster.wait_until(
        lambda: output.exists() and output.read_text().count("begin") == 2, PATIENCE_S, "2 tasks run", job
    )
    before = cluster.wait_for(job, "RUNNING")
    cluster.kill_node(before["BatchHost"], power_off=True)
    restarted = lambda: cluster.job(job).get("Restarts") == "1" and cluster.state(job) == "RUNNING"  # noqa: E731
    cluster.wait_until(restarted, PATIENCE_S, lambda: f"job {job} runs again: {cluster.job(job)}", job)
    after = cluster.job(job)
    assert after["BatchHost"] != before["BatchHost"]
    assert cluster.nodes()[before["BatchHost"]] == "down"
    cluster.start_node(before["BatchHost"])


def test_slurm_forgets(cluster: Cluster) -> None:
    job = cluster.sbatch(wrap="true")
    cluster.wait_for(job, "COMPLETED")
    cluster.forget()
    assert cluster.job(job) == {}
    later = cluster.sbatch(wrap="true")
    assert int(later) > int(job)
    cluster.wait_for(later, "COMPLETED")


def test_two_sandboxes_side_by_side_and_no_process_is_left(cluster: Cluster) -> None:
    other = Cluster(cluster.folder / "other one")
    try:
        other.start(nodes=2, cpus=2)
        assert len(other.nodes()) == 2
        mine = cluster.sbatch(wrap="sleep 1000")
        cluster.wait_for(mine, "RUNNING")
        # tasks that ignore TERM, one of a node whose slurmd is gone, and one with an empty environment
        stubborn = f"trap '' TERM; env -i sleep {SLEEP}"
        jobs = [other.sbatch("-w", node, wrap=stubborn) for node in other.node_names]
        other.wait_until(lambda: len(processes_with(SLEEP)) >= 2, PATIENCE_S, "the tasks run")
        for job in jobs:
            other.wait_for(job, "RUNNING")
        other.kill_node(other.node_names[0])
    finally:
        other.stop()
    other.stop()
    assert processes_with(str(other.base)) == []
    assert processes_with(SLEEP) == []
    assert cluster.state(mine) == "RUNNING"


def test_a_start_that_fails_leaves_nothing_behind(cluster: Cluster) -> None:
    broken = Cluster(cluster.folder / "broken")
    with socket.socket() as taken:
        taken.bind(("", 0))  # not listening, so that only slurmctld finds out
        port = taken.getsockname()[1]
        done = broken.run([SANDBOX / "start.sh", "--base", broken.base, "--port", port], check=False)
    assert done.returncode == 1
    assert "start.sh: slurmctld has ended while starting" in done.stderr
    assert processes_with(str(broken.base)) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "0"], "--nodes 0: a whole number from 1 up is needed"),
        (["--nodes"], "--nodes needs a value"),
        (["--colour", "red"], "no option --colour"),
        (["--base", "/usr"], "--base /usr: not empty and no sandbox of ours"),
        (["--base", "/tmp/" + 60 * "a"], "a path of at most 60 bytes"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], says: str) -> None:
    done = subprocess.run([SANDBOX / "start.sh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_program_names_its_package(tmp_path: Path) -> None:
    """A PATH without Slurm: only what bash and common.sh need."""
    for name in ("bash", "dirname", "basename", "id", "env"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        # (start.sh adds /usr/sbin, where the daemons are, but not /usr/bin)
        [SANDBOX / "start.sh", "--base", tmp_path / "sandbox"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "start.sh: sinfo is missing: apt-get install -y --no-install-recommends slurm-client\n"


def test_a_plain_user_runs_a_job_that_imports_torch(plain_user_cluster: Cluster) -> None:
    python = Path(sys.prefix) / "bin" / "python"
    code = "import os, torch, vjepa_scale; print(os.getuid(), torch.__version__, vjepa_scale.__file__)"
    done = plain_user_cluster.run(
        ["srun", "-N2", "--ntasks-per-node=1", python, "-c", code], cwd=plain_user_cluster.folder
    )
    assert len(done.stdout.splitlines()) == 2
    assert all(int(line.split()[0]) != 0 for line in done.stdout.splitlines())
    assert " " in str(plain_user_cluster.base)
    daemons = [Path("/proc") / file.read_text().split()[0] for file in (plain_user_cluster.base / "run").glob("*.pid")]
    assert len(daemons) == 5
    assert all(daemon.stat().st_uid != 0 for daemon in daemons)


def test_a_plain_users_dead_node(plain_user_cluster: Cluster) -> None:
    node = plain_user_cluster.node_names[0]
    job = plain_user_cluster.sbatch("-w", node, wrap=f"sleep {SLEEP}")
    plain_user_cluster.wait_for(job, "RUNNING")
    plain_user_cluster.wait_until(lambda: processes_with(SLEEP), PATIENCE_S, "the task runs", job)
    plain_user_cluster.kill_node(node, power_off=True)
    assert processes_with(SLEEP) == []
    plain_user_cluster.scancel(job)
    plain_user_cluster.start_node(node)
    plain_user_cluster.wait_for(job, "CANCELLED")


def test_with_accounting_sacct_answers(cluster_with_accounting: Cluster) -> None:
    job = cluster_with_accounting.sbatch("-N1", wrap="exit 3")
    cluster_with_accounting.wait_for(job, "FAILED")

    def answer() -> str:
        done = cluster_with_accounting.run(["sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode", "-j", job])
        return done.stdout.strip() if "FAILED" in done.stdout else ""

    assert cluster_with_accounting.wait_until(answer, PATIENCE_S, "sacct knows the job's end") == f"{job}|FAILED|3:0"


def test_a_wait_in_vain_says_what_for(cluster: Cluster) -> None:
    job = cluster.sbatch("--hold", wrap="true")
    with pytest.raises(AssertionError, match=rf"(?s)job {job} is RUNNING; it was \['PENDING'\].*slurmctld.log.*sched"):
        cluster.wait_for(job, "RUNNING", timeout=0.5)
    with pytest.raises(AssertionError, match="waited 0 s for: the moon"):
        wait_until(lambda: False, 0, "the moon")
