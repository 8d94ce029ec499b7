"""A process is ended with everything below it, at once or after it was asked to."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from vjepa_scale.core.worker_pool import end_processes, kill_processes, process_tree

LIMIT_S = 60.0
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
PARENT = """
import subprocess, sys, time
{before}
child = subprocess.Popen([sys.executable, "-c", "{deaf} print('up', flush=True); import time; time.sleep(600)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _start(started: list[subprocess.Popen[str]], *, deaf: str = "", before: str = "") -> tuple[psutil.Process, int]:
    """A parent and the number of its child, both up."""
    program = PARENT.format(deaf=deaf, before=before)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    return psutil.Process(process.pid), int(process.stdout.readline())


def test_everything_below_is_killed_and_statuses_are_left_to_the_parent(
    started: list[subprocess.Popen[str]],
) -> None:
    parent, child = _start(started, deaf=DEAF, before=DEAF)
    tree = process_tree(parent.pid)
    assert [process.pid for process in tree] == [parent.pid, child]
    kill_processes(tree)
    assert started[0].wait(LIMIT_S) == -signal.SIGKILL  # nobody else has taken its exit status
    assert not psutil.wait_procs(tree[1:], timeout=LIMIT_S)[1]
    kill_processes(tree)  # they have ended: nothing to do
    assert process_tree(parent) == process_tree(parent.pid) == []


def test_one_that_ends_when_it_is_asked_is_not_killed(started: list[subprocess.Popen[str]]) -> None:
    ends_child = "import signal; signal.signal(signal.SIGTERM, lambda *_: (child.kill(), child.wait(), sys.exit(0)))"
    parent, child = _start(started, before=ends_child)
    assert end_processes(process_tree(parent), patience_s=LIMIT_S)
    assert not psutil.pid_exists(child)


def test_one_that_does_not_end_is_killed(started: list[subprocess.Popen[str]]) -> None:
    parent, _ = _start(started, deaf=DEAF)  # the parent ends; what it leaves does not
    tree = process_tree(parent)
    assert not end_processes(tree, patience_s=0.0)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)
