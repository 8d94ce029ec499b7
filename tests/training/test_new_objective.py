"""docs/extending.md: a kind of training is one file and one line. A copy of the package gets them, and trains it."""

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chain import ROOT, metrics, write_recipe
from tests.pages import file_on, registry_line
from tests.processes import LIMIT_S
from tests.shared import checkout_with
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import load_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PAGE = "docs/extending.md"
# For the test of a resume: rank 0 gets a signal behind the step that the environment names.
STOP = """

import os
import signal

_Toy = Toy


class Toy(_Toy):
    def loss(self, batch, observe=None):
        self._step = batch.step
        return super().loss(batch, observe)

    def after_step(self):
        if os.environ.get("STOP_AFTER") == str(self._step) and self._engine.dp_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
"""

STAGE: dict[str, Any] = {
    "kind": "toy",
    "init_from": "pretrain",
    "every": 2,
    "steps": 6,
    "mixture": {"left": 1},
    "clip": {"frames": 4, "size": [32, 40]},
    "global_batch": 4,
    "micro_batch": 2,
    "phases": [{"name": "all", "start_lr": 0.1, "final_lr": 0}],
}
BEFORE: dict[str, Any] = {
    "launch": {"tasks_per_node": 2},
    "pretrain": {"steps": 1, "phases": [{"name": "all", "start_lr": 1e-3}]},
    "cooldown": None,
}
LAUNCH = ROOT / "tools" / "launch.py"
CONSOLIDATE = ROOT / "tools" / "consolidate.py"
# Whether two recipes are the same.
SAME = "import sys; from vjepa_scale.recipe import load_recipe as load; print(load(sys.argv[1]) == load(sys.argv[2]))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with one more file and one more line."""
    folder = tmp_path_factory.mktemp("toy")
    text, line = file_on(PAGE, "toy.py") + STOP, registry_line(PAGE, "STAGES", "toy")
    return checkout_with(folder, file="objective/toy.py", text=text, registry="STAGES", line=line)


