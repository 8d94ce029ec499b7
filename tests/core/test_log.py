"""What processes say: levels, stamps, which process; that ranks, their workers and Slurm's jobs get the level."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.processes import LIMIT_S, ROOT
from vjepa_scale.core import log
from vjepa_scale.core.errors import exit_code

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"


def say_all(name: str) -> None:
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), level)("%s of %s", level, name)


@pytest.mark.parametrize(
    ("word", "ours", "others"),
    [
        (None, ["info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("debug", ["debug", "info", "warning", "error"], ["debug", "info", "warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
def test_which_levels_a_rank_shows_and_where(
    word: str | None,
    ours: list[str],
    others: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if word is not None:
        monkeypatch.setenv("VJEPA_LOG", word)
    log.set_up("pretrain rank 3")
    say_all("vjepa_scale.training.trainer")
    say_all("webdataset.cache")
    said = capsys.readouterr()
    for stream, levels in ((said.out, ("debug", "info")), (said.err, ("warning", "error"))):
        expected = [
            f"{level} [pretrain rank 3] {level} of vjepa_scale.training.trainer" for level in levels if level in ours
        ]
        expected += [
            f"{level} [pretrain rank 3, webdataset.cache] {level} of webdataset.cache"
            for level in levels
            if level in others
        ]
        assert re.findall(f"^{STAMP} (.*)$", stream, re.MULTILINE) == expected
        assert len(stream.splitlines()) == len(expected)


def test_a_command_writes_plain_lines_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: say_all("vjepa_scale.checkpoint.load")) == 0
    said = capsys.readouterr()
    name = "vjepa_scale.checkpoint.load"
    assert said.out == ""
    assert said.err == f"info of {name}\nwarning: warning of {name}\nerror: error of {name}\n"


def test_another_value_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VJEPA_LOG", "verbose")
    assert exit_code(lambda: None) == 2
    error = capsys.readouterr().err
    assert error == "error: VJEPA_LOG: 'verbose' is no level (one of debug, info, warning, error)\n"


def test_every_line_of_a_record_has_the_stamp(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("write job 2")
    logging.getLogger("vjepa_scale.shards").info("a table\nof two rows")
    try:
        raise ZeroDivisionError("here")
    except ZeroDivisionError:
        logging.getLogger("vjepa_scale.shards").exception("it failed")
    said = capsys.readouterr()
    assert [line.partition("] ")[2] for line in said.out.splitlines()] == ["a table", "of two rows"]
    assert re.fullmatch(f"({STAMP} error \\[write job 2\\] .*\n)+", said.err)
    assert said.err.endswith("ZeroDivisionError: here\n")


@pytest.mark.parametrize(("main", "word", "count"), [(True, "info", 1), (False, "info", 0), (False, "debug", 1)])
def test_pythons_warnings_are_of_one_process(
    main: bool, word: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VJEPA_LOG", word)
    log.set_up("pretrain rank 1", main=main)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this is old", FutureWarning, stacklevel=1)
    said = capsys.readouterr().err
    assert said.count("FutureWarning: this is old") == count
    assert said.count("[pretrain rank 1, py.warnings]") >= count


def test_handlers_of_other_packages_give_way(capsys: pytest.CaptureFixture[str]) -> None:
    """submitit and DeepSpeed write to the terminal by handlers of their own, at info."""
    theirs = logging.getLogger("a_library")
    theirs.addHandler(logging.StreamHandler(sys.stdout))
    theirs.setLevel(logging.INFO)
    theirs.propagate = False
    log.set_up("cooldown rank 0")
    theirs.info("chatter")
    theirs.warning("trouble")
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(f"{STAMP} warning \\[cooldown rank 0, a_library\\] trouble\n", said.err)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "2026-11-29 17:00:00.123 info [pretrain rank 0] pretrain/main  step 3/40  loss 0.1",
            "pretrain/main  step 3/40  loss 0.1",
        ),
        ("2026-11-29 17:00:00.123 warning [pretrain rank 0] slow", "warning: slow"),
        ("2026-11-29 17:00:00.123 error [pretrain rank 0] bad", "error: bad"),
        ("2026-11-29 17:00:00.123 info [pretrain rank 0] ", ""),
        ("2026-11-29 17:00:00.123 debug [pretrain rank 0] joined", None),
        ("2026-11-29 17:00:00.123 warning [pretrain rank 0, py.warnings] old", None),
        ("pretrain/main  step 3/40  loss 0.1", "pretrain/main  step 3/40  loss 0.1"),  # of an earlier version
        ("warning: slow", "warning: slow"),
    ],
)
def test_what_followers_show_of_a_line(line: str, shown: str | None) -> None:
    assert log.shown(line) == shown


MODULE = """
import logging
from pathlib import Path

