"""Whatever happens to a job on a real Slurm, the run completes by itself, equal to one that nothing happened to."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain import launch as launched
from tests.chain import write_recipe
from tests.slurm.chain import NODES, Run, assert_same_training, make_run
from tests.slurm.cluster import PATIENCE_S, Cluster

# One rank a node: tests/slurm/test_chain.py has two, signals included.
TASKS = 1
STEPS, SWITCH = 60, 15
LONG: dict[str, Any] = {
    "checkpoint": {"every": 5, "keep": 2},
    "pretrain": {
        "steps": STEPS,
        "global_batch": 4,  # a micro-batch for each rank: half the time of the usual two
        "phases": [
            {"name": "warmup", "steps": SWITCH, "start_lr": 1e-4, "final_lr": 1e-3},
            {"name": "constant", "clip": {"frames": 4, "size": [40, 32]}, "mixture": {"left": 1, "right": 3}},
        ],
    },
    "cooldown": None,
}

Sets = dict[str, Path]
Check = Callable[[Run], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe on this machine, without Slurm, in as many processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sections = {**LONG, "launch": {"tasks_per_node": NODES * TASKS}}
    launched(write_recipe(folder / "recipe.yaml", folder / "run", two_data_sets, **sections))
    return folder / "run"


def disturbed(
    cluster: Cluster, folder: Path, sets: Sets, happens: Callable[[Run, str], object], *, at: int = 12, **sections: Any
) -> Run:
    """Launch, let something happen once ``at`` steps are trained, and wait until the job has completed by itself."""
    launch = {"tasks_per_node": TASKS, **sections.pop("launch", {})}
    run = make_run(cluster, folder, sets, launch=launch, **LONG, **sections)
    run.launch()
    job = run.job_id()
    cluster.wait_until(lambda: run.steps() >= at, PATIENCE_S, f"{at} steps", job_id=job)
    happens(run, job)
    cluster.wait_for(job, ("COMPLETED",))
    return run


@pytest.fixture
def check(undisturbed: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> Check:
    """Asserts that the end is equal, notes what the disturbance cost, and returns the ``started`` rows."""

    def checked(run: Run) -> list[dict[str, Any]]:
        assert_same_training(run.folder, undisturbed, "pretrain", STEPS, tmp_path)
        starts, rows = run.events("started"), run.history()
        for row in starts[1:]:
            last = [r for r in rows[: rows.index(row)] if r["event"] in ("saved", "interrupted")][-1]
            cost = (
                f"{row['repeated']} steps repeated, {row['time'] - last['time']:.1f} s from the save to the next start"
            )
            record_property("measured", cost)
        return starts

    return checked


def ranks_of(run: Run) -> list[psutil.Process]:
    """The processes that train it: all nodes are this machine."""
    every = [(process, process.info["cmdline"] or [""]) for process in psutil.process_iter(["cmdline", "ppid"])]
    found = [
        process
        for process, words in every
        if words[0] == sys.executable and "submitit.core._submit" in words and str(run.folder) in words[-1]
    ]
    supervisors = {process.pid for process in found}
    return [process for process in found if process.info["ppid"] in supervisors]


@contextlib.contextmanager
def standing_still(run: Run) -> Iterator[list[psutil.Process]]:
    """Its ranks are suspended meanwhile: however fast they are, they do not come to their end before something happens.

    Slurm may set them going earlier, with a signal, and may end them.
    """
    ranks = ranks_of(run)
    assert len(ranks) == NODES * TASKS
    try:
        for rank in ranks:
            rank.suspend()
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def is_signalled(rank: psutil.Process) -> bool:
    """Whether a suspended rank has a signal to handle, or has been set going by Slurm to handle it."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{rank.pid}/status").read_text().splitlines())
    except OSError:  # it has ended
        return True
    return status["State"].split()[0] != "T" or int(status["ShdPnd"], 16) != 0


def until_signalled(run: Run, job: str, send: Callable[[], object]) -> None:
    """Send something that makes Slurm signal the ranks, and wait until it has."""
    with standing_still(run) as ranks:
        send()
        run.cluster.wait_until(lambda: all(map(is_signalled, ranks)), PATIENCE_S, "a signal to the ranks", job_id=job)


