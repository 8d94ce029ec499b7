"""A run whose clips fail is a function of recipe, seed, step and ledger: kills and other ranks change nothing."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import checkpoint_tensors, launch, metrics, tool, write_recipe
from tests.data.faulty import with_faulty_decoder
from tests.processes import killed_when
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.substitution import DecodeFailure
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.schema import FaultsConfig
from vjepa_scale.training.skipped_clips import SkippedClips
from vjepa_scale.training.trainer import train_stage

pytestmark = pytest.mark.distributed

Sets = dict[str, Path]
LENIENT = {"faults": {"max_rate": 0.5}}
BASE: dict[str, Any] = {"cooldown": None, "checkpoint": {"every": 4}}


def damaged(sets: Sets, folder: Path, word: bytes = b"\0") -> Sets:
    """The data sets with three videos of ``left``'s first shard overwritten."""
    shutil.copytree(sets["left"], folder)
    shard = min(folder.glob("*.tar"))
    with tarfile.open(shard) as archive:
        members = [member for member in archive if member.name.endswith(".mp4")][:3]
    with open(shard, "r+b") as file:
        for member in members:
            file.seek(member.offset_data)
            file.write(word.ljust(member.size, b"\0"))
    return {**sets, "left": folder}


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def assert_same_run(left: Path, right: Path, folder: Path, *, bits: bool = True) -> None:
    assert ledger(left) == ledger(right)
    if not bits:  # other ranks sum in another order
        rows = zip(metrics(left, "pretrain"), metrics(right, "pretrain"), strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in rows)
        return
    assert metrics(left, "pretrain") == metrics(right, "pretrain")
    tensors = [checkpoint_tensors(run / "pretrain/checkpoints/step_00000012", folder) for run in (left, right)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def failure(step: int, slot: int, cause: str = "unreadable") -> DecodeFailure:
    return DecodeFailure(step, slot, "left", 7, key="000000007", shard="x.tar", cause=cause, replacement=3)


def test_the_rate_is_judged_over_the_window_and_a_refused_step_leaves_nothing(tmp_path: Path) -> None:
    """2 of 10 × 20 clips may fail: the third stops the run, unless the first has left the window."""
    faults = FaultsConfig(max_rate=0.01, window=10)

    def enter(book: SkippedClips, step: int, cause: str = "unreadable") -> None:
        book.enter([failure(step, 4, cause)], step=step, global_batch=20, faults=faults, write=True)

    book = SkippedClips(tmp_path, "pretrain")
    enter(book, 5)
    enter(book, 9)
    with open(book.path, "a") as file:
        file.write('{"event": "substituted", "stage": "pre')  # a kill in the middle of a row
    again = SkippedClips(tmp_path, "pretrain")
    assert (
        again.known() == book.known() == {(5, 4, "left", 7): ("unreadable", ""), (9, 4, "left", 7): ("unreadable", "")}
    )
    assert again.new([failure(9, 4), failure(9, 5)]) == [failure(9, 5)]
    content = book.path.read_text()
    with pytest.raises(
        UserError, match=r"3 clips do not decode; .*200 clips of 10 steps, 2 may: .*step 14.*step 9"
    ) as e:
        enter(again, 14, "time limit")
    assert "decode_timeout_s" in str(e.value)
    assert book.path.read_text() == content
    enter(again, 15)
    assert len(SkippedClips(tmp_path, "pretrain").known()) == 3
    assert not SkippedClips(tmp_path, "cooldown").known()
    strict = FaultsConfig(max_rate=0)
    with pytest.raises(UserError, match="0 may"):
        SkippedClips(tmp_path, "cooldown").enter([failure(0, 0)], step=0, global_batch=3072, faults=strict, write=True)


def test_peers_wait_longer_than_a_clip_may_take(two_data_sets: Sets, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path,
        two_data_sets,
        engine={"timeout_s": 60},
        data={"faults": {"decode_timeout_s": 60}},
    )
    with pytest.raises(UserError, match=r"decode_timeout_s 60 is not less than engine.timeout_s 60"):
        load_recipe(recipe)


@pytest.fixture(scope="module")
def broken(two_data_sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return damaged(two_data_sets, tmp_path_factory.mktemp("broken") / "left")


@pytest.fixture(scope="module")
def undisturbed(broken: Sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, to the end, with damaged clips."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(
        folder / "recipe.yaml", folder / "run", broken, launch={"tasks_per_node": 2}, data=LENIENT, **BASE
    )
    launch(recipe)
    return folder / "run"


def test_rows_say_what_was_replaced_and_metrics_count_it(undisturbed: Path) -> None:
    rows = ledger(undisturbed)
    assert rows
    assert {row["event"] for row in rows} == {"substituted"}
    for row in rows:
        assert (row["stage"], row["dataset"], row["cause"]) == ("pretrain", "left", "unreadable")
        assert row["key"] in row["shard"] or row["shard"].endswith(".tar")
        assert row["record"] != row["replacement"]
    slots = {(row["step"], row["slot"]) for row in rows}
    for metric in metrics(undisturbed, "pretrain"):
        assert metric["substituted"] == sum(step == metric["step"] for step, _ in slots)
    logs = "".join(path.read_text() for path in (undisturbed / "pretrain").rglob("*_0_log.out"))
    assert f"clips replaced so far: left: unreadable {len(rows)}" in logs


def train(ranks: Ranks, recipe: Path, stage: str) -> None:
    process_group.stop()  # the stage makes its own
    train_stage(stages_of(load_recipe(recipe))[stage], ranks)


@pytest.mark.fault(
    "processes",
    "a run is killed right after a clip was replaced",
    "the ledger has the clip, which is replaced again on resume: the same bits",
)
@pytest.mark.parametrize(("row", "ranks"), [(1, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_kill_right_after_a_substitution(
    row: int, ranks: int, broken: Sets, undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 as soon as the ledger has so many rows (1: before a checkpoint, 4: after one), then on with ``ranks``."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run, broken, launch={"tasks_per_node": 2}, data=LENIENT, **BASE)
    assert len(ledger(undisturbed)) > row
    book = run / "ledger.jsonl"
    killed_when(lambda: book.exists() and book.read_bytes().count(b"\n") >= row, train, 2, recipe, "pretrain")
    launch(recipe, f"launch.tasks_per_node={ranks}")
    assert_same_run(run, undisturbed, tmp_path, bits=ranks == 2)


@pytest.mark.slow
def test_the_ledger_decides_also_where_the_clips_are_whole_again(
    two_data_sets: Sets, broken: Sets, undisturbed: Path, tmp_path: Path
) -> None:
    """A clip that did not decode in time, say: the next attempt could decode it, and does not."""
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", run, two_data_sets, launch={"tasks_per_node": 2}, data=LENIENT, **BASE
    )
    run.mkdir()
    shutil.copy(undisturbed / "ledger.jsonl", run)
    launch(recipe)
    assert_same_run(run, undisturbed, tmp_path)


@pytest.mark.slow
def test_above_the_rate_the_run_stops_names_the_clips_and_goes_on_once_they_are_restored(
    two_data_sets: Sets, undisturbed: Path, tmp_path: Path
) -> None:
    """By default a run this small may replace none. Nothing is entered that a restored shard would have to obey."""
    sets = damaged(two_data_sets, tmp_path / "left")
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run, sets, launch={"tasks_per_node": 2}, **BASE)
    done = launch(recipe, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "data.faults.max_rate: 2 clips do not decode; of the 800 clips of 100 steps, 0 may" in done.stderr
    assert ledger(undisturbed)[0]["key"] in done.stderr
    assert ledger(undisturbed)[0]["shard"].rpartition("/")[2] in done.stderr
    assert [row["event"] for row in ledger(run)] == ["stop"]
    shutil.rmtree(tmp_path / "left")
    shutil.copytree(two_data_sets["left"], tmp_path / "left")
    launch(recipe)
    whole = write_recipe(
        tmp_path / "whole.yaml", tmp_path / "whole", two_data_sets, launch={"tasks_per_node": 2}, **BASE
    )
    launch(whole)
    assert metrics(run, "pretrain") == metrics(tmp_path / "whole", "pretrain")


@pytest.mark.slow
def test_a_run_with_a_decoder_that_hangs(
    two_data_sets: Sets, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run as with unreadable clips, but for the cause in the ledger."""
    monkeypatch.setenv("PYTHONPATH", with_faulty_decoder(tmp_path)["PYTHONPATH"])
    sets = damaged(two_data_sets, tmp_path / "left", b"HANG")
    run = tmp_path / "run"
    faults = {"faults": {"max_rate": 0.5, "decode_timeout_s": 2}}
    recipe = write_recipe(tmp_path / "recipe.yaml", run, sets, launch={"tasks_per_node": 2}, data=faults, **BASE)
    tool("launch", recipe, "--wait")  # a real start, for a real environment
    assert {row["cause"] for row in ledger(run)} == {"time limit"}
    keys = ("step", "slot", "dataset", "record", "replacement")
    assert [[row[k] for k in keys] for row in ledger(run)] == [[row[k] for k in keys] for row in ledger(undisturbed)]
    cause = "substituted/unreadable", "substituted/time limit"
    wanted = [{key.replace(*cause): value for key, value in row.items()} for row in metrics(undisturbed, "pretrain")]
    assert metrics(run, "pretrain") == wanted
