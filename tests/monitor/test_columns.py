"""The columns of metrics.jsonl: the page has each of them, and real runs write what the page says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain import OF_MACHINE, ROOT
from vjepa_scale.recipe.guard_sections import LIMITS
from vjepa_scale.run.columns import COLUMNS, column_of, table

PAGE = (ROOT / "docs" / "watching.md").read_text()


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_the_page_has_the_table() -> None:
    assert table() in PAGE, "put what python -m vjepa_scale.run.columns prints between the marks of docs/watching.md"


def test_every_limit_is_of_a_column_and_the_page_says_what_it_means() -> None:
    what_to_do = PAGE.split("| figure | what has happened")[1]
    for name in LIMITS:
        assert column_of(name) is not None
        assert f"`{name}`" in what_to_do


def test_columns_that_tests_leave_out_of_comparisons_are_those_of_the_machine() -> None:
    names = {column.name for column in COLUMNS if column.of_machine}
    assert names == {column.name for column in COLUMNS if column.name.startswith(OF_MACHINE)}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_writes_columns_of_the_page_only(four_stages: Path) -> None:
    for stage in ("pretrain", "cooldown", "action", "probe"):
        written = {name for row in rows_of(four_stages, stage) for name in row} - {"stage"}
        unknown = [name for name in written if column_of(name) is None]
        assert not unknown, f"{stage}: describe them in run/columns.py"


@pytest.mark.distributed
def test_a_run_writes_what_the_page_says(finished: Path) -> None:
    rows = rows_of(finished, "pretrain")
    measured = [row for row in rows if row["effective_rank"] is not None]
    assert [row["step"] for row in measured] == [0, 3, 6, 9, 11]  # every third, and the last
    known = {name: column_of(name) for row in rows for name in row}
    at_interval = {name for name, column in known.items() if column is not None and column.at_interval}
    assert len(at_interval) == 13  # 11, and the losses of two data sets
    for row in rows:
        there = {name for name in at_interval if row.get(name) is not None}
        assert there == (at_interval if row in measured else set())

    for row in rows:
        assert row["mask_loss/0"] + row["mask_loss/1"] == pytest.approx(2 * row["loss"], rel=1e-6)
        assert row["tokens_per_s"] == pytest.approx(40 * row["clips_per_s"], rel=1e-3)  # 4 × 32 × 40: 2 · 4 · 5 tokens
        assert row["flops_per_s"] > 0
        assert row["mfu"] > 0
        assert 0 < row["waiting"] <= 1
        assert 0 <= row["saving"] < 1
        assert row["decode/seconds"] > 0
        assert row["restarts"] == 0
    for row in measured:
        assert 0 < row["update_ratio"] < 1
        assert 0 < row["collapse/target_std"] <= 1
        assert -1 <= row["collapse/cosine"] <= 1
        assert 0 <= row["collapse/over_time"] <= 1
        # Each data set's loss is the mean of its clips, and every clip is of one of both.
        ends = sorted((row["data_loss/left"], row["data_loss/right"]))
        assert ends[0] - 1e-6 <= row["loss"] <= ends[1] + 1e-6
        assert row["memory/process"] > 0.05
        assert row["memory/loader"] > 0.01
    assert measured[0]["collapse/distance"] == 0  # the target starts as a copy
    assert measured[0]["collapse/cosine"] > 0.5
    assert all(row["collapse/distance"] > 0 for row in measured[1:])