# Runs several command lines one after the other, as processes would: PyTorch is imported once.
SEVERAL = """
import contextlib, io, json, runpy, sys
answers = []
for sys.argv in json.loads(sys.argv[1]):
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def python(checkout: Path, *words: object, stop_after: int | None = None) -> str:
    """What a Python prints that imports from the checkout.

    stop_after: rank 0 gets a signal to stop behind this step of the toy
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=checkout.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "STOP_AFTER": str(stop_after),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(checkout: Path, *lines: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each command line."""
    every = json.dumps([[str(word) for word in line] for line in lines])
    return [tuple(answer) for answer in json.loads(python(checkout, "-c", SEVERAL, every))]


def video_bytes(shards: Path) -> Iterator[int]:
    """Of each record, in order, the size of its video."""
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as archive:
            yield from (member.size for member in archive if member.name.endswith(".mp4"))


def drawn(dumped: str) -> list[list[int]]:
    """The records of each step that --dump-order printed."""
    rows = [line.split("\t") for line in dumped.splitlines() if not line.startswith("#")]
    assert {row[2] for row in rows} == {"left"}
    steps = sorted({int(row[0]) for row in rows})
    return [[int(row[3]) for row in rows if int(row[0]) == step] for step in steps]


@pytest.fixture(scope="module")
def trained(two_data_sets: dict[str, Path], checkout: Path) -> tuple[Path, str]:
    """A run of a pretraining and of the toy behind it, on two processes; what the launcher printed."""
    run = checkout.parent / "run"
    recipe = write_recipe(checkout.parent / "recipe.yaml", run, two_data_sets, **BEFORE, sizes=STAGE)
    return run, python(checkout, LAUNCH, recipe, "--wait")


def test_the_plan_and_what_is_refused(two_data_sets: dict[str, Path], tmp_path: Path, checkout: Path) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run, two_data_sets, **BEFORE, sizes=STAGE)
    wrong = write_recipe(tmp_path / "wrong.yaml", run, two_data_sets, **BEFORE, sizes=STAGE | {"every": 5})
    planned, refused, unknown = commands(
        checkout,
        (LAUNCH, recipe, "--dry-run"),
        (LAUNCH, wrong, "--wait"),
        (LAUNCH, recipe, "--wait", "sizes.evry=3"),
    )
    assert planned[::2] == (0, "")
    assert "sizes: 6 steps, starts from the weights of pretrain" in planned[1]
    assert "refused" not in planned[1]
    what = "every 5 is more than the 4 clips of a step (a smaller one)"
    assert refused == (2, "", f"error: {wrong}:sizes.every: {what}\n")
    assert unknown == (2, "", "error: command line:sizes.evry: unknown key (did you mean 'every'?)\n")
    assert not run.exists()
    with pytest.raises(UserError, match="sizes: no kind of stage 'toy'; there are jepa, action, probe"):
        load_recipe(recipe)  # by the package without that line


def test_one_file_and_one_line_train(
    two_data_sets: dict[str, Path], tmp_path: Path, checkout: Path, trained: tuple[Path, str]
) -> None:
    """12 of 24 records, six steps of four clips: each record twice. Then all that reads a run reads this one."""
    run, said = trained
    recipe = run.parent / "recipe.yaml"
    of_run, of_stage = tmp_path / "of run", tmp_path / "of stage"
    (tmp_path / "same.py").write_text(SAME)
    order, status, again, changed, same, *consolidated, other = commands(
        checkout,
        (LAUNCH, recipe, "--dump-order", "0:6", "--stages", "sizes"),
        (LAUNCH, "status", run, "--json"),
        (LAUNCH, recipe, "--wait"),
        (LAUNCH, recipe, "--wait", "sizes.every=1"),
        (tmp_path / "same.py", recipe, run / "recipe.yaml"),
        (CONSOLIDATE, run, "--out", of_run),
        (CONSOLIDATE, run / "sizes", "--out", of_stage),
        (CONSOLIDATE, run / "sizes", "--to", "huggingface", "--out", tmp_path / "hf"),
    )

    # What it drew, and what it reported: arithmetic over the tars.
    steps = drawn(order[1])
    assert sorted(record for step in steps for record in step) == sorted([*range(0, 24, 2)] * 2)
    sizes = list(video_bytes(two_data_sets["left"]))
    assert len(sizes) == 24
    rows = metrics(run, "sizes")
    assert [row["kilobytes"] for row in rows] == pytest.approx(
        [sum(sizes[record] for record in step) / 4 / 1024 for step in steps]
    )
    assert rows[0]["loss"] > 1
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    total = sum(sizes[::2])
    assert f"toy: left: {total} bytes" in said.splitlines()
    evaluation = json.loads((run / "sizes" / "evaluation.json").read_text())
    assert evaluation["bytes"] == {"left": total}
    assert evaluation["step"] == 6
    assert math.isfinite(evaluation["grey"])
    pretrained = evaluation["origin"]
    assert (pretrained["init_from"], pretrained["stage"], pretrained["step"]) == ("pretrain", "pretrain", 1)
    checkpoint = json.loads((run / "sizes" / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert checkpoint["records"] == {"left": 12}

    # What others read.
    stages = json.loads(status[1])["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [("pretrain", "done"), ("sizes", "done")]
    assert "every stage is already complete" in again[1]
    assert changed[0] == 2
    assert "sizes.every: 2 then, 1 now" in changed[2]
    assert same[:2] == (0, "True\n")
    assert [answer[0] for answer in consolidated] == [0, 0]
    for out, stage, networks in ((of_run, "pretrain", ["encoder", "predictor"]), (of_stage, "sizes", ["encoder"])):
        config = json.loads((out / "config.json").read_text())
        assert (config["stage"], config["networks"]) == (stage, networks)
    assert other[0] == 2
    assert "probe" not in other[2]  # its evaluation.json is none of a probe's


def test_stopped_and_resumed(
    two_data_sets: dict[str, Path], tmp_path: Path, checkout: Path, trained: tuple[Path, str]
) -> None:
    """A signal behind the second step; the launcher starts the stage again, which ends as if nothing had been."""
    run, stopped = trained[0], tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "sizes")
    recipe = write_recipe(tmp_path / "recipe.yaml", stopped, two_data_sets, **BEFORE, sizes=STAGE)
    python(checkout, LAUNCH, recipe, "--wait", "data.workers=0", stop_after=1)
    history = [json.loads(line) for line in (stopped / "sizes" / "history.jsonl").read_text().splitlines()]
    started = [(row["kind"], row["step"]) for row in history if row["event"] == "started"]
    assert started == [("init", 0), ("resume", 3)]
    assert metrics(stopped, "sizes") == metrics(run, "sizes")
    evaluations = [json.loads((folder / "sizes" / "evaluation.json").read_text()) for folder in (stopped, run)]
    assert evaluations[0]["grey"] == evaluations[1]["grey"]
