"""The end of a batch script: launch/epilogue.sh and launch/requeue.py, with a scontrol that is written by hand.

tests/slurm tries the same with a real controller (slow).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chain import ROOT, write_recipe
from tests.processes import LIMIT_S

RUNNING = "JobId=100 Requeue=1 Restarts=0 JobState=RUNNING Reason=None Dependency=(null)"
# `show` says the line of the file that is left; `requeue` fails as often as `refusals` has lines. `sleep` returns at
# once: Slurm ends the script in its longest one.
SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then
  echo "requeue $2" >> {folder}/calls
  [ -s {folder}/refusals ] || exit 0
  sed -i 1d {folder}/refusals
  exit 1
fi
[ "$*" = "--oneliner show job $(cat {folder}/job_id)" ] || exit 1
cat {folder}/shown
"""
COMMAND = """#!/bin/sh
echo "command $*" >> {folder}/calls
exit $(cat {folder}/code)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with the programs that the script calls, and what they answer."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"scontrol": SCONTROL, "command": COMMAND, "sleep": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    for name, text in {"shown": RUNNING, "refusals": "", "code": "75", "job_id": "100", "calls": ""}.items():
        (folder / name).write_text(text)
    return folder


def epilogue(slurm: Path, status: int, *command: object, **environment: str) -> int:
    """The exit status of the script after ranks that ended with ``status``."""
    words = map(str, command or (slurm / "command",))
    done = subprocess.run(
        ["bash", ROOT / "vjepa_scale/launch/epilogue.sh", str(status), *words],
        env={**os.environ, "PATH": f"{slurm}:{os.environ['PATH']}", "SLURM_JOB_ID": "100", **environment},
        cwd=ROOT,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode


def calls(slurm: Path) -> list[str]:
    return (slurm / "calls").read_text().splitlines()


CANCELLED, TIME_LIMIT, COMPLETING, NOT_AGAIN = (
    RUNNING.replace("JobState=RUNNING Reason=None", "JobState=CANCELLED Reason=None"),
    RUNNING.replace("JobState=RUNNING Reason=None", "JobState=COMPLETING Reason=TimeLimit"),
    RUNNING.replace("JobState=RUNNING", "JobState=COMPLETING"),
    RUNNING.replace("Requeue=1", "Requeue=0"),
)
AGAIN, ASKED, REFUSED = "requeue 100", "command --status 1", "command --refused"


@pytest.mark.parametrize(
    ("status", "answers", "expected", "called"),
    [
        (0, {}, 0, []),
        (75, {}, 75, [AGAIN]),  # saved: nobody is asked
        (1, {}, 75, [ASKED, AGAIN]),
        (137, {}, 75, ["command --status 137", AGAIN]),
        (1, {"code": "0"}, 0, [ASKED]),  # done after all
        (1, {"code": "1"}, 1, [ASKED]),
        (1, {"code": "2"}, 2, [ASKED]),
        (1, {"code": "128"}, 128, [ASKED]),
        (1, {"code": "143"}, 143, [ASKED] * 3),  # a signal ended it: asked again
        # Slurm itself has queued it again: it counts more restarts than this start knows of.
        (1, {"shown": RUNNING.replace("Restarts=0", "Restarts=1")}, 75, []),
        (75, {"shown": RUNNING.replace("Restarts=0", "Restarts=1")}, 75, []),
        (75, {"shown": CANCELLED}, 1, []),
        (75, {"shown": COMPLETING}, 1, []),
        (75, {"shown": TIME_LIMIT}, 75, [AGAIN]),
        (75, {"shown": NOT_AGAIN}, 1, [REFUSED]),
        # A busy controller is asked six times.
        (75, {"refusals": "no\n" * 5}, 75, [AGAIN] * 6),
        (75, {"refusals": "no\n" * 6}, 1, [*[AGAIN] * 6, REFUSED]),
    ],
)
def test_what_becomes_of_the_job(
    status: int, answers: dict[str, str], expected: int, called: list[str], slurm: Path
) -> None:
    for name, text in answers.items():
        (slurm / name).write_text(text)
    assert epilogue(slurm, status) == expected
    assert calls(slurm) == called


@pytest.mark.parametrize("known", [1, 2])
def test_a_later_start_compares_slurms_restarts_with_its_own(known: int, slurm: Path) -> None:
    (slurm / "shown").write_text(RUNNING.replace("Restarts=0", "Restarts=2"))
    assert epilogue(slurm, 75, SLURM_RESTART_COUNT=str(known)) == 75
    assert calls(slurm) == ([AGAIN] if known == 2 else [])


def test_a_task_of_an_array_queues_itself_again(slurm: Path) -> None:
    (slurm / "job_id").write_text("90_3")
    assert epilogue(slurm, 75, SLURM_ARRAY_JOB_ID="90", SLURM_ARRAY_TASK_ID="3") == 75
    assert calls(slurm) == ["requeue 90_3"]


# -- with the command that decides for stages ----------------------------------------------------------------


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps({"time": 1.0, **row}) + "\n")


def test_a_failed_stage_is_queued_again_until_the_same_failure_comes_twice(slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = {"left": tmp_path / "left", "right": tmp_path / "right"}
    recipe = write_recipe(tmp_path / "recipe.yaml", run, sets, launch={"max_restarts": 3})
    decide = (sys.executable, "-m", "vjepa_scale.launch.requeue", recipe, "pretrain")
    history = run / "pretrain/history.jsonl"

    def start(restart: int) -> str:
        job = f"100.0-{restart}"
        write_rows(history, {"event": "started", "job": job, "job_id": "100", "kind": "fresh", "step": 0})
        return job

    def fail(restart: int, **values: Any) -> int:
        job = start(restart)
        row = {"rank": 0, "step": 7, "kind": "ValueError", "message": "a clip", "user_error": False}
        report = {**row, "bystander": False, "traceback": "", "log": None, **values}
        (run / "pretrain/failures").mkdir(exist_ok=True)
        (run / f"pretrain/failures/{job}.0.json").write_text(json.dumps(report))
        (slurm / "shown").write_text(RUNNING.replace("Restarts=0", f"Restarts={restart}"))
        return epilogue(slurm, 1, *decide, SLURM_RESTART_COUNT=str(restart))

    def rows() -> list[tuple[str, str | None]]:
        told = [json.loads(line) for line in history.read_text().splitlines()]
        return [(row["event"], row.get("reason")) for row in told if row["event"] in ("requeued", "gave_up", "failed")]

    write_rows(history, {"event": "submitted", "cluster": "slurm", "job_id": "100"})
    assert fail(0) == 75
    assert rows() == [("failed", None), ("requeued", "ValueError at step 7: a clip")]
    assert calls(slurm) == [AGAIN]
    assert fail(1) == 1
    twice = "ValueError at step 7 twice in a row: it would come again"
    assert rows()[2:] == [("failed", None), ("gave_up", twice)]
    assert calls(slurm) == [AGAIN]
    assert fail(2, kind="UserError", user_error=True) == 2
    (slurm / "shown").write_text(RUNNING.replace("Requeue=1", "Requeue=0"))
    assert epilogue(slurm, 75, *decide) == 1
    assert rows()[-1] == ("gave_up", "Slurm did not queue its job again")
    write_rows(history, {"event": "done", "job": start(3), "step": 12})
    assert epilogue(slurm, 1, *decide, SLURM_RESTART_COUNT="3") == 0
    assert calls(slurm) == [AGAIN]
