"""The newest checkpoint of a run that was killed is damaged: the run goes on from the one before, to the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain import metrics
from tests.faults.material import stopped_run, train_each
from tests.shared import made_once
from vjepa_scale.checkpoint.manifest import identity, read_manifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NEWEST, BEFORE, END = "step_00000008", "step_00000005", "step_00000012"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    """Two ranks' files have each other's name."""
    other, aside = path.with_name(path.name.replace("__0", "__1")), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


# What is done to which file of the newest checkpoint.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"one byte of {name}": (flip, name)
        for name in ("__0_0.distcp", "__1_0.distcp", "__1.sha256", ".metadata", "manifest.json")
    },
    "truncated": (truncate, "__1_0.distcp"),
    "missing": (Path.unlink, "__0.sha256"),
    "no manifest": (Path.unlink, "manifest.json"),
    "two ranks' tensors swapped": (swap, "__0_0.distcp"),
    "two ranks' checksums swapped": (swap, "__0.sha256"),
    "an empty folder": (shutil.rmtree, ""),
}


@pytest.fixture(scope="module")
def resumed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each damage, with the run that went on and what its ranks said."""

    def make(folder: Path) -> None:
        recipes = {}
        for number, (name, (damage, file)) in enumerate(DAMAGES.items()):
            run = stopped_run(finished, folder / str(number))
            damage(run / "pretrain" / "checkpoints" / NEWEST / file)
            if file == "":
                (run / "pretrain" / "checkpoints" / NEWEST).mkdir()
            recipes[name] = folder / str(number) / "recipe.yaml"
        ended = train_each(recipes)
        assert set(ended.values()) == {"done"}, ended

    return made_once(tmp_path_factory, "runs with damaged checkpoints", make)


@pytest.mark.fault(
    "checkpoints",
    "in the newest checkpoint a byte is flipped (in each kind of file), a file is truncated or missing, the manifest "
    "is missing, or two ranks' files are swapped",
    "a warning names checkpoint and file; the run goes on from the good one before, to the bits of an undisturbed run",
)
@pytest.mark.parametrize("name", DAMAGES)
def test_the_run_goes_on_from_the_checkpoint_before(name: str, resumed: Path, finished: Path) -> None:
    run = resumed / str(list(DAMAGES).index(name)) / "run" / "pretrain"
    history = (run / "history.jsonl").read_text().splitlines()
    assert f'"kind": "resume", "step": {int(BEFORE[5:])}' in next(row for row in history[::-1] if '"started"' in row)
    checkpoints = run / "checkpoints"
    for end in (NEWEST, END):  # the damaged one was saved again
        assert identity(read_manifest(checkpoints / end)) == identity(
            read_manifest(finished / "pretrain/checkpoints" / end)
        )
    assert metrics(run.parent, "pretrain") == metrics(finished, "pretrain")
    assert {path.name for path in checkpoints.iterdir()} == {BEFORE, NEWEST, END}
