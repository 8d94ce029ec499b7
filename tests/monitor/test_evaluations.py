"""Which of several evaluated checkpoints is the best, which are due, and which stay on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitor.run_by_hand import Run
from tests.processes import LIMIT_S
from vjepa_scale.checkpoint.evaluations import best_checkpoint, kept_by_evaluation, not_evaluated, results_of
from vjepa_scale.checkpoint.manifest import identity, read_manifest, write_manifest
from vjepa_scale.checkpoint.store import retain
from vjepa_scale.core.errors import EXIT_SAVED, UserError
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.launch.evaluator import Evaluator
from vjepa_scale.monitor.status import render
from vjepa_scale.recipe import Stage, load_recipe, stages_of
from vjepa_scale.recipe.evaluate_section import evaluation_of, settings_of
from vjepa_scale.training.signals import Interrupt


def labelled(step: int, knn: float | None, linear: float | None = 0.5) -> dict[str, Any]:
    return {"step": step, "knn": knn, "linear": linear, "effective_rank": 9.0, "held_out_loss": 0.1 * step}


def unlabelled(step: int, loss: float | None, rank: float | None) -> dict[str, Any]:
    return {"step": step, "knn": None, "linear": None, "held_out_loss": loss, "effective_rank": rank}


NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([], None),
        ([labelled(1, 0.2), labelled(2, 0.4), labelled(3, 0.3)], 2),
        ([labelled(1, 0.4, 0.1), labelled(2, 0.3, 0.9)], 1),  # k-NN before the linear probe
        ([labelled(1, 0.4, 0.6), labelled(2, 0.4, 0.5)], 1),  # equal k-NN: the linear probe
        ([labelled(1, 0.4, None), labelled(2, 0.4, 0.1)], 2),
        ([labelled(1, 0.4), labelled(2, 0.4), labelled(3, 0.1)], 2),  # equal in both: the later one
        ([labelled(1, NAN), labelled(2, 0.1)], 2),
        ([labelled(1, None), labelled(2, 0.1)], 2),
        ([unlabelled(1, 0.5, 20), unlabelled(2, 0.3, 30), unlabelled(3, 0.4, 30)], 2),
        ([unlabelled(1, 0.5, 20), unlabelled(2, 0.01, 1.2), unlabelled(3, 0.4, 18)], 3),  # the second has collapsed
        ([unlabelled(1, 0.3, 20), unlabelled(2, 0.3, 20)], 2),
        ([unlabelled(1, NAN, 20), unlabelled(2, 0.3, 20)], 2),
        ([unlabelled(1, 0.2, None), unlabelled(2, 0.3, NAN)], None),
    ],
)
def test_the_best_of_several(rows: list[dict[str, Any]], best: int | None) -> None:
    for order in (rows, rows[::-1]):
        found = best_checkpoint(order)
        assert (found and found["step"]) == best


# -- rows, checkpoints and status of a run that is written by hand ---------------------------------


def stage_of(run: Run, checkpoint: dict[str, Any], evaluate: dict[str, Any] | None) -> Stage:
    path = run.folder / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["checkpoint"] |= checkpoint
    if evaluate is not None:
        tree["evaluate"] = evaluate
    path.write_text(yaml.safe_dump(tree))
    return stages_of(load_recipe(path))["pretrain"]


def save(run: Run, step: int, *, ends_phase: bool = False) -> Path:
    run.save("pretrain", step)
    folder = run.folder / "pretrain" / "checkpoints" / f"step_{step:08d}"
    tensors = folder / "__0_0.distcp"
    tensors.write_bytes(b"%d" % step)
    files = {tensors.name: read_manifest(folder)["files"][tensors.name] | {"bytes": len(b"%d" % step)}}
    files[tensors.name]["sha256"] = f"{step:064d}"
    write_manifest(folder, step=step, world_size=1, files=files, extra={"first": 0, "ends_phase": ends_phase})
    return folder


def evaluated(stage: Stage, checkpoint: Path, knn: float, **values: Any) -> None:
    config = evaluation_of(stage)
    row = {
        **labelled(read_manifest(checkpoint)["step"], knn),
        "checkpoint": checkpoint.name,
        "identity": identity(read_manifest(checkpoint)),
        "settings": settings_of(stage, config) if config else {},
    }
    with open(stage.evaluations, "a") as file:
        file.write(json.dumps(row | values) + "\n")


LABELLED = {"train": "left", "val": "right"}


def test_retention_keeps_the_best_and_a_bounded_number_that_wait(run: Run) -> None:
    stage = stage_of(run, {"every": 1, "keep": 2}, LABELLED)
    folder = stage.checkpoints

    def left() -> list[int]:
        retain(folder, keep=2, also=kept_by_evaluation(stage))
        return sorted(int(path.name[5:]) for path in folder.iterdir())

    paths = {step: save(run, step) for step in range(1, 8)}
    assert left() == [4, 5, 6, 7]  # nothing is evaluated: two more than ``keep``
    evaluated(stage, paths[4], 0.6)
    evaluated(stage, paths[5], 0.3)
    evaluated(stage, paths[7], 0.4)
    assert left() == [4, 6, 7]
    save(run, 8)
    save(run, 9)
    assert left() == [4, 6, 8, 9]
    evaluated(stage, paths[6], 0.5)
    assert left() == [4, 8, 9]


def test_without_the_section_or_without_keep_best_only_the_newest_stay(tmp_path: Path) -> None:
    for name, checkpoint, evaluate in (("a", {}, None), ("b", {"keep_best": False}, LABELLED)):
        run = Run(tmp_path / name)
        stage = stage_of(run, {"every": 1, "keep": 2} | checkpoint, evaluate)
        paths = [save(run, step) for step in range(1, 6)]
        evaluated(stage, paths[0], 0.9)
        assert kept_by_evaluation(stage) == set()


def test_due_are_the_multiples_and_the_ends_of_phases(run: Run) -> None:
    stage = stage_of(run, {"every": 2}, {**LABELLED, "every": 4})
    for step in (2, 3, 4, 8):
        save(run, step)
    save(run, 5, ends_phase=True)  # 3: saved after a signal
    config = evaluation_of(stage)
    assert config is not None
    due = [int(path.name[5:]) for path in not_evaluated(stage, config, only_due=True)]
    assert due == [8, 5, 4]
    assert len(not_evaluated(stage, config, only_due=False)) == 5


def test_rows_of_other_weights_settings_or_half_a_line_do_not_count(run: Run) -> None:
    stage = stage_of(run, {"every": 1}, LABELLED)
    first, second = save(run, 1), save(run, 2)
    evaluated(stage, first, 0.1)
    evaluated(stage, second, 0.9, identity="of a training before this one")
    evaluated(stage, second, 0.9, settings={"train": "another"})
    with open(stage.evaluations, "a") as file:
        file.write('{"step": 2, "checkpoint": "step_0000')
    best = results_of(stage).best
    assert best is not None
    assert best["step"] == 1
    config = evaluation_of(stage)
    assert config is not None
    assert [path.name for path in not_evaluated(stage, config, only_due=True)] == [second.name]


def test_status_names_the_best(run: Run) -> None:
    stage = stage_of(run, {"every": 1}, LABELLED)
    for step, knn in ((4, 0.25), (8, 0.412)):
        evaluated(stage, save(run, step), knn)
    status = run.look()
    best = status.stages[0].best
    assert best is not None
    assert (best.checkpoint, best.step, best.knn, best.evaluated) == ("step_00000008", 8, 0.412, 2)
    assert "best: step 8 (k-NN 41.2 %" in render(status)
    assert status.stages[1].best is None


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"train": "left"}, "give train and val"),
        ({"data": "left", "val": "right"}, "either data"),
        ({"train": "left", "val": "left"}, "same data set"),
        ({"data": "none"}, "evaluate.data"),
        ({"data": "left", "every": 6}, "no multiple of checkpoint.every"),
        ({"data": "left", "frames": 3}, "evaluate.frames"),
        ({"data": "left", "size": 12}, "evaluate.size"),
        ({"data": "left", "stages": ["pretrain", "none"]}, "evaluate.stages"),
        ({"data": "left", "stages": ["none"]}, "no stage 'none' in the recipe"),
    ],
)
def test_a_section_that_cannot_work_is_refused(run: Run, evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        stage_of(run, {"every": 4}, evaluate)
    assert said in str(refused.value)


# -- the process beside rank 0 ---------------------------------------------------------------------


@pytest.mark.distributed
def test_a_process_beside_rank_0_says_once_that_it_cannot_evaluate(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Its data are missing. Training goes on: nothing is raised, and a stage that is done need not wait."""
    stage = stage_of(run, {"every": 1}, {"data": "left", "finish_s": LIMIT_S})
    for step in (1, 2):
        save(run, step)
    evaluator = Evaluator(stage, detect_ranks(), Interrupt())
    evaluator.end(0)
    said = capfd.readouterr().err
    assert said.count("no more evaluations") == 1
    assert "data.sets.left.path" in said
    assert "training goes on; later: " in said
    assert not stage.evaluations.exists()


@pytest.mark.distributed
def test_after_a_signal_nothing_is_waited_for(run: Run) -> None:
    stage = stage_of(run, {"every": 1}, {"data": "left", "finish_s": 1e6})
    told = Interrupt()
    told.signal = "SIGUSR2"  # while it waits: the time limit is near
    for code, interrupt in ((EXIT_SAVED, Interrupt()), (0, told)):
        evaluator = Evaluator(stage, detect_ranks(), interrupt)
        evaluator.end(code)
        assert evaluator._process is not None
        assert evaluator._process.poll() is not None
    without = Evaluator(stage_of(run, {}, {"data": "left", "where": "off"}), detect_ranks(), Interrupt())
    assert without._process is None
    without.end(0)
