"""Planted trouble in whole runs: a clip of garbage with a huge loss, a NaN in one rank's gradient, a rate too high.

The trouble belongs to clips: it comes wherever they are shown, so a rollback that left them in would meet it again.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.chain import checkpoint_tensors, metrics, tool, write_recipe
from tests.processes import killed_when, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed import process_group
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.planned_start import planned_order
from vjepa_scale.training.spikes import SpikeError
from vjepa_scale.training.step import NonFiniteLossError
from vjepa_scale.training.trainer import train_stage

pytestmark = pytest.mark.distributed

Sets = dict[str, Path]
STEPS, JUDGED, SEEDS = 70, 50, (11, 12, 13, 14, 15)
TROUBLE_AT, SAVED = 17, 10  # the step that shows the clips, and the checkpoint before it
SMALL = {"steps": STEPS, "clip": {"frames": 4, "size": [32, 32]}, "global_batch": 4, "micro_batch": 2}


def recipe_of(folder: Path, sets: Sets, **sections: Any) -> Path:
    base: dict[str, Any] = {
        "cooldown": None,
        "checkpoint": {"every": SAVED},
        "data": {"workers": 0},
        "engine": {"shard_blocks": False},
        "log": {"every": 50, "effective_rank_every": 50},
        "masks": {"group": 2, "generators": [{"blocks": 2, "spatial_scale": 0.3}]},
        "guards": {"spikes": {"window": 16}},
        "pretrain": {**SMALL, "phases": [{"name": "all", "start_lr": 1e-3}]},
    }
    return write_recipe(folder / "recipe.yaml", folder / "run", sets, **{**base, **sections})


Plant = tuple[str, frozenset[tuple[str, int]]]


def train(ranks: Ranks, recipe: Path, plant: Plant | None) -> str:
    """Trains pretrain; returns the error that ended it."""
    process_group.stop()  # the stage makes its own
    whole: Callable[..., dict[str, Tensor]] = Jepa.loss

    def planted(self: Jepa, batch: MicroBatch, observe: Any = None) -> dict[str, Tensor]:
        found = whole(self, batch, observe)
        if plant is None:
            return found
        kind, clips = plant
        if batch.step == TROUBLE_AT and clips & set(zip(batch.datasets, batch.records, strict=True)):
            if kind == "garbage":
                found["loss"] = found["loss"] * 1e4
            elif process_group.rank() == 1:
                found["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return found

    with mock.patch.object(Jepa, "loss", planted):
        try:
            train_stage(stages_of(load_recipe(recipe))["pretrain"], ranks)
        except (SpikeError, NonFiniteLossError) as error:
            process_group.stop()
            return str(error)
    return ""


def rows_of_ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "pretrain" / "history.jsonl").read_text().splitlines()]


def last_mean(run: Path) -> float:
    rows = metrics(run, "pretrain")
    assert [row["step"] for row in rows] == list(range(STEPS))
    return mean(row["loss"] for row in rows[-JUDGED:])


def started(folder: Path, sets: Sets, plant: Plant | None, *, ranks: int, seed: int, **spikes: Any) -> tuple[Path, str]:
    """Trains; returns the run's folder and the error that ended it."""
    folder.mkdir(parents=True)
    recipe = recipe_of(folder, sets, run={"seed": seed}, guards={"spikes": {"window": 16, **spikes}})
    (error, *_) = run_processes(train, ranks, recipe, plant)
    return folder / "run", error