from vjepa_scale.core import log
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.core.worker_pool import map_in_workers
from vjepa_scale.data.loader import Prefetched
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.schema import EngineConfig


def load(number):
    logging.getLogger("vjepa_scale.data").debug("loads %d", number)
    return number


def main():
    ranks = detect_ranks()
    log.set_up(f"pretrain rank {ranks.rank}", main=ranks.is_main)
    process_group.start(ranks, EngineConfig(device="cpu", threads=1, timeout_s=200), rendezvous=Path.cwd())
    assert list(Prefetched(load, [5], workers=1, prefetch=1)) == [5]
    assert list(map_in_workers(load, [6], workers=1)) == [(0, 6)]
    process_group.stop()
"""


@pytest.mark.slow
def test_two_ranks_and_their_workers(tmp_path: Path) -> None:
    """The level of the environment reaches them, and each says which one it is."""
    (tmp_path / "spoken.py").write_text(MODULE)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", "import spoken; spoken.main()"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
                "VJEPA_LOG": "debug",
                "OMP_NUM_THREADS": "1",
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_JOB_ID": "7",
                "SUBMITIT_LOCAL_NTASKS": "2",
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, out + err
        lines = [line for line in out.splitlines() if f"[pretrain rank {rank}" in line and "," not in line[:60]]
        (joined,) = (line for line in lines if "joined" in line)
        assert re.match(f"{STAMP} debug \\[pretrain rank {rank}\\] joined .*gloo", joined)
        for number in (5, 6):
            assert re.search(f"^{STAMP} debug \\[pretrain rank {rank} worker 0\\] loads {number}$", out, re.MULTILINE)


PROGRAM = """
import logging, sys
{before}
import vjepa_scale.core.errors
{after}
for level in ("info", "warning"):
    getattr(logging.getLogger("vjepa_scale.checkpoint.load"), level)("%s of ours", level)
"""
CONFIG = "logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(name)s: %(message)s')"


@pytest.mark.parametrize(
    ("before", "after", "word", "out", "err"),
    [
        ("", "", "", [], ["info of ours", "warning: warning of ours"]),
        ("", "", "warning", [], ["warning: warning of ours"]),
        (CONFIG, "", "", ["info", "warning"], []),
        ("", CONFIG, "", ["info", "warning"], []),
        ("", "logging.getLogger('vjepa_scale').setLevel('WARNING')", "", [], ["warning: warning of ours"]),
        ("logging.getLogger('vjepa_scale').setLevel('WARNING')", CONFIG, "", ["warning"], []),
        ("", "logging.getLogger('vjepa_scale').addHandler(logging.NullHandler())", "", [], []),
    ],
)
def test_a_program_that_imports_the_package_has_its_own_logging(
    before: str, after: str, word: str, out: list[str], err: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before, after=after)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "VJEPA_LOG": word},
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert done.stdout.splitlines() == [f"vjepa_scale.checkpoint.load: {level} of ours" for level in out]
    assert done.stderr.splitlines() == err
