"""Saves in the background hold what was there when they began, come one at a time, and fail aloud."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.processes import run_processes
from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.reader import CheckpointReader
from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.core.errors import PassingError, UserError
from vjepa_scale.core.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _train_on_while_saving(ranks: Ranks, folder: str) -> tuple[list[int], Tensor]:
    """Two saves of a sharded tensor that changes right after each; what the first one's file holds at last."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    weight = distribute_tensor(torch.arange(70.0).view(7, 10), mesh, [Shard(0)])
    saver = Saver(Path(folder), background=True)
    taken = []
    for step in (1, 2):
        saver.save(step, {"w": weight, "plain": torch.full((3,), float(step))}, {})
        with torch.no_grad():
            weight += 100
        saved = saver.take(wait=True)
        assert saved is not None
        taken.append(saved[0])
    held = torch.zeros(7, 10)
    store.load(Path(folder) / "step_00000001", {"w": held, "plain": torch.zeros(3)})
    assert isinstance(weight, DTensor)
    assert weight.full_tensor()[0, 0] == 200
    return taken, held


@pytest.mark.distributed
def test_what_changes_after_a_save_began_is_not_in_it(tmp_path: Path) -> None:
    for taken, held in run_processes(_train_on_while_saving, 2, str(tmp_path)):
        assert taken == [1, 2]
        assert torch.equal(held, torch.arange(70.0).view(7, 10))
    held = torch.zeros(7, 10)
    store.load(tmp_path / "step_00000002", {"w": held, "plain": torch.zeros(3)})
    assert torch.equal(held, torch.arange(70.0).view(7, 10) + 100)


def test_what_is_a_copy_already_is_not_copied_again(tmp_path: Path) -> None:
    saver = Saver(tmp_path, background=True)
    saver.save(1, {"w": torch.full((64, 32), 3.0)}, {}, are_copies=True)
    assert saver._copies == {}
    _, folder = saver.take(wait=True)
    read = {"w": torch.zeros(64, 32)}
    store.load(folder, read)
    assert torch.equal(read["w"], torch.full((64, 32), 3.0))


def test_training_does_not_wait_for_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    right = store.save

    def slow(*args: object, **kwargs: object) -> Path:
        assert may_write.wait(60)
        return right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "save", slow)
    saver = Saver(tmp_path, background=True)
    saver.save(1, {"w": torch.ones(3)}, {})
    assert saver.take(wait=False) is None
    with pytest.raises(AssertionError, match="one save in flight"):
        saver.save(2, {"w": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())
    may_write.set()
    assert saver.take(wait=True) == (1, tmp_path / "step_00000001")
    assert saver.take(wait=True) is None


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_one_before_stays(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, background=background)
    saver.save(1, {"w": torch.ones(3)}, {})
    assert saver.take(wait=True) is not None
    (folder / ".step_00000002.tmp").write_text("in the way")  # where a folder is to be made
    saver.save(2, {"w": torch.ones(3)}, {})
    with pytest.raises(PassingError, match="checkpoint of step 2 cannot be written"):
        saver.take(wait=True)
    assert store.find_latest(folder) == folder / "step_00000001"


def test_a_chunk_is_verified_when_it_is_read(tmp_path: Path) -> None:
    """Damage that comes after the files were checked, to one tensor: it is named, and the other one loads."""
    checkpoint = store.save(tmp_path, 1, {"a": torch.ones(50), "b": torch.ones(60)}, {})
    index = CheckpointReader(checkpoint).index.storage_data
    assert index is not None
    (place,) = (stored for key, stored in index.items() if key.fqn == "a")
    path = checkpoint / place.relative_path
    data = bytearray(path.read_bytes())
    at = data.index(torch.ones(50).numpy().tobytes(), place.offset)
    assert at < place.offset + place.length
    data[at + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"__0_0\.distcp.*are not those that were written"):
        store.load(checkpoint, {"a": torch.zeros(50), "b": torch.zeros(60)}, check=False)
    held = torch.zeros(60)
    store.load(checkpoint, {"b": held}, allow_unexpected=("a",), check=False)
    assert torch.equal(held, torch.ones(60))
