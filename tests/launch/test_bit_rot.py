"""The last checkpoint of a finished stage was damaged on the disk: it is found, and trained again to the same bits."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from tests.chain import launch, metrics, tool, write_recipe
from vjepa_scale.checkpoint import manifest, store
from vjepa_scale.checkpoint.formats.native import find_checkpoint
from vjepa_scale.checkpoint.manifest import identity, last_name, newest_name, problems, read_manifest, set_aside
from vjepa_scale.core.errors import UserError
from vjepa_scale.monitor.status import read_status
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.planned_start import source_of
from vjepa_scale.training.start import find_start

PRETRAIN_END, COOLDOWN_END = "pretrain/checkpoints/step_00000012", "cooldown/checkpoints/step_00000018"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, without its launchers: of the finished one it may be this process."""
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    for history in copied.glob("*/history.jsonl"):
        lines = [line for line in history.read_text().splitlines() if json.loads(line)["event"] != "submitted"]
        history.write_text("\n".join(lines) + "\n")
    return copied


@pytest.fixture
def recipe(run: Path, two_data_sets: dict[str, Path], tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", run, two_data_sets, launch={"tasks_per_node": 2})


def states(run: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in read_status(run).stages}


@pytest.mark.fault(
    "checkpoints",
    "the last checkpoint of a finished stage has rotted",
    "the launch sets it aside and trains it again from the one before, to the same bits",
)
@pytest.mark.slow
@pytest.mark.distributed
def test_a_finished_stage_is_trained_again_from_the_checkpoint_before(run: Path, recipe: Path, finished: Path) -> None:
    """As the user sees it: launched again, with the next stage not yet begun."""
    shutil.rmtree(run / "cooldown")
    flip(run / PRETRAIN_END / "__1_0.distcp")
    done = launch(recipe, "--stages", "pretrain")
    assert "pretrain is complete: verifying step_00000012" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "is damaged" in line)
    assert "__1_0.distcp" in line
    assert "set aside as step_00000012.damaged, to be trained again from step_00000008 on" in line
    assert "resume from" in done.stdout
    assert metrics(run, "pretrain") == metrics(finished, "pretrain")
    # The stage after it may have begun from the first one, and knows it by this.
    assert identity(read_manifest(run / PRETRAIN_END)) == identity(read_manifest(finished / PRETRAIN_END))
    assert not (run / f"{PRETRAIN_END}.damaged").exists()
    assert states(run)["pretrain"] == "done"


