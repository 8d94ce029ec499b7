"""make_shards on a cluster, as far as no cluster is needed: the batch scripts word for word, and what is refused.

python tests/launch/test_shard_jobs.py writes tests/launch/golden/arrays_*.txt anew; read their diff.
"""

import contextlib
import importlib.util
import io
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_sbatch import GOLDEN, ROOT
from tests.processes import LIMIT_S
from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.follow_shard_jobs import Files, last_words
from vjepa_scale.launch.profile import Profile
from vjepa_scale.launch.sbatch import submitit_parameters, without_gpus
from vjepa_scale.launch.shard_worker import Attempt
from vjepa_scale.shards import work as work_module
from vjepa_scale.shards.make import make_shards as make
from vjepa_scale.shards.probe import probe
from vjepa_scale.shards.work import Part, Settings, begin

PROFILES = ["example_h100", "sandbox"]


def make_shards(*arguments: object) -> None:
    """tools/make_shards.py in this process, which is faster than in twenty of their own."""
    spec = importlib.util.spec_from_file_location("make_shards", ROOT / "tools" / "make_shards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, ["make_shards.py", *map(str, arguments)]
    try:
        assert module.main() == 0
    finally:
        sys.argv = before


def printed(profile: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        make_shards(
            *("/videos", "/shards/of mine", "--cluster", "slurm", "--jobs", 64),
            *("--profile", profile, "--print-sbatch"),
        )
    assert not Path("/shards").exists()
    text = re.sub(r"'(PYTHON)'", r"\1", said.getvalue().replace(sys.executable, "PYTHON"))
    return re.sub(r"/code/[0-9a-f]{12}", "/code/DIGEST", text)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_scripts_are_those_that_were_looked_at(profile: str) -> None:
    assert printed(profile) == (GOLDEN / f"arrays_{profile}.txt").read_text()


def test_they_are_bash_and_ask_for_no_gpu() -> None:
    scripts = printed("example_h100").split("# -- ")[1:]
    assert [script.partition(".sbatch\n")[0] for script in scripts] == ["probe", "plan", "write", "finish"]
    for script in scripts:
        text = script.partition("\n")[2]
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "gpu" in line]


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"gres": "gpu:h100:8,nvme:1"}, {"gres": "nvme:1"}),
        ({"gres": "gpu"}, {}),
        ({"gres": "gres/gpu:2"}, {}),
        ({"gpus_per_node": 8}, {}),
        (
            {"sbatch": {"gpus": "8", "gpu-bind": "none", "mem-per-gpu": "4G", "licenses": "lustre"}},
            {"licenses": "lustre"},
        ),
        ({"sbatch": {"tres-per-task": "gres/gpu:1", "comment": "my gpus"}}, {"comment": "my gpus"}),
    ],
)
def test_no_way_to_ask_for_gpus_is_left(asked: dict, left: dict) -> None:
    given = submitit_parameters(without_gpus(Profile(**asked)), needs_gpus=False, tasks_per_node=1)
    flat = {**given, **given.pop("additional_parameters")}
    kept = {
        key: value for key, value in flat.items() if key in left or "gpu" in key or key in ("gres", "tres-per-task")
    }
    assert kept == left


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--jobs 4", "--jobs: only for a cluster (give --cluster slurm too)"),
        ("--profile sandbox", "--profile: only for a cluster"),
        ("--cpus-per-job 2", "--cpus-per-job: only for a cluster"),
        ("--cluster slurm", "--cluster slurm: how many jobs? (give --jobs, for example 64)"),
        ("--cluster slurm --jobs 0", "--jobs: 0 is too few"),
        ("--cluster slurm --jobs 4 --cpus-per-job 0", "--cpus-per-job: 0 is too few"),
        ("--cluster slurm --jobs 4 --workers 2", "--workers: counts processes on this machine"),
        ("--cluster slurm --jobs 4", "--cluster slurm: no sbatch command here"),
        ("--cluster slurm --jobs 4 --print-sbatch --profile none", "none.yaml: no such profile"),
        ("--cluster slurm --jobs 4 --print-sbatch --timeout-min 6", "--timeout-min: jobs of 6 minutes (360 s)"),
    ],
)
def test_each_mistake_is_named_and_nothing_is_written(
    flags: str, said: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, even where Slurm is installed
    with pytest.raises(UserError) as refused:
        make_shards(videos, tmp_path / "out", *flags.split())
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_slurm_cannot_write_logs_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"100%.*Slurm reads % in the path of a log"):
        make_shards(tmp_path, tmp_path / "100%", "--cluster", "slurm", "--jobs", 2, "--print-sbatch")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.mp4").write_bytes(encoded(8 + i, rate=8))
    return folder