@pytest.fixture(scope="module")
def undisturbed(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of each seed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = []
    for seed in SEEDS:
        run, error = started(folder / str(seed), two_data_sets, None, ranks=1, seed=seed)
        assert not error
        assert not rows_of_ledger(run)
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def clips(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Data set and record of the clips of the step with trouble, by slot."""
    recipe = recipe_of(tmp_path_factory.mktemp("clips"), two_data_sets)
    _, order, _ = planned_order(stages_of(load_recipe(recipe))["pretrain"])
    drawn = order.batch(TROUBLE_AT)
    return [(order.names[d], r) for d, r in zip(drawn.dataset.tolist(), drawn.record.tolist(), strict=True)]


KINDS = {"garbage": 1, "nan": 2}  # and the number of ranks


@pytest.fixture(scope="module")
def disturbed(
    two_data_sets: Sets, clips: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("disturbed")
    runs = {}
    for (kind, ranks), action in itertools.product(KINDS.items(), ("skip", "rollback")):
        plant = (kind, frozenset(clips[-1:]))
        run, error = started(folder / kind / action, two_data_sets, plant, ranks=ranks, seed=SEEDS[0], action=action)
        assert not error
        runs[kind, action] = run
    return runs


@pytest.mark.fault(
    "training",
    "a clip of garbage with a huge loss; a NaN in the gradient of one rank only",
    "with the action `skip` or `rollback` all ranks leave out the same step or clips; the end is within the spread of "
    "seeds",
)
@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("kind", KINDS)
def test_trouble_does_not_show_in_the_end(
    kind: str,
    action: str,
    undisturbed: list[Path],
    disturbed: dict[tuple[str, str], Path],
    clips: list[tuple[str, int]],
) -> None:
    """The mean loss of the last steps is within two standard deviations of the undisturbed seeds'."""
    run = disturbed[kind, action]
    whole = [last_mean(each) for each in undisturbed]
    assert abs(last_mean(run) - mean(whole)) <= 2 * stdev(whole)
    (row,) = rows_of_ledger(run)
    assert (row["event"], row["step"], row["action"]) == ("spike", TROUBLE_AT, action)
    assert row["to"] == (None if action == "skip" else SAVED)
    assert row["saw"].startswith("the loss is" if kind == "garbage" else "the gradient norm is nan")
    assert [name for name, _ in row["clips"]] == [name for name, _ in clips]
    (event,) = [row for row in events(run) if row["event"] == "spike"]
    assert (event["step"], event["to"]) == (TROUBLE_AT, row["to"])
    skipped = [row for row in metrics(run, "pretrain") if row.get("skipped")]
    assert [row["step"] for row in skipped] == ([TROUBLE_AT] if action == "skip" else [])
    assert all(row["grad_norm"] is None for row in skipped if kind == "nan")
    before, after = (metrics(each, "pretrain") for each in (undisturbed[0], run))
    same = [a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in zip(before, after, strict=True)]
    assert same.index(False) == (TROUBLE_AT + (kind == "nan") if action == "skip" else SAVED)
    done = "skipped" if action == "skip" else f"rolled back to step {SAVED}"
    assert f"step {TROUBLE_AT} {done}" in " ".join(tool("launch", "status", run, check=False).stdout.split())


@pytest.mark.slow
def test_without_the_guard_the_garbage_shows(
    two_data_sets: Sets, undisturbed: list[Path], clips: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Else the tests above would say nothing."""
    plant = ("garbage", frozenset(clips[-1:]))
    run, error = started(tmp_path / "a", two_data_sets, plant, ranks=1, seed=SEEDS[0], deviations=None)
    assert not error
    whole = [last_mean(each) for each in undisturbed]
    assert last_mean(run) - mean(whole) > 2 * stdev(whole)


@pytest.mark.fault(
    "training",
    "the same, with the action `stop`",
    "the run stops at that step, before anything moves, and names it",
)
@pytest.mark.parametrize("kind", KINDS)
def test_with_stop_it_stops_at_that_step(
    kind: str, two_data_sets: Sets, clips: list[tuple[str, int]], tmp_path: Path
) -> None:
    plant = (kind, frozenset(clips[-1:]))
    run, error = started(tmp_path / "a", two_data_sets, plant, ranks=KINDS[kind], seed=SEEDS[0], action="stop")
    assert ("the loss is" if kind == "garbage" else "gradient norm nan") in error
    assert [row["step"] for row in metrics(run, "pretrain")] == list(range(TROUBLE_AT))
    (row,) = rows_of_ledger(run)
    assert (row["event"], row["step"], row["reason"]) == ("stop", TROUBLE_AT, error)


@pytest.mark.fault(
    "training",
    "a run is killed after such a decision",
    "the resumed run repeats the decision from the ledger: the same bits",
)
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "action"), [("garbage", "skip"), ("garbage", "rollback"), ("nan", "rollback")])
def test_a_kill_after_the_decision_and_a_resume_change_no_bit(
    kind: str,
    action: str,
    disturbed: dict[tuple[str, str], Path],
    two_data_sets: Sets,
    clips: list[tuple[str, int]],
    tmp_path: Path,
) -> None:
    """kill -9 as soon as the ledger has the row: before weights are loaded, say."""
    run = tmp_path / "run"
    recipe = recipe_of(
        tmp_path, two_data_sets, run={"seed": SEEDS[0]}, guards={"spikes": {"window": 16, "action": action}}
    )
    plant = (kind, frozenset(clips[-1:]))
    book = run / "ledger.jsonl"
    killed_when(lambda: book.exists() and book.stat().st_size > 0, train, KINDS[kind], recipe, plant)
    assert run_processes(train, KINDS[kind], recipe, plant)[0] == ""
    whole = disturbed[kind, action]
    assert rows_of_ledger(run) == rows_of_ledger(whole)
    assert metrics(run, "pretrain") == metrics(whole, "pretrain")
    ours, theirs = (
        checkpoint_tensors(each / f"pretrain/checkpoints/step_{STEPS:08}", tmp_path) for each in (run, whole)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.fault(
    "training",
    "a learning rate ten times too high",
    "the bound on skips or rollbacks ends the run; the error says what it saw",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "bound"),
    [("skip", "5 steps in a row were skipped (guards.spikes.in_a_row: 5)"), ("rollback", "2 rollbacks in 1000 steps")],
)
def test_a_rate_ten_times_too_high_ends_by_a_bound(
    action: str, bound: str, two_data_sets: Sets, tmp_path: Path
) -> None:
    """From step 30 on. A rollback brings the weights back, and the rate ruins them again."""
    phases = [{"name": "fit", "steps": 30, "start_lr": 1.0}, {"name": "too_high", "start_lr": 10.0}]
    recipe = recipe_of(
        tmp_path,
        two_data_sets,
        optimizer={"kind": "sgd"},
        guards={"spikes": {"window": 16, "action": action, "rollbacks": 2}},
        pretrain={**SMALL, "phases": phases},
    )
    error = run_processes(train, 1, recipe, None)[0]
    assert bound in error
    spikes = [row for row in rows_of_ledger(tmp_path / "run") if row["event"] == "spike"]
    assert len(spikes) == (5 if action == "skip" else 2)
    assert all(row["action"] == action and 30 < row["step"] < 45 for row in spikes)
    assert all(spike["saw"] in error for spike in spikes[-2:])
