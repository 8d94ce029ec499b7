"""A stage under a TMPDIR that is too long for Unix sockets, and where there is no place for them at all."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.chain import ROOT, metrics, write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch import worker
from vjepa_scale.launch.worker import run_stage
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.signals import Interrupt

STAGE = {
    "steps": 2,
    "clip": {"frames": 4, "size": [32, 40]},
    "global_batch": 8,
    "micro_batch": 4,
    "phases": [{"name": "all", "start_lr": 1e-4}],
}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_under_a_temporary_folder_of_100_bytes(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, pretrain=STAGE, cooldown=None)
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        long = Path(parent) / ("x" * (99 - len(parent)))
        long.mkdir()
        assert len(str(long)) == 100
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "launch.py", recipe, "--wait"],
            env={**os.environ, "TMPDIR": str(long), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(tmp_path / "run", "pretrain")) == 2


def test_no_place_for_sockets_is_reported_as_any_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_data_sets: dict[str, Path]
) -> None:
    """The fork server starts before anything else: its failure was "the processes ended without a word"."""

    def no_folder(_: Interrupt, *, loader_workers: int) -> None:
        raise UserError("no folder for the sockets of worker processes", where="TMPDIR /long")

    monkeypatch.setattr(Interrupt, "listen", no_folder)
    monkeypatch.setattr(worker, "atexit", type("", (), {"register": lambda *_: None}))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path / "run", two_data_sets))
    with pytest.raises(UserError, match="no folder for the sockets"):
        run_stage(stages_of(recipe)["pretrain"])
    (report,) = (tmp_path / "run/pretrain/failures").glob("*.json")
    assert "TMPDIR /long: no folder for the sockets" in json.dumps(json.loads(report.read_text()))
