"""core: errors, keyed randomness, files, ranks."""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, read_jsonl, write_atomic
from vjepa_scale.core.ranks import count_replicas, detect_ranks
from vjepa_scale.core.rng import KeyedRng, key64, mix64, permuted


def test_mix64_is_the_published_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 0, as in its reference implementation and java.util.SplittableRandom.
    state = np.array([0, 0x9E3779B97F4A7C15, (2 * 0x9E3779B97F4A7C15) % 2**64], np.uint64)
    assert [hex(word) for word in mix64(state).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permuted(np.arange(n), n, key).tolist()) == list(range(n))


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    draws = np.array([KeyedRng(7, "crop", step, slot).uniform() for step in range(50) for slot in range(40)])
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.08
    places = [int(permuted(0, 10, key64(1, "p", i))) for i in range(2000)]
    assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 1e-3
    shuffles = np.array([KeyedRng(1, "s", i).shuffled(5) for i in range(2000)])
    assert stats.chisquare(np.bincount(shuffles[:, 0], minlength=5)).pvalue > 1e-3


def test_a_draw_is_named_by_everything_in_its_key() -> None:
    keys = {key64(0, "a", 1, 2), key64(1, "a", 1, 2), key64(0, "b", 1, 2), key64(0, "a", 2, 1), key64(0, "a", 1, 2, 0)}
    assert len(keys) == 5


def test_order_of_draws_does_not_depend_on_how_many_are_taken_at_once() -> None:
    one, two = KeyedRng(3, "x", 9), KeyedRng(3, "x", 9)
    assert one.uniforms(5).tolist() == [two.uniform() for _ in range(5)]


def test_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    program = (
        "from vjepa_scale.core.errors import UserError, run_command\n"
        "def main():\n"
        "    raise UserError('bad\\nthing', where='a.yaml:key', fix='do this')\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: a.yaml:key: bad thing (do this)\n"


def test_what_cannot_be_printed_is_one_line_and_exit_code_2() -> None:
    """``/dev/full`` takes nothing: Python notices when it empties its buffer, which it does as it exits."""
    program = "from vjepa_scale.core.errors import run_command\nrun_command(lambda: print('made'))\n"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered
        )
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "body", ["print('made\\n' * 100000)", "argparse.ArgumentParser(epilog='x' * 200000).parse_args(['-h'])"]
)
def test_a_closed_standard_output_ends_a_command_without_a_line(body: str, unbuffered: str) -> None:
    """As in ``launch.py … --dry-run | head -1``: the reader is gone before the command has written all."""
    program = f"import argparse\nfrom vjepa_scale.core.errors import run_command\nrun_command(lambda: {body})\n"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert done.stderr == b""
    # argparse ignores it, from some patch release of Python 3.11 on.
    ignored = "-h" in body and "OSError" in inspect.getsource(argparse.ArgumentParser._print_message)
    assert done.returncode == (0 if ignored else 141)


def test_another_broken_pipe_is_an_error() -> None:
    program = (
        "import os\nfrom vjepa_scale.core.errors import run_command\nr, w = os.pipe()\nos.close(r)\n"
        "run_command(lambda: os.write(w, b'x'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Broken pipe" in done.stderr


def test_an_error_that_the_system_gives_no_path_for_names_the_line_of_code(tmp_path: Path) -> None:
    """The memory of another process: it opens, and reading its start is an I/O error without a path."""
    program = (
        "from pathlib import Path\n"
        "from vjepa_scale.core.errors import run_command\n"
        "from vjepa_scale.core.files import sha256_file\n"
        "run_command(lambda: sha256_file(Path('/proc/self/mem')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the system refused a read or write \(vjepa_scale/core/files\.py:\d+\): Input/output error\n",
        done.stderr,
    )


def test_numpys_words_for_a_full_disk_are_told(tmp_path: Path) -> None:
    """NumPy raises an OSError without a number where a write is cut short."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from vjepa_scale.core.errors import run_command\n"
        "from vjepa_scale.core.files import writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "def main():\n"
        "    with writing(Path('plan')):\n"
        "        np.save(sys.argv[1], np.ones(10_000))\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.npy"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: plan: 10000 requested and \d+ written\n", done.stderr)


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep" / "file", "text")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a":')  # cut short by a kill
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"a": 1}]


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "9",
}


def test_ranks_come_from_whichever_environment_there_is() -> None:
    torchrun = detect_ranks(TORCHRUN)
    assert (torchrun.rank, torchrun.world_size, torchrun.local_rank, torchrun.local_world_size) == (3, 4, 1, 2)
    slurm = detect_ranks(SLURM)
    assert (slurm.rank, slurm.world_size, slurm.local_rank, slurm.local_world_size) == (5, 8, 1, 4)
    assert detect_ranks({**SLURM, "SLURM_RESTART_COUNT": "1"}).job != slurm.job
    assert detect_ranks(LOCAL).world_size == 2
    assert detect_ranks({}).world_size == 1
    assert (slurm.job_id, torchrun.job_id, detect_ranks(LOCAL).job_id) == ("77", torchrun.job, "9")
    # Nodes need not be alike: two with three tasks, one with two.
    third = {**SLURM, "SLURM_NODEID": "2", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "3(x2),2"}
    assert detect_ranks(third).local_world_size == 2
    # A shell inside an allocation of one task is that task's; mpirun with one process is one process.
    assert detect_ranks({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}).world_size == 1


@pytest.mark.parametrize("whole", [TORCHRUN, SLURM, LOCAL])
def test_an_incomplete_environment_is_an_error_never_world_size_1(whole: dict[str, str]) -> None:
    always_there = {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_TASKS_PER_NODE", "SUBMITIT_EXECUTOR"}
    for name in whole.keys() - always_there:
        partial = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(UserError, match=name):
            detect_ranks(partial)
    with pytest.raises(UserError, match="impossible"):
        detect_ranks({**TORCHRUN, "RANK": "4"})


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},  # salloc's shell
        {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},  # a batch script without srun
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
)
def test_one_of_several_processes_never_trains_alone(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="srun or torchrun"):
        detect_ranks(environment)


@pytest.mark.parametrize(
    ("asked", "world_size", "per_node", "replicas"),
    [
        (1, 128, 8, 1),
        (16, 128, 8, 16),
        ("auto", 128, 8, 16),  # a copy per node
        ("auto", 8, 8, 1),
        ("auto", 1, 1, 1),
        ("auto", 4, 8, 1),  # part of a node
        ("all", 128, 8, 128),
        (3, 128, 8, None),
        ("auto", 12, 8, None),  # a node and a half
    ],
)
def test_how_many_copies_there_are(asked: Any, world_size: int, per_node: int, replicas: int | None) -> None:
    if replicas is None:
        with pytest.raises(UserError, match=r"engine\.replicate: .* do not divide into"):
            count_replicas(asked, world_size=world_size, per_node=per_node)
    else:
        assert count_replicas(asked, world_size=world_size, per_node=per_node) == replicas
