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
from vjepa_scale.checkpoint.dcp import CheckpointReader
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


def test_the_thread_works_on_the_gpu_of_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current GPU is a thread's own. Told before the first file is begun."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    right = store.save

    def save(*args: object, **kwargs: object) -> Path:
        calls.append((threading.current_thread().name, "save"))
        return right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "save", save)
    saver = Saver(tmp_path, background=False, device=torch.device("cuda", 3))
    saver.save(1, {"w": torch.ones(3)}, {})
    assert saver.take(wait=True) is not None
    (thread, device), saved = calls
    assert device == torch.device("cuda", 3)
    assert saved == (thread, "save")
    assert thread != threading.current_thread().name


def _save_three_times(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    """The second of the same plan; the third with a tensor more, on rank 1's shards too. What each one's files hold."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    saver, held = Saver(Path(folder), background=True), []
    for step in (1, 2, 3):
        whole = {"w": step * torch.arange(70.0).view(7, 10), "plain": torch.full((3,), float(step))}
        if step == 3:
            whole["more"] = torch.arange(12.0).view(6, 2)
        saver.save(step, {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in whole.items()}, {})
        saved = saver.take(wait=True)
        assert saved is not None
        held.append({name: torch.zeros_like(x) for name, x in whole.items()})
        store.load(saved[1], held[-1])
    return held


@pytest.mark.distributed
def test_a_plan_that_is_kept_is_of_these_tensors(tmp_path: Path) -> None:
    for held in run_processes(_save_three_times, 2, str(tmp_path)):
        for step, found in enumerate(held, start=1):
            assert torch.equal(found["w"], step * torch.arange(70.0).view(7, 10))
            assert torch.equal(found["plain"], torch.full((3,), float(step)))
        assert torch.equal(held[2]["more"], torch.arange(12.0).view(6, 2))


def test_plans_of_two_savers_are_their_own(tmp_path: Path) -> None:
    for name, shape in (("one", (4, 5)), ("two", (2, 3))):
        saver = Saver(tmp_path / name, background=True)
        for step in (1, 2):
            saver.save(step, {"w": torch.full(shape, float(step))}, {})
            _, folder = saver.take(wait=True)
            held = {"w": torch.zeros(shape)}
            store.load(folder, held)
            assert torch.equal(held["w"], torch.full(shape, float(step)))


@pytest.mark.fault(
    "disks",
    "a checkpoint cannot be written, in the background or not",
    "an error that may pass, so another attempt follows; the checkpoint before stays",
)
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
