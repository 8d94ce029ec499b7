"""The batch scripts of every shipped profile, word for word: what changes in them is looked at before it is committed.

python -m tests.launch.test_sbatch writes tests/launch/golden/*.sbatch anew; read their diff.
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.chain import ROOT, tool
from tests.processes import LIMIT_S
from vjepa_scale.launch.profile import Profile
from vjepa_scale.launch.sbatch import job_executor

GOLDEN = Path(__file__).parent / "golden"
PROFILES = sorted(path.stem for path in (ROOT / "slurm" / "profiles").glob("*.yaml"))


@cache
def printed(profile: str) -> str:
    """What a dry run of the flagship prints, without this machine's paths and this version's digest."""
    words = ("recipes/vitg_384.yaml", f"launch.profile={profile}", "--cluster", "slurm", "--dry-run", "--print-sbatch")
    done = tool("launch", *words, check=False)  # this machine lacks the flagship's data
    assert done.returncode == 2
    assert "no such data folder" in done.stderr
    text = done.stdout.replace(sys.executable, "PYTHON").replace(str(ROOT), "CHECKOUT")
    text = re.sub(r"'((?:PYTHON|CHECKOUT)[^' ]*)'", r"\1", text)  # quoted where the checkout's own path needs it
    return re.sub(r"/code/[0-9a-f]{12}", "/code/DIGEST", text)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_script_is_the_one_that_was_looked_at(profile: str) -> None:
    assert printed(profile) == (GOLDEN / f"{profile}.sbatch").read_text()


@pytest.mark.parametrize("profile", PROFILES)
def test_it_is_bash(profile: str) -> None:
    for script in printed(profile).split("# -- ")[1:]:
        done = subprocess.run(
            ["bash", "-n"], input=script.partition("\n")[2], text=True, capture_output=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stderr


def test_the_level_of_logs_goes_to_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> str:
        return job_executor(
            Profile(),
            logs=tmp_path,
            code=tmp_path,
            finish=[],
            name="mine",
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=1,
            timeout_min=60,
            needs_gpus=False,
            after=None,
        ).script()

    assert "VJEPA_LOG" not in script()
    monkeypatch.setenv("VJEPA_LOG", "debug")
    before, _, _ = script().partition("\nsrun ")
    assert "\nexport VJEPA_LOG=debug\n" in before


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in PROFILES:
        (GOLDEN / f"{name}.sbatch").write_text(printed(name))
