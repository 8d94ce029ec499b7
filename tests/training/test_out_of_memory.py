"""What a rank says when its device's memory runs out: with stubs of CUDA's functions, not on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import write_recipe
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.run.progress import Progress
from vjepa_scale.training.out_of_memory import out_of_memory_explained
from vjepa_scale.training.trainer import train_stage

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of CUDA, which seems to be there."""
    found: list[str] = []

    def dump(path: str) -> None:
        found.append("dump")
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "|  PyTorch CUDA memory summary  |")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda *, max_entries: found.append(f"record {max_entries > 0}")
    )
    return found


def explained(folder: Path, progress: Progress, **sections: Any) -> str:
    recipe = write_recipe(folder / "recipe.yaml", folder / "run", {"left": folder, "right": folder}, **sections)
    stage = stages_of(load_recipe(recipe))["pretrain"]
    with pytest.raises(torch.OutOfMemoryError) as caught, out_of_memory_explained(stage, rank=2, progress=progress):
        raise torch.OutOfMemoryError(SAID + "\nmore")
    return str(caught.value)


def test_the_error_names_a_file_and_what_would_help(calls: list[str], tmp_path: Path) -> None:
    said = explained(tmp_path, Progress(7, "constant"), engine={"reshard_after_forward": False})
    file = tmp_path / "run" / "pretrain" / "profile" / "oom_rank_2.txt"
    assert said == (
        f"{SAID} (what it held: {file}; pretrain.micro_batch below 2 or engine.activation_checkpointing=selective or "
        "engine.reshard_after_forward=true or more GPUs)"
    )
    text = file.read_text()
    assert "step 7 of pretrain, phase constant\nmicro-batches of 2 clips of 4 frames of 40×32 pixels\n" in text
    assert "|  PyTorch CUDA memory summary  |" in text
    assert calls == []  # recorded only if asked for


def test_allocations_are_recorded_and_dumped_if_the_recipe_asks(calls: list[str], tmp_path: Path) -> None:
    said = explained(
        tmp_path,
        Progress(),
        engine={"device": "auto", "activation_checkpointing": "full"},
        profile={"memory": True},
    )
    folder = tmp_path / "run" / "pretrain" / "profile"
    assert said == f"{SAID} (what it held: {folder / 'oom_rank_2.txt'}; more GPUs)"
    assert calls == ["record True", "dump"]
    assert sorted(path.name for path in folder.iterdir()) == ["oom_rank_2.pickle", "oom_rank_2.txt"]
    assert "before the first step of pretrain\n" in (folder / "oom_rank_2.txt").read_text()


@pytest.mark.parametrize(
    ("engine", "word"),
    [
        ({"activation_checkpointing": "selective"}, "engine.activation_checkpointing=full"),
        ({"kind": "deepspeed", "zero_stage": 2}, "engine.zero_stage=3"),
    ],
)
def test_what_would_help_are_settings_of_the_recipe(
    engine: dict[str, Any], word: str, calls: list[str], tmp_path: Path
) -> None:
    assert word in explained(tmp_path, Progress(), engine=engine)
    load_recipe(tmp_path / "recipe.yaml", [word])


def test_a_summary_that_fails_and_a_full_disk_do_not_hide_the_error(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> str:
        raise RuntimeError("the device does not answer")

    monkeypatch.setattr(torch.cuda, "memory_summary", fails)
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "pretrain" / "profile").touch()  # no folder can be made there
    assert f"{SAID} (" in explained(tmp_path, Progress())


@pytest.mark.distributed
def test_a_training_step_that_runs_out_of_memory(
    two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole stage, with a loss that raises what PyTorch raises, in the second phase."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, data={"workers": 0})
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "")
    usual, progress = Jepa.loss, Progress()

    def loss(self: Jepa, *words: Any) -> Any:
        if progress.step == 6:
            raise torch.OutOfMemoryError(SAID)
        return usual(self, *words)

    monkeypatch.setattr(Jepa, "loss", loss)
    ranks = Ranks(0, 1, 0, 1, "job", "submitit-local", "job")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"pretrain\.micro_batch below 2"):
            train_stage(stages_of(load_recipe(recipe))["pretrain"], ranks, progress=progress)
    finally:  # a rank that fails leaves its group to the end of its process; this one goes on
        process_group.stop()
        torch.set_num_threads(threads)
    text = (tmp_path / "run" / "pretrain" / "profile" / "oom_rank_0.txt").read_text()
    assert "step 6 of pretrain, phase constant\n" in text
