"""Rows of metrics.jsonl whose values come late: in their order, and all there before a checkpoint is."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from vjepa_scale.run.metrics import MetricsLog


def row(step: int, rank: Any = None) -> dict[str, Any]:
    numbers = {"loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "clips_per_s": 8.0}
    return {"step": step, "stage": "pretrain", "phase": "constant", "effective_rank": rank, **numbers}


def test_a_row_waits_for_its_value_and_those_behind_it_for_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    seen: list[dict[str, Any]] = []
    log = MetricsLog(path, step=0, last_step=9, console_every=1, seen=seen.append)

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    first: Future[dict[str, float]] = Future()
    log.write(row(0), first)
    log.write(row(1))
    assert steps() == []
    first.set_result({"effective_rank": 20.5})
    log.write(row(2))
    assert steps() == [0, 1, 2]
    assert json.loads(path.read_text().splitlines()[0])["effective_rank"] == 20.5
    second: Future[dict[str, float]] = Future()
    log.write(row(3), second)
    second.set_result({"effective_rank": 21.5})
    log.flush()  # as before a checkpoint
    assert steps() == [0, 1, 2, 3]
    assert [(row["step"], row["effective_rank"]) for row in seen] == [(0, 20.5), (3, 21.5)]
    assert "rank   21.5" in capsys.readouterr().err  # of a process that has not set up its logging


def test_lines_of_steps_are_aligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0, last_step=1000, console_every=1)
    for step, norm in ((8, 1.0), (9, 12.5), (999, 0.1)):
        log.write(row(step, 20.5) | {"grad_norm": norm})
    lines = capsys.readouterr().err.splitlines()
    for word in ("loss", "lr", "grad", "rank", "clips/s"):
        assert len({line.index(word) for line in lines}) == 1, lines


def test_a_resume_keeps_the_rows_before_it_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(step, 20.5)) + " \n" for step in range(5)]
    path.write_text("".join([*lines[:2], "not JSON\n", *lines[2:], '{"step": 5, "cut']))
    kept: list[dict[str, Any]] = []
    log = MetricsLog(path, step=3, last_step=9, console_every=100, kept=kept.append)
    assert path.read_text() == "".join(lines[:3])
    assert log.repeated == 2
    assert [row["step"] for row in kept] == [0, 1, 2]


def test_a_device_that_does_not_answer_costs_its_columns_and_not_the_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0, last_step=9, console_every=100)
    log.write(row(0), Future())
    log.write(row(1))
    log.flush(patience_s=0.01)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
