"""Rows that lack what a row has, in histories, metrics, ledgers and reports: left out like torn ones, or an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain import tool, write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.monitor.status import read_status
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.run.events import History, attempts
from vjepa_scale.run.failures import worst_failure
from vjepa_scale.run.metrics import MetricsLog
from vjepa_scale.training.skipped_clips import SkippedClips

FAILED = {
    "kind": "ValueError",
    "message": "bad",
    "rank": 0,
    "step": 3,
    "user_error": False,
    "log": None,
    "report": None,
}
ROWS: list[dict[str, Any]] = [
    {"event": "submitted", "cluster": "local", "job_id": "7", "name": "run-pretrain", "launch": "launches/0001"},
    {"event": "started", "job": "7", "job_id": "7", "kind": "fresh", "step": 0},
    {"event": "saved", "job": "7", "step": 2},
    {"event": "interrupted", "job": "7", "signal": "SIGUSR2", "step": 2},
    {"event": "requeued", "job_id": "7", "reason": "SIGUSR2"},
    {"event": "started", "job": "8", "job_id": "8", "kind": "resume", "step": 2},
    {"event": "failed", "job": "8", "job_id": "8", **FAILED},
    {"event": "gave_up", "job_id": "8", "reason": "twice"},
    {"event": "cancelled"},
    {"event": "done", "job": "8", "step": 12},
]
METRICS = {"step": 0, "stage": "pretrain", "phase": "warmup", "loss": 0.5, "clips_per_s": 8.0}


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_recipe(folder / "recipe.yaml", folder, {"left": folder / "no", "right": folder / "data"})
    return folder


@pytest.mark.fault(
    "launches",
    "history and metrics have rows that are damaged",
    "`status` shows the rest",
)
def test_status_of_histories_and_metrics_with_rows_of_something_else(run: Path) -> None:
    """Each key of each row taken away, or of another type: no row makes status fail."""
    rows = [{"time": 1000.0 + number, **row} for number, row in enumerate(ROWS)]
    strange: list[Any] = [
        [],
        3,
        None,
        {},
        {"event": "saved"},
        {"event": ["x"], "time": 1},
        {"time": 1.0, "event": "new"},
    ]
    write(run / "pretrain" / "metrics.jsonl", [METRICS])
    for number, row in enumerate(rows):
        for key in row:
            for other in ({}, {key: []}):
                changed = {name: value for name, value in row.items() if name != key} | other
                write(run / "pretrain" / "history.jsonl", [*strange, *rows[:number], changed, *rows[number + 1 :]])
                read_status(run)
                attempts(History(run / "pretrain").since_submission())
    write(run / "pretrain" / "history.jsonl", [*strange, *rows])
    assert History(run / "pretrain").since_submission() == rows
    for key in METRICS:
        for other in ({}, {key: None}):
            changed = {name: value for name, value in METRICS.items() if name != key} | other
            write(run / "pretrain" / "metrics.jsonl", [METRICS, changed, [], 3])
            assert read_status(run).stages[0].step == 1
    (run / "launches/0001").mkdir(parents=True)
    for source in ("[]", '{"stages": 3}', "[" * 100_000):
        (run / "launches/0001/source.json").write_text(source)
        assert tool("launch", "status", run, check=False).returncode in (0, 1)


@pytest.mark.fault(
    "launches",
    "metrics have a damaged row at a resume",
    "the run resumes",
)
def test_metrics_without_a_step_do_not_prevent_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [METRICS, {"loss": 1.0}, [], {**METRICS, "step": 1}])
    assert MetricsLog(path, step=1, last_step=9, console_every=1).repeated == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [METRICS]


def test_reports_of_ranks_that_are_none(tmp_path: Path) -> None:
    whole = {**FAILED, "bystander": False, "traceback": ""}
    for number, content in enumerate(("", "[" * 100_000, "[]", "{}", json.dumps({**whole, "rank": "x"}))):
        (tmp_path / f"7.{number}.json").write_text(content)
    assert worst_failure(tmp_path, "7") is None
    (tmp_path / "7.9.json").write_text(json.dumps(whole))
    found = worst_failure(tmp_path, "7")
    assert found is not None
    assert found["kind"] == "ValueError"


@pytest.mark.fault(
    "launches",
    "a row of the ledger is damaged",
    "an error before the first step: results depend on it",
)
def test_a_row_of_the_ledger_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    """Numbers depend on it: it is never left out."""
    row = {"event": "substituted", "stage": "pretrain", "step": 1, "slot": 2, "dataset": "a", "record": 3, "key": "k"}
    row |= {"shard": "s", "cause": "c", "detail": "", "replacement": None}
    write(tmp_path / "ledger.jsonl", [row])
    assert len(SkippedClips(tmp_path, "pretrain").known()) == 1
    for change in ({"step": "x"}, {"record": None}):
        write(tmp_path / "ledger.jsonl", [row | change])
        with pytest.raises(UserError, match=r"ledger\.jsonl: a row of 'pretrain' that is not whole"):
            SkippedClips(tmp_path, "pretrain")
    del row["shard"]
    write(tmp_path / "ledger.jsonl", [row])
    with pytest.raises(UserError, match="not whole"):
        SkippedClips(tmp_path, "pretrain")
    assert SkippedClips(tmp_path, "cooldown").known() == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"step": "4"}'])
def test_a_damaged_result_of_a_probe_is_made_again(content: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path, {"left": tmp_path / "no", "right": tmp_path / "data"})
    probe = (
        "steps: 4, heads: 2, init_from: pretrain, evaluate_on: right, mixture: {left: 1}, clip: {frames: 4, size: 32}"
    )
    recipe = load_recipe(path, [f"probe={{{probe}, phases: [{{name: all, start_lr: 1}}]}}"])
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/evaluation.json").write_text(content)
    assert not stages_of(recipe)["probe"].is_complete(4)
    (tmp_path / "probe/evaluation.json").write_text('{"step": 4}')
    assert stages_of(recipe)["probe"].is_complete(4)