@pytest.mark.parametrize("shares", [1, 256])
def test_progress_is_read_off_the_files(
    shares: int, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "SHARES", shares)
    work = begin(videos, tmp_path / "out", Settings(shard_records=2))
    assert work is not None
    files = Files(work)
    assert files.so_far() == [("probing", 0, 3)]

    def stop(doing: str, done: int, total: int) -> None:
        if done == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):  # as if killed
        probe(work, Part(0, 1), workers=1, progress=stop)
    assert files.so_far() == [("probing", 2, 3)]
    probe(work, Part(0, 1), workers=1, progress=quiet)
    assert files.so_far() == Files(work).so_far() == [("probing", 3, 3)]
    (tmp_path / "out" / ".slurm").mkdir()  # of jobs of an earlier command
    assert begin(videos, tmp_path / "out", Settings(shard_records=2)) is not None
    with pytest.raises(UserError, match="OUT holds another data set: settings differ: shard_records 2, now 3"):
        begin(videos, tmp_path / "out", Settings(shard_records=3))


def test_a_finish_that_was_ended_amid_its_tidying(videos: Path, tmp_path: Path) -> None:
    """And was queued again: it has nothing to do but to tidy up."""
    out = tmp_path / "out"
    work = begin(videos, out, Settings())
    assert work is not None
    make(videos, out, Settings(), workers=1, progress=quiet)
    (out / ".work.ab12.tmp" / "plan").mkdir(parents=True)
    script = tmp_path / "job.py"
    script.write_text(
        "import pickle, sys\n"
        "from vjepa_scale.shards.work import Part\n"
        "from vjepa_scale.launch.shard_worker import run_share\n"
        "if __name__ == '__main__':\n"
        "    work = pickle.load(open(sys.argv[1], 'rb'))\n"
        "    run_share(work, 'finish', Part(0, 1), workers=1, timeout_min=5)\n"
    )
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    subprocess.run([sys.executable, script, tmp_path / "work"], check=True, timeout=LIMIT_S)
    assert sorted(path.name for path in out.iterdir()) == [
        "columns",
        "manifest.json",
        "rejected.jsonl",
        "shard-000000.tar",
    ]


def test_the_last_words_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "1_0_log.err"
    assert last_words(log) == ""
    log.write_text("")
    assert last_words(log) == ""
    log.write_text("submitit INFO\nerror: /a/b: no space\n\nsrun: error: n1: task 0: Exited with exit code 2\n")
    assert last_words(log) == "/a/b: no space"
    log.write_text("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED DUE TO TIME LIMIT ***\nsrun: error: x\n")
    assert "TIME LIMIT" in last_words(log)


@pytest.mark.parametrize(("timeout_min", "done", "status"), [(0, 0, 1), (0, 1, 75), (10, 0, 75)])
def test_a_job_that_brings_nothing_is_not_queued_again(timeout_min: int, done: int, status: int) -> None:
    """Told to end: early, or after its whole time limit, with or without something done in it."""
    told = Attempt(timeout_min)
    for number in range(done):
        told.count("probing", number + 1, 9)
    child = os.fork()
    if not child:
        told.leave(signal.SIGUSR2, None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


if __name__ == "__main__":
    for name in PROFILES:
        (GOLDEN / f"arrays_{name}.txt").write_text(printed(name))
