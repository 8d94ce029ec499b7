"""A run with everything that a report can show, made from a small finished run: more columns, restarts, failures."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint.manifest import identity, newest_first, read_manifest

# Columns of metrics.jsonl, and a plausible value at a fraction x of the stage.
COLUMNS = {
    "mask_loss/0": lambda x: 0.72 - 0.2 * x,
    "mask_loss/1": lambda x: 0.81 - 0.2 * x,
    "data_loss/left": lambda x: 0.70 - 0.2 * x,
    "data_loss/right": lambda x: 0.83 - 0.2 * x,
    "update_ratio": lambda x: 4e-4 * (1.1 - x),
    "collapse/context_rank": lambda x: max(0.5, 40 - 60 * x),  # collapses
    "collapse/target_std": lambda x: 0.6 - 0.2 * x,
    "collapse/context_std": lambda x: 0.5 - 0.2 * x,
    "collapse/cosine": lambda x: 0.3 + 0.4 * x,
    "collapse/distance": lambda x: 0.02 + 0.05 * x,
    "collapse/over_time": lambda x: 0.2 + 0.1 * math.sin(9 * x),
    "collapse/to_mean": lambda x: 1.0 - 0.3 * x,
    "mfu": lambda x: 0.31,
    "waiting": lambda x: 0.04 + 0.03 * math.sin(20 * x),
    "saving": lambda x: 0.2 if int(40 * x) % 10 == 0 else 0.0,
    "memory/peak": lambda x: 41.5,
    "memory/loader": lambda x: 9 + x,
    "decode/seconds": lambda x: 0.31,
    "decode/cores": lambda x: 5.2,
}


def enrich(run: Path, *, rows: int = 0) -> None:
    """Adds columns to pretraining's metrics, evaluations, a restart, an error and replaced clips. rows: at least"""
    stage = run / "pretrain"
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    if rows > len(metrics):
        of_phase = {row["phase"]: row for row in metrics}
        names = list(of_phase)
        metrics = [
            of_phase[names[min(step * 8 // rows, len(names) - 1)]]
            | {"step": step, "loss": 0.5 + 0.4 * math.exp(-5 * step / rows) + draw.gauss(0, 0.02)}
            for step in range(rows)
        ]
    for number, row in enumerate(metrics):
        x = number / len(metrics)
        row |= {name: of(x) * (1 + draw.gauss(0, 0.03)) for name, of in COLUMNS.items()}
    metrics[len(metrics) // 2]["loss"] = math.nan
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 1, "cut sho')
    write_rows(
        stage / "evaluations.jsonl", [_evaluated(path, n) for n, path in enumerate(newest_first(stage / "checkpoints"))]
    )
    history = [json.loads(line) for line in (stage / "history.jsonl").read_text().splitlines()]
    started = next(row for row in history if row["event"] == "started")
    before = {"time": started["time"] - 600, "event": "started", **_of(started), "job": "0", "step": 0}
    failed = {
        **{
            "time": started["time"] - 300,
            "event": "failed",
            "job": "0",
            "kind": "OutOfMemoryError",
            "rank": 1,
            "step": 3,
        },
        **{"message": "<b>CUDA</b> out of memory & more", "user_error": False, "log": None, "report": None},
    }
    submitted = [row for row in history if row["event"] == "submitted"]
    later = [row for row in history if row["event"] != "submitted"]
    write_rows(stage / "history.jsonl", [*submitted[:1], before, failed, *later])
    replaced = {"event": "substituted", "stage": "pretrain", "dataset": "left", "slot": 1, "record": 3, "key": "k"}
    write_rows(run / "ledger.jsonl", [{**replaced, "step": n, "cause": "truncated", "shard": "s"} for n in range(7)])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run, without its code."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("code")))


def _of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("time", "event", "job", "step")}


def _evaluated(checkpoint: Path, number: int) -> dict[str, Any]:
    """A row of evaluations.jsonl; of number 1 the best. number: 0: the newest checkpoint"""
    manifest = read_manifest(checkpoint)
    figures = {"knn": (0.3, 0.4, 0.2)[number % 3], "linear": 0.35, "held_out_loss": 0.6, "effective_rank": 31.0}
    return {
        "step": manifest["step"],
        "checkpoint": checkpoint.name,
        "identity": identity(manifest),
        "settings": {},
    } | figures