@pytest.mark.fault(
    "signals",
    "USR2, or `scontrol requeue`",
    "the step ends, a checkpoint is saved, the job is queued again; no step is trained twice",
)
def test_usr2_and_a_bare_requeue_save_and_queue_again(
    cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path
) -> None:
    def both(run: Run, job: str) -> None:
        until_signalled(run, job, lambda: cluster.scancel("--signal=USR2", job))
        again = lambda: len(run.events("started")) > 1 and run.steps() >= 24  # noqa: E731
        cluster.wait_until(again, PATIENCE_S, "24 steps after the signal", job_id=job)
        until_signalled(run, job, lambda: cluster.scontrol("requeue", job))

    # Slurm signals loader workers, too.
    run = disturbed(cluster, tmp_path, two_data_sets, both, data={"workers": 1})
    starts = check(run)
    assert [row["repeated"] for row in starts] == [0, 0, 0]  # nothing is trained twice
    signalled = run.events("interrupted")[0]
    assert signalled["signal"] == "SIGUSR2"
    assert starts[1]["step"] == signalled["step"]
    assert cluster.job(run.job_id())["Restarts"] == "2"  # once each, not once by Slurm and once by us


@pytest.mark.fault(
    "signals",
    "TERM in the middle of a save",
    "the save is completed, the job is queued again",
)
def test_a_signal_in_the_middle_of_a_save(cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path) -> None:
    inside: list[int] = []

    def in_a_save(run: Run, job: str) -> None:
        folder = run.folder / "pretrain" / "checkpoints"
        while not inside:
            cluster.wait_until(lambda: next(folder.glob(".step_*.tmp"), None), PATIENCE_S, "a save", job_id=job)
            cluster.scancel("--signal=TERM", job)
            if any(folder.glob(".step_*.tmp")):  # it is still being written after the signal was sent
                inside.append(1)
            saved = len(run.events("saved"))
            cluster.wait_until(lambda saved=saved: len(run.events("saved")) > saved, PATIENCE_S, "the save", job_id=job)
            assert inside or not run.events("interrupted"), "the signal missed the save; the run goes on from there"

    run = disturbed(cluster, tmp_path, two_data_sets, in_a_save)
    starts = check(run)
    assert inside
    assert [row["repeated"] for row in starts] == [0, 0]
    assert not any((run.folder / "pretrain" / "checkpoints").glob(".step_*"))


@pytest.mark.fault(
    "signals",
    "the job's time limit comes near",
    "as after USR2",
)
def test_the_time_limit(cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path) -> None:
    """The limit is lowered while the job runs, so that its signal comes soon on a machine of any speed."""
    profile = tmp_path / "short.yaml"
    profile.write_text("signal_delay_s: 70\n")

    def time_is_up(run: Run, job: str) -> None:
        # Slurm looks every 30 s. At its next look the limit must not have passed (that were an end without a
        # warning), and its warning, 70 s before, must be due. Until then the ranks must not come to their end: they
        # stand still, and Slurm's signal, which it sends with SIGCONT, sets them going.
        ranks = ranks_of(run)
        assert len(ranks) == NODES * TASKS
        for rank in ranks:
            rank.suspend()
        elapsed = time.time() - run.events("submitted")[-1]["time"]
        cluster.scontrol("update", f"JobId={job}", f"TimeLimit={int(elapsed + 35) // 60 + 1}")
        cluster.wait_until(
            lambda: run.events("interrupted"), PATIENCE_S, "the signal before the time limit", job_id=job
        )
        cluster.wait_for(job, ("PENDING",))
        cluster.scontrol("update", f"JobId={job}", "TimeLimit=30")

    run = disturbed(cluster, tmp_path, two_data_sets, time_is_up, launch={"profile": str(profile)})
    starts = check(run)
    assert [row["repeated"] for row in starts] == [0, 0]
    assert [row["signal"] for row in run.events("interrupted")] == ["SIGUSR2"]


@pytest.mark.fault(
    "signals",
    "a more important job preempts this one",
    "as after USR2",
)
def test_preemption(cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path) -> None:
    def someone_more_important(run: Run, job: str) -> None:
        others: list[str] = []
        high = ("--partition=high", "--nodes=3", "--exclusive")
        until_signalled(run, job, lambda: others.append(cluster.sbatch(*high, wrap="sleep 8")))
        cluster.wait_for(*others, ("RUNNING",))
        assert cluster.state(job) == "PENDING"

    run = disturbed(cluster, tmp_path, two_data_sets, someone_more_important)
    starts = check(run)
    assert [row["repeated"] for row in starts] == [0, 0]
    assert len(run.events("interrupted")) == 1


