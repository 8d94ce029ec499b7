"""What tools/launch.py says about a run on a real Slurm, and what it refuses: in every state that a run comes to."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from tests.chain import metrics
from tests.slurm.chain import Run, make_run
from tests.slurm.cluster import PATIENCE_S, Cluster

Sets = dict[str, Path]
# A rate that ruins the weights: the loss of step 6 is not a number, as often as it is tried.
WARMUP = {"name": "warmup", "steps": 5, "start_lr": 1e-4, "final_lr": 1e-3}
STOP = {"spikes": {"action": "stop"}}
RUINOUS = {"phases": [WARMUP, {"name": "constant", "start_lr": 1e30}]}
MENDED = "pretrain.phases.1.start_lr=1e-3"
# Never finished; it saves only when it is told to, and where a phase ends.
LONG: dict[str, Any] = {"checkpoint": {"every": 10000}, "pretrain": {"steps": 3000}}


def tool(run: Run, *words: object, code: int = 0) -> tuple[str, str]:
    """tools/launch.py; what it printed on stdout and on stderr."""
    done = run.tool(*words, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def launch(run: Run, *words: object, code: int = 0) -> tuple[str, str]:
    return tool(run, run.recipe, "--cluster", "slurm", *words, code=code)


def states(run: Run) -> list[str]:
    return [stage["state"] for stage in run.status().values()]


def wait_for_states(run: Run, wanted: list[str]) -> dict[str, Any]:
    """Stage → its status, once the stages are in these states."""
    seen: list[list[str]] = []
    last: dict[str, Any] = {}

    def arrived() -> bool:
        nonlocal last
        last = run.status()
        now = [stage["state"] for stage in last.values()]
        if not seen or seen[-1] != now:
            seen.append(now)
        return now == wanted

    run.cluster.wait_until(arrived, PATIENCE_S, lambda: f"{wanted}; it was {seen}, {last}")
    return last


def wait_for_steps(run: Run, steps: int) -> None:
    run.cluster.wait_until(lambda: run.steps() >= steps, PATIENCE_S, lambda: f"step {steps}, not {run.steps()}")


def written(run: Run) -> list[object]:
    """What a refused command must not touch."""
    histories = sorted(run.folder.glob("*/history.jsonl"))
    return [sorted((run.folder / "launches").iterdir()), [path.read_bytes() for path in histories]]


def test_a_stage_that_fails_for_good(cluster: Cluster, two_data_sets: Sets, tmp_path: Path) -> None:
    run = make_run(cluster, tmp_path, two_data_sets, launch={"tasks_per_node": 1}, pretrain=RUINOUS, guards=STOP)
    launch(run)
    first, second = run.job_id(), run.job_id("cooldown")
    watching = cluster.popen(run.command("follow", run.folder), stdout=-1, stderr=-1)
    assert cluster.wait_for(first, ("FAILED",))["Restarts"] == "1"
    cluster.wait_for(second, ("CANCELLED",))
    assert [(row["kind"], row["step"]) for row in run.events("failed")] == [("NonFiniteLossError", 6)] * 2

    said, _ = tool(run, "status", run.folder, "--json", code=1)
    told = json.loads(said)
    assert told["run"] == str(run.folder)
    pretrain, cooldown = told["stages"]
    assert (pretrain["name"], pretrain["state"], pretrain["job_id"]) == ("pretrain", "gave up", first)
    assert (pretrain["attempt"], pretrain["step"], pretrain["checkpoint_step"]) == (2, 6, 5)
    assert "twice in a row" in pretrain["detail"]
    error = pretrain["error"]
    assert (error["kind"], error["step"], error["ended"]) == ("NonFiniteLossError", 6, True)
    assert error["rank"] in (0, 1)
    assert Path(error["log"]).name == f"{first}_{error['rank']}_log.err"
    assert "NonFiniteLossError" in Path(error["log"]).read_text()
    assert "NonFiniteLossError" in json.loads(Path(error["report"]).read_text())["traceback"]
    assert (cooldown["state"], cooldown["detail"]) == ("cancelled", "because pretrain did not finish")
    text, _ = tool(run, "status", run.folder, code=1)
    for named in ("gave up", f"rank {error['rank']}: NonFiniteLossError at step 6", error["log"], error["report"]):
        assert named in text

    lines, errors = watching.communicate(timeout=PATIENCE_S)
    assert watching.returncode == 1
    assert errors.startswith(f"error: pretrain: rank {error['rank']}: NonFiniteLossError at step 6")
    assert errors.count("\n") == 1
    assert lines.count("step 5/12") == 1
    assert "cooldown: cancelled (because pretrain did not finish)" in lines

    launch(run, MENDED)
    cluster.wait_for(run.job_id("cooldown"), ("COMPLETED",))
    assert [row["step"] for row in run.events("started")] == [0, 5, 5]
    assert [row["step"] for row in metrics(run.folder, "pretrain")] == list(range(12))
    text, _ = tool(run, "status", run.folder)
    assert states(run) == ["done", "done"]
    assert "NonFiniteLossError" not in text
    said, _ = tool(run, "follow", run.folder)
    assert said.endswith("cooldown: done\n")
    said, _ = launch(run, MENDED)
    assert "every stage is already complete" in said


def test_one_rank_that_fails(cluster: Cluster, two_data_sets: Sets, tmp_path: Path) -> None:
    """A video of one of four ranks cannot be decoded: the others end soon, and it is that rank's error that is told."""
    shutil.copytree(two_data_sets["left"], tmp_path / "broken")
    shard = next((tmp_path / "broken").glob("*.tar"))
    with tarfile.open(shard) as archive:
        member = next(member for member in archive if member.name.endswith(".mp4"))
    with open(shard, "r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    sets = {**two_data_sets, "left": tmp_path / "broken"}
    run = make_run(cluster, tmp_path, sets, cooldown=None)
    launch(run)
    assert cluster.wait_for(run.job_id(), ("FAILED",))["Restarts"] == "0"  # it is for the user to mend
    error = run.status()["pretrain"]["error"]
    assert Path(member.name).stem in error["message"]
    assert Path(error["log"]).name == f"{run.job_id()}_{error['rank']}_log.err"
    assert Path(member.name).stem in Path(error["log"]).read_text()
    text, _ = tool(run, "status", run.folder, code=1)
    assert f"rank {error['rank']}: UserError" in text


def test_a_life_with_everything(cluster: Cluster, two_data_sets: Sets, tmp_path: Path) -> None:
    """Pending, running, requeued, cancelled, launched again, without a controller, forgotten, done."""
    run = make_run(cluster, tmp_path, two_data_sets, launch={"tasks_per_node": 1}, **LONG)
    others = cluster.sbatch("--nodes=3", "--exclusive", wrap="sleep 600")
    cluster.wait_for(others, ("RUNNING",))
    launch(run)
    followed = tmp_path / "followed.txt"
    with followed.open("w") as file:
        watching = cluster.popen(run.command("follow", run.folder), stdout=file, stderr=-1)
    _pending(run)
    cluster.wait_until(lambda: "is pending" in followed.read_text(), PATIENCE_S, "follow has started")
    cluster.scancel(others)
    _running(run)
    _requeued(run)
    _cancelled(run)
    _, errors = watching.communicate(timeout=PATIENCE_S)
    assert watching.returncode == 1, errors
    assert errors == ""
    _followed(run, followed.read_text())

    _on_fewer_nodes(run)
    _without_a_controller(run)
    _forgotten(run)

    enough = run.status()["pretrain"]["checkpoint_step"] + 10
    launch(run, f"pretrain.steps={enough}")
    cluster.wait_for(run.job_id("cooldown"), ("COMPLETED",))
    assert [row["step"] for row in metrics(run.folder, "pretrain")] == list(range(enough))
    assert states(run) == ["done", "done"]
    cluster.forget()
    assert states(run) == ["done", "done"]
    tool(run, "status", run.folder)
    said, _ = tool(run, "cancel", run.folder)
    assert "nothing" in said


def _pending(run: Run) -> None:
    status = wait_for_states(run, ["pending", "pending"])
    assert status["pretrain"]["job_id"] == run.job_id()
    assert status["pretrain"]["slurm"]["state"] == "PENDING"
    assert status["pretrain"]["detail"].startswith(("Resources", "Priority"))
    assert status["cooldown"]["detail"] == "waits for pretrain"
    before = written(run)
    _, error = launch(run, code=2)
    assert f"Slurm job {run.job_id()} of 'pretrain' is pending" in error
    assert written(run) == before


def _running(run: Run) -> None:
    wait_for_states(run, ["starting", "pending"])
    wait_for_states(run, ["running", "pending"])
    wait_for_steps(run, 10)
    stage = run.status()["pretrain"]
    assert stage["state"] == "running"
    assert stage["step"] >= 10
    assert stage["loss"] > 0
    assert stage["eta_s"] > 0
    assert stage["clips_per_s"] > 0
    assert stage["attempt"] == 1
    assert stage["log"].endswith(f"/{run.job_id()}_0_log.out")
    text, _ = tool(run, "status", run.folder)
    assert "/3000 " in text
    assert " on n[" in text
    before = written(run)
    _, error = launch(run, code=2)
    assert f"Slurm job {run.job_id()} of 'pretrain' is running" in error
    assert error.count("\n") == 1
    assert written(run) == before


def _requeued(run: Run) -> None:
    run.cluster.scancel("--signal=USR2", run.job_id())
    stage = wait_for_states(run, ["requeued", "pending"])["pretrain"]
    saved = run.events("interrupted")[0]["step"]
    assert stage["detail"].startswith(f"SIGUSR2, saved at step {saved}")
    assert stage["slurm"]["restarts"] == 1
    assert stage["checkpoint_step"] == saved
    assert tool(run, "status", run.folder)[0].count("SIGUSR2")
    stage = wait_for_states(run, ["running", "pending"])["pretrain"]
    assert stage["attempt"] == 2
    wait_for_steps(run, saved + 10)
    assert "attempt 2, after SIGUSR2" in tool(run, "status", run.folder)[0]


def _cancelled(run: Run) -> None:
    first, second = run.job_id(), run.job_id("cooldown")
    cancelled, _ = tool(run, "cancel", run.folder)
    assert cancelled.index(second) < cancelled.index(first)
    for job in (first, second):
        assert run.cluster.state(job) == "CANCELLED"
    for stage in ("pretrain", "cooldown"):
        assert len(run.events("cancelled", stage=stage)) == 1
    run.cluster.wait_until(lambda: not run.cluster.queue(), PATIENCE_S, "an empty queue")
    assert states(run) == ["cancelled", "cancelled"]
    assert not run.events("requeued", "gave_up")[1:]
    saved = run.events("interrupted")[-1]
    assert f"pretrain: its last checkpoint is step_{saved['step']:08d}" in cancelled
    assert (saved["signal"], saved["step"]) == ("SIGTERM", run.steps())
    text, _ = tool(run, "status", run.folder)
    assert f"saved step_{saved['step']:08d}" in text
    said, _ = tool(run, "cancel", run.folder)
    assert "nothing" in said
    assert run.cluster.job(first)["Restarts"] == "1"


def _followed(run: Run, lines: str) -> None:
    """One who watched from the beginning has seen rank 0's lines of both attempts, once each."""
    saved, last = run.events("interrupted")[0]["step"], run.steps()
    for step in range(5, last + 1, 5):
        assert lines.count(f"step {step}/3000 ") == 1, f"step {step}, saved {saved}\n{lines}"
    job = run.job_id()
    assert f"pretrain: Slurm job {job} is pending" in lines
    assert f"pretrain: Slurm job {job} is running (on n" in lines
    assert "pretrain: cancelled" in lines
    assert "cooldown: cancelled" in lines
    assert not any(line.startswith("submitit ") for line in lines.splitlines())


def _on_fewer_nodes(run: Run) -> None:
    """A node is lost for good: the batch is kept. The jobs of later stages are submitted with the new number too."""
    _, error = launch(run, "launch.nodes=3", code=2)
    assert "which 3 ranks cannot share equally" in error
    assert "(launch.nodes=2 or 4" in error
    assert run.events("cancelled")
    launch(run, "launch.nodes=1")
    wait_for_states(run, ["running", "pending"])
    wait_for_steps(run, run.steps() + 5)
    assert [(row["kind"], row["world_size"]) for row in run.events("started")[-2:]] == [("resume", 2), ("resume", 1)]
    for stage in ("pretrain", "cooldown"):  # of a job that waits Slurm says 1-1
        assert run.cluster.job(run.job_id(stage))["NumNodes"].partition("-")[0] == "1"


def _without_a_controller(run: Run) -> None:
    run.cluster.stop_controller()
    text, _ = tool(run, "status", run.folder)  # each question takes Slurm's own patience
    assert "Slurm does not answer" in text
    assert "running" in text
    assert "by its files" in text
    before = written(run)
    for words in ((run.recipe, "--cluster", "slurm"), ("cancel", run.folder)):
        _, error = tool(run, *words, code=2)
        assert error.startswith("error: ")
        assert "Slurm does not say" in error
        assert error.count("\n") == 1
    assert written(run) == before
    wait_for_steps(run, run.steps() + 5)
    run.cluster.start_controller()
    assert states(run) == ["running", "pending"]


def _forgotten(run: Run) -> None:
    run.cluster.forget()
    assert run.cluster.job(run.job_id()) == {}
    status = run.status()
    assert [stage["state"] for stage in status.values()] == ["stopped", "cancelled"]
    assert "Slurm no longer knows its job" in status["pretrain"]["detail"]
    assert status["cooldown"]["detail"] == "because pretrain did not finish"
    # Its processes may or may not have had the time to save: only an end without an error message is an error.
    saved_last = run.events("started", "interrupted")[-1]["event"] == "interrupted"
    tool(run, "status", run.folder, code=0 if saved_last else 1)


def test_accounting_remembers(cluster_with_accounting: Cluster, two_data_sets: Sets, tmp_path: Path) -> None:
    """A failed job, a finished one and one that somebody has cancelled, after the controller forgot them."""
    cluster = cluster_with_accounting
    options = {"launch": {"tasks_per_node": 1, "max_restarts": 0}, "cooldown": None}
    run = make_run(cluster, tmp_path, two_data_sets, pretrain=RUINOUS, guards=STOP, **options)
    launch(run)
    failed = run.job_id()
    cluster.wait_for(failed, ("FAILED",))
    other = make_run(cluster, tmp_path, two_data_sets, name="other", **options)
    launch(other)
    wait_for_states(other, ["running"])
    cluster.scancel(other.job_id())
    cluster.wait_for(other.job_id(), ("CANCELLED",))
    cluster.forget()

    stage = run.status()["pretrain"]
    assert (stage["state"], stage["error"]["kind"]) == ("gave up", "NonFiniteLossError")
    assert (stage["slurm"]["source"], stage["slurm"]["state"], stage["slurm"]["exit_code"]) == (
        "sacct",
        "FAILED",
        "1:0",
    )
    tool(run, "status", run.folder, code=1)
    stage = other.status()["pretrain"]
    assert (stage["slurm"]["source"], stage["slurm"]["state"]) == ("sacct", "CANCELLED")
    assert stage["state"] == "cancelled"
    assert stage["detail"].startswith("in Slurm, not by tools/launch.py")
    tool(other, "status", other.folder)

    launch(run, MENDED)
    cluster.wait_for(run.job_id(), ("COMPLETED",))
    cluster.forget()
    assert states(run) == ["done"]
    ask = (
        "import sys; from vjepa_scale.monitor.jobs import slurm_job; print(slurm_job(sys.argv[1], name='run-pretrain'))"
    )
    said = cluster.run([sys.executable, "-c", ask, run.job_id()]).stdout
    assert "state='COMPLETED'" in said
    assert "source='sacct'" in said