def test_a_finished_run_is_verified_and_its_damage_refused_by_consolidate(
    run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = launch(recipe)
    assert "cooldown is complete: verifying step_00000018" in done.stdout
    assert "every stage is already complete" in done.stdout
    end = run / COOLDOWN_END
    flip(end / "__0_0.distcp")
    before = run / "cooldown/checkpoints/step_00000016"
    for _ in range(2):  # found damaged now; and set aside already
        done = tool("consolidate", run, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2
        error = done.stderr.splitlines()[-1]
        assert error.startswith(f"error: {end.parent}: its last checkpoint, step_00000018")
        assert f"give {before} to use that one" in error
        if end.exists():
            set_aside(end)
    assert not (tmp_path / "out").exists()
    assert find_checkpoint(before) == before
    assert states(run) == {"pretrain": "done", "cooldown": "damaged"}
    assert tool("launch", "status", run, check=False).returncode == 1


def test_what_a_launch_does_before_anything_starts(run: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vjepa_scale.launch import plan

    flip(run / COOLDOWN_END / "__0_0.distcp")
    loaded, said = load_recipe(recipe), []

    def remaining(**words: object) -> list[str]:
        stages = list(stages_of(loaded).values())
        left = plan.check(stages, source=recipe, cluster="local", **words)  # type: ignore[arg-type]
        return [stage.name for stage in left]

    assert remaining() == []  # a dry run reads no tensors
    assert (run / COOLDOWN_END).is_dir()
    assert remaining(repair=said.append) == ["cooldown"]
    assert [line.partition(":")[0] for line in said] == ["pretrain is complete", "cooldown is complete", "cooldown"]
    assert newest_name(run / "cooldown/checkpoints") == run / "cooldown/checkpoints/step_00000016"
    # No good one is left: nothing starts from the beginning by itself.
    for checkpoint in (run / "pretrain/checkpoints").iterdir():
        flip(checkpoint / ".metadata")
    with pytest.raises(UserError, match="none of 3 checkpoints is good"):
        remaining(repair=said.append)
    assert (run / PRETRAIN_END).is_dir()


@pytest.mark.fault(
    "checkpoints",
    "it rots between the launch and the next stage's start",
    "the next stage refuses to start from it or an older one; `status` says damaged",
)
def test_the_next_stage_finds_it_and_status_knows(run: Path, recipe: Path) -> None:
    """Damage between the launch and the start of the stage after it."""
    shutil.rmtree(run / "cooldown")
    flip(run / PRETRAIN_END / "__0_0.distcp")
    loaded = load_recipe(recipe)
    assert states(run)["pretrain"] == "done"  # nobody has read it
    with pytest.raises(UserError, match=r"the last checkpoint of 'pretrain', .*step_00000012, is damaged.*launch"):
        find_start(stages_of(loaded)["cooldown"], {})
    assert (run / f"{PRETRAIN_END}.damaged").is_dir()
    assert states(run)["pretrain"] == "damaged"
    with pytest.raises(UserError, match="'pretrain' stands at step 8"):
        find_start(stages_of(loaded)["cooldown"], {})


@pytest.mark.fault(
    "checkpoints",
    "the last checkpoint of another run, from which one starts, is damaged",
    "an error that names it; an older one is used only if its own path is given",
)
@pytest.mark.parametrize("word", ["continue_from", "init_from"])
def test_an_older_checkpoint_of_another_run_is_not_taken_in_its_place(
    run: Path, two_data_sets: dict[str, Path], tmp_path: Path, word: str
) -> None:
    stage = {word: str(run / "pretrain"), "phases": [{"name": "decay", "start_lr": 1e-3, "final_lr": 1e-6}]}
    stage |= {} if word == "continue_from" else {"continue_from": None}
    path = write_recipe(tmp_path / "other.yaml", tmp_path / "other", two_data_sets, pretrain=None, cooldown=stage)
    loaded = load_recipe(path)
    flip(run / PRETRAIN_END / "__0_0.distcp")
    assert source_of(stages_of(loaded)["cooldown"]) == run / PRETRAIN_END  # by names and sizes
    with pytest.raises(UserError, match="its last checkpoint, step_00000012, is damaged"):
        find_start(stages_of(loaded)["cooldown"], {})
    set_aside(run / PRETRAIN_END)
    with pytest.raises(UserError, match=r"its last checkpoint, step_00000012\.damaged, is damaged"):
        source_of(stages_of(loaded)["cooldown"])
    before = run / "pretrain/checkpoints/step_00000008"
    assert source_of(stages_of(load_recipe(path, [f"cooldown.{word}={before}"]))["cooldown"]) == before


def test_a_manifest_that_is_a_folder_is_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / PRETRAIN_END / "manifest.json").unlink()
    (run / PRETRAIN_END / "manifest.json").mkdir()
    folder = run / "pretrain/checkpoints"
    assert store.find_latest(folder) == newest_name(folder) == folder / "step_00000008"
    assert "manifest.json: a folder, not a file" in capsys.readouterr().err
    with pytest.raises(UserError, match="its last checkpoint"):
        last_name(folder)


@pytest.mark.fault(
    "checkpoints",
    "the disk does not give back a file's bytes (EIO)",
    "as damage",
)
def test_bytes_that_the_disk_does_not_give_back_are_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(number, "Input/output error")

    monkeypatch.setattr(manifest, "sha256_file", unreadable)
    number = errno.EIO
    assert "__0_0.distcp cannot be read: Input/output error" in problems(run / PRETRAIN_END)
    number = errno.EACCES  # the file may be whole: whoever may read it knows
    with pytest.raises(OSError, match="Input/output"):
        problems(run / PRETRAIN_END)