@pytest.mark.fault(
    "processes",
    "a node of a Slurm job is lost, with its processes or without",
    "Slurm queues the job again, which resumes to the same bits",
)
@pytest.mark.parametrize(("node", "power_off"), [("first", True), ("first", False), ("last", False)])
def test_a_lost_node(
    node: str, power_off: bool, cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path
) -> None:
    """With the power off all on the node dies. Without, its slurmd dies and its processes live on (first: the batch
    script's node)."""

    def loses_a_node(run: Run, job: str) -> None:
        names = cluster.run(["scontrol", "show", "hostnames", cluster.job(job)["NodeList"]]).stdout.split()
        lost = names[0 if node == "first" else -1]
        with standing_still(run):
            cluster.kill_node(lost, power_off=power_off)
            noticed = lambda: power_off or cluster.nodes().get(lost) == "down"  # noqa: E731
            cluster.wait_until(noticed, PATIENCE_S, "Slurm notices the loss", job_id=job)
        cluster.wait_until(lambda: len(run.events("started")) > 1, PATIENCE_S, "the next start", job_id=job)

    run = disturbed(cluster, tmp_path, two_data_sets, loses_a_node)
    starts = check(run)
    assert len(starts) == 2


def test_a_killed_rank_is_named(cluster: Cluster, two_data_sets: Sets, check: Check, tmp_path: Path) -> None:
    killed: list[psutil.Process] = []

    def kill_one(run: Run, job: str) -> None:
        killed.append(next(rank for rank in ranks_of(run) if rank.environ()["SLURM_PROCID"] == "1"))
        killed[0].kill()
        cluster.wait_until(lambda: len(run.events("started")) > 1, PATIENCE_S, "the next start", job_id=job)

    run = disturbed(cluster, tmp_path, two_data_sets, kill_one)
    check(run)
    (failed,) = run.events("failed")
    assert (failed["kind"], failed["rank"], failed["bystander"]) == ("Killed", 1, False)
    assert f", pid {killed[0].pid}) ended by SIGKILL" in failed["message"]
    assert failed["message"] in run.events("requeued")[0]["reason"]


def short_run(cluster: Cluster, folder: Path, sets: Sets, finished: Path, **launch: Any) -> Run:
    """The pretraining of ``finished``, started once and completed by itself, with the same result."""
    launch = {"tasks_per_node": TASKS, **launch}
    run = make_run(cluster, folder, sets, launch=launch, cooldown=None)
    run.launch()
    cluster.wait_for(run.job_id(), ("COMPLETED",))
    assert_same_training(run.folder, finished, "pretrain", 12, folder)
    assert len(run.events("started")) == 1
    return run


@pytest.mark.fault(
    "processes",
    "the site's setup lines fail on a node",
    "the job is queued again; the failing line is in the history",
)
def test_a_setup_that_fails_once(cluster: Cluster, two_data_sets: Sets, finished: Path, tmp_path: Path) -> None:
    """A module that does not load, a scratch disk that is not mounted: on the next node it may work."""
    profile = tmp_path / "fails.yaml"
    profile.write_text("setup: ['test \"${SLURM_RESTART_COUNT:-0}\" -ge 1']\n")
    run = short_run(cluster, tmp_path, two_data_sets, finished, profile=str(profile))
    (failed,) = run.events("failed")
    said = 'status 1 in the setup of this job: test "${SLURM_RESTART_COUNT:-0}" -ge 1'
    assert (failed["kind"], failed["message"], failed["rank"]) == ("SetupFailed", said, None)
    assert said in Path(failed["log"]).read_text()


@pytest.mark.fault(
    "signals",
    "a signal before PyTorch is imported",
    "an interruption, not a failure: the job is queued again",
)
def test_a_signal_before_the_ranks_can_listen(
    cluster: Cluster, two_data_sets: Sets, finished: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "early.sh"
    prefix.write_text(
        '#!/bin/sh\n[ "$SLURM_STEP_ID" = 0 ] && [ -z "$SLURM_RESTART_COUNT" ] && kill -USR2 $$\nexec "$@"\n'
    )
    prefix.chmod(0o755)
    profile = tmp_path / "early.yaml"
    profile.write_text(f"container: {prefix}\npython: {sys.executable}\n")
    run = short_run(cluster, tmp_path, two_data_sets, finished, profile=str(profile), max_restarts=0)
    assert [(row["signal"], row["step"]) for row in run.events("interrupted")] == [("SIGUSR2", None)]
    assert not run.events("failed")
