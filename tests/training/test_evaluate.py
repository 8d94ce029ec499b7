"""Checkpoints that are evaluated while a stage trains, afterwards, and by scikit-learn on extracted features."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.chain import RECIPE, ROOT, launch, tool, write_recipe
from tests.processes import LIMIT_S
from tests.shared import made_once

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The whole video in one clip, of the size of training: as tools/extract_features.py takes it by itself.
FRAMES, SIZE, NEIGHBOURS = 16, [40, 32], 3
PHASES = [{"name": "warmup", "steps": 5, "start_lr": 1e-4, "final_lr": 1e-3}, {"name": "constant"}]
EVALUATE: dict[str, Any] = {
    "train": "left",
    "val": "held_out",
    "labels_per_class": "all",
    "neighbours": NEIGHBOURS,
    "frames": FRAMES,
    "size": SIZE,
    "workers": 0,
    "finish_s": LIMIT_S,
    "stages": ["pretrain"],
}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "pretrain" / "evaluations.jsonl").read_text().splitlines()]


def results(rows: list[dict[str, Any]]) -> dict[int, list[float]]:
    return {row["step"]: [row[key] for key in ("knn", "linear", "effective_rank", "held_out_loss")] for row in rows}


@pytest.fixture(scope="session")
def evaluated(
    two_data_sets: dict[str, Path], four_stage_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Pretraining that was evaluated meanwhile; every checkpoint is kept."""

    def make(folder: Path) -> None:
        recipe = write_recipe(
            folder / "recipe.yaml",
            folder / "run",
            {**two_data_sets, "held_out": four_stage_data["held_out"]},
            checkpoint={"keep": 9},
            evaluate=EVALUATE,
            pretrain={**RECIPE["pretrain"], "clip": {"frames": 4, "size": SIZE}, "phases": PHASES},
            cooldown=None,
        )
        launch(recipe)

    return made_once(tmp_path_factory, "evaluated run", make) / "run"


def test_in_the_job_and_afterwards_the_same_rows(evaluated: Path, tmp_path: Path) -> None:
    rows = rows_of(evaluated)
    assert sorted(row["step"] for row in rows) == [4, 5, 8, 12]  # multiples of checkpoint.every, ends of phases
    for row in rows:
        assert (row["train_clips"], row["val_clips"]) == (24, 8)
        assert 0 <= row["knn"] <= 1
        assert 0 <= row["linear"] <= 1
        assert 1 < row["effective_rank"] < 48
        assert 0 < row["held_out_loss"] < 2
    copy = tmp_path / "run"
    shutil.copytree(evaluated, copy)
    (copy / "pretrain" / "evaluations.jsonl").unlink()
    done = tool("evaluate", copy, "--all-checkpoints")
    again = results(rows_of(copy))
    assert again.keys() == results(rows).keys()
    for step, values in results(rows).items():
        assert again[step] == pytest.approx(values, rel=1e-3)
    assert done.stdout.count("step_0000") == 4
    assert done.stdout.count("best") == 1
    before = rows_of(copy)
    tool("evaluate", copy, "--all-checkpoints")
    assert rows_of(copy) == before  # nothing is evaluated twice


def extracted(shards: Path, checkpoint: Path, out: Path) -> tuple[npt.NDArray[np.float64], list[str]]:
    """One row per video, token steps one after the other, and its label."""
    tool("extract_features", shards, checkpoint, out, "--pool", "time", "--chunk", FRAMES, "--workers", 1)
    rows, labels = [], []
    for line in (out / "index.jsonl").read_text().splitlines():
        chunk = json.loads(line)
        with safe_open(out / chunk["file"], framework="np") as file:
            row = file.get_slice("features")[chunk["row"] : chunk["row"] + chunk["rows"]]
        rows.append(np.asarray(row, np.float64).ravel())
        labels.append(chunk["label"])
    return np.stack(rows), labels


def test_scikit_learn_on_extracted_features_finds_the_same_best_checkpoint(
    evaluated: Path, two_data_sets: dict[str, Path], four_stage_data: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for row in rows_of(evaluated):
        checkpoint = evaluated / "pretrain" / "checkpoints" / row["checkpoint"]
        step = row["step"]
        train, labels = extracted(two_data_sets["left"], checkpoint, tmp_path / f"train-{step}")
        val, val_labels = extracted(four_stage_data["held_out"], checkpoint, tmp_path / f"val-{step}")
        knn = make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS, metric="cosine")).fit(train, labels)
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(train, labels)
        found[step] = knn.score(val, val_labels), linear.score(val, val_labels), step
    assert {row["step"]: (row["knn"], row["linear"], row["step"]) for row in rows_of(evaluated)} == found
    best = max(found.values())[2]
    status = json.loads(tool("launch", "status", evaluated, "--json").stdout)
    assert status["stages"][0]["best"]["step"] == best
    assert f"best: step {best} (k-NN" in tool("launch", "status", evaluated).stdout


def test_without_labels_checkpoints_are_ranked_by_the_held_out_loss(evaluated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated, copy)
    (copy / "pretrain" / "evaluations.jsonl").unlink()
    tool("evaluate", copy, "--data", "right", "--clips", 6, "--step", 5, "--step", 12)
    rows = rows_of(copy)
    assert {row["step"] for row in rows} == {5, 12}
    assert {(row["knn"], row["linear"], row["val_clips"]) for row in rows} == {(None, None, 6)}
    refused = tool("evaluate", copy, "--data", "nowhere", check=False)
    assert refused.returncode == 2
    assert "neither a data set of the recipe nor a folder" in refused.stderr


def test_a_killed_evaluation_leaves_whole_rows_and_the_next_one_does_the_rest(evaluated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated, copy)
    path = copy / "pretrain" / "evaluations.jsonl"
    path.unlink()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "evaluate.py", copy],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None or path.exists()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tool("evaluate", copy)
    assert sorted(results(rows_of(copy))) == [4, 5, 8, 12]
