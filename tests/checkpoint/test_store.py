"""A checkpoint is whole or named as damaged: every file, every kind of damage, kills at any moment."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.processes import killed_when, run_processes
from vjepa_scale.checkpoint import store
from vjepa_scale.core import files
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FILES = ("__0_0.distcp", "__1_0.distcp", "__0.sha256", "__1.sha256", ".metadata", "manifest.json")


def state(value: float) -> dict[str, Tensor]:
    return {"a.weight": torch.full((30, 20), value), "b.bias": torch.full((7,), value, dtype=torch.float64)}


def save(folder: Path, step: int, **manifest: object) -> Path:
    return store.save(folder, step, state(float(step)), manifest)


def loaded(checkpoint: Path) -> dict[str, Tensor]:
    tensors = state(-1.0)
    store.load(checkpoint, tensors)
    return tensors


def holds(checkpoint: Path, value: float) -> bool:
    return all(torch.equal(tensor, state(value)[name]) for name, tensor in loaded(checkpoint).items())


def _save_two(ranks: Ranks, folder: str) -> None:
    for step in (1, 2):
        save(Path(folder), step)


@pytest.fixture(scope="module")
def two_saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "checkpoints"
    run_processes(_save_two, 2, str(folder))
    return folder


@pytest.fixture
def folder(two_saved_by_two: Path, tmp_path: Path) -> Path:
    """Steps 1 and 2, saved by two ranks: a copy to be damaged."""
    return Path(shutil.copytree(two_saved_by_two, tmp_path / "checkpoints"))


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# -- saving ------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_checkpoint_is_these_files_and_nothing_is_left_beside_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]
    assert sorted(path.name for path in (folder / "step_00000002").iterdir()) == sorted(FILES)
    assert (folder / "step_00000002/__1_0.distcp").stat().st_size > 0  # else damaging it would test nothing
    manifest = store.read_manifest(folder / "step_00000002")
    assert (manifest["step"], manifest["world_size"]) == (2, 2)
    assert manifest["libraries"]["torch"] == torch.__version__


def test_what_the_caller_adds_to_the_manifest_comes_back(tmp_path: Path) -> None:
    extra = {"stage": "pretrain", "drawn": {"a": 3}, "lr": 0.1, "text": "ü×"}
    assert store.read_manifest(save(tmp_path, 5, **extra)).items() >= extra.items()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    store.save(tmp_path, 3, state(8.0), {})
    assert holds(tmp_path / "step_00000003", 8.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


# -- damage ------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "checkpoints",
    "any file of a checkpoint is flipped in a byte, truncated or missing",
    "the warning names checkpoint and file; loading it is refused",
)
@pytest.mark.distributed
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["one byte flipped", "truncated", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_checkpoint_used(
    folder: Path, name: str, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "step_00000002" / name)  # type: ignore[operator]
    latest = store.find_latest(folder)
    assert latest == folder / "step_00000001"
    assert holds(latest, 1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder}/step_00000002 is damaged" in line
    assert name in line
    with pytest.raises(UserError, match="step_00000002"):
        loaded(folder / "step_00000002")


@pytest.mark.fault(
    "checkpoints",
    "any one byte of a manifest is flipped",
    "it is seen",
)
def test_any_flipped_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1, text="ü") / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(UserError, match=r"manifest\.json"):
            store.read_manifest(path.parent)
        path.write_bytes(whole)
    store.read_manifest(path.parent)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000009")
    with pytest.raises(UserError, match="none of 1"):
        store.find_latest(tmp_path)


@pytest.mark.fault(
    "checkpoints",
    "no checkpoint is good",
    "an error; a run never starts from the beginning by itself",
)
def test_no_checkpoints_is_none_but_none_good_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.find_latest(tmp_path / "absent") is None
    assert store.find_latest(tmp_path) is None
    for step in (1, 2):
        flip(save(tmp_path, step) / ".metadata")
    with pytest.raises(UserError, match="none of 2 checkpoints is good"):
        store.find_latest(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 2


def _latest_or_error(ranks: Ranks, folder: str) -> str:
    try:
        return str(store.find_latest(Path(folder)))
    except UserError as error:
        return f"error: {error}"


@pytest.mark.distributed
def test_all_ranks_come_to_the_same_verdict(folder: Path) -> None:
    flip(folder / "step_00000002/__1_0.distcp")
    assert run_processes(_latest_or_error, 3, str(folder)) == [f"{folder}/step_00000001"] * 3
    flip(folder / "step_00000001/__0_0.distcp")
    verdicts = run_processes(_latest_or_error, 3, str(folder))
    assert len(set(verdicts)) == 1
    assert verdicts[0].startswith(f"error: {folder}: none of 2")


def test_newest_name_looks_at_manifests_and_sizes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.newest_name(tmp_path / "absent") is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    truncate(tmp_path / "step_00000003/.metadata")
    flip(tmp_path / "step_00000002/.metadata")
    assert store.newest_name(tmp_path) == tmp_path / "step_00000002"
    assert capsys.readouterr().err == ""


# -- loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.bias": torch.zeros(7)}, "b.bias is float64 [7], not float32 [7]"),
        ({"a.weight": torch.zeros(20, 30)}, "a.weight is float32 [30, 20], not float32 [20, 30]"),
        ({"c": torch.zeros(1)}, "2 tensors match, 1 missing, 0 unexpected, 0 of another shape or dtype: c is missing"),
        ({"b.bias": None}, "1 tensors match, 0 missing, 1 unexpected, 0 of another shape or dtype: b.bias is unexp"),
    ],
    ids=["dtype", "shape", "missing", "unexpected"],
)
def test_what_does_not_match_is_refused_before_anything_is_loaded(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    checkpoint = save(tmp_path, 1)
    tensors = {name: tensor for name, tensor in (state(-1.0) | change).items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(UserError) as error:
        store.load(checkpoint, tensors)
    assert message in str(error.value)
    assert str(checkpoint) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_only_allowed_names_may_be_left_out(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    tensors = {"a.weight": torch.zeros(30, 20)}
    with pytest.raises(UserError, match=r"b\.bias is unexpected"):
        store.load(checkpoint, tensors, allow_unexpected=("optimizer.",))
    report = store.load(checkpoint, tensors, allow_unexpected=("b.",))
    assert report == store.LoadReport(1, (), ("b.bias",))
    assert str(report) == "1 tensors matched, 0 missing, 1 left out"
    assert float(tensors["a.weight"].sum()) == 600


@pytest.mark.fault(
    "hostile",
    "a checkpoint's index (a pickle) that would run code",
    "refused; the code does not run",
)
def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/pwned'\ntR.")
    with pytest.raises(Exception, match=r"posix\.system|os\.system"):
        store.load(checkpoint, state(0.0), check=False)
    assert not (tmp_path / "pwned").exists()


def test_an_index_that_python_3_11_2_wrote_is_read() -> None:
    """Python 3.11.0 to 3.11.3 pickle an enum's member as getattr(class, name): Debian 12's python3 is a 3.11.2.

    The folder is what ``save(Path("tests/checkpoint/python_3_11_2"), 3)`` wrote under that Python and PyTorch 2.13.
    """
    checkpoint = Path(__file__).parent / "python_3_11_2/step_00000003"
    assert b"builtins" in (checkpoint / ".metadata").read_bytes()
    assert holds(checkpoint, 3.0)


@pytest.mark.fault(
    "hostile",
    "a checkpoint's index that reaches for other objects through `getattr`",
    "refused",
)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.distributed.checkpoint.metadata Metadata", "__init__"),
        ("torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING", "__class__"),
        ("torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING", "mro"),
        ("torch.serialization _get_layout", "__globals__"),
        ("torch Size", "__class__"),
        ("builtins getattr", "__globals__"),
    ],
)
def test_getattr_in_an_index_gives_members_of_its_enum_only(tmp_path: Path, owner: str, name: str) -> None:
    checkpoint = save(tmp_path, 1)
    get = f"cbuiltins\ngetattr\n(c{owner}\n".replace(" ", "\n") + f"V{name}\ntR."
    (checkpoint / ".metadata").write_bytes(get.encode())
    with pytest.raises(UserError, match=rf"getattr\(.*'{name}'\) has no place in the index"):
        store.load(checkpoint, state(0.0), check=False)


# -- retention and leftovers ---------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_the_ends_of_phases(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, ends_phase=step == 2)
    (tmp_path / "step_00000003/manifest.json").write_text("{}")
    store.retain(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (2, 3, 6, 7)]


def _save_and_hang(ranks: Ranks, folder: str, function: str) -> None:
    """Save step 2, but stop for ever inside ``function``; then say so with a file."""
    module = files if function == "_rename" else store
    original = getattr(module, function)

    def hang(*args: object, **kwargs: object) -> None:
        if function == "describe_file":
            original(*args, **kwargs)
        Path(folder, "..", "inside").resolve().touch()
        while True:
            time.sleep(1)

    setattr(module, function, hang)
    save(Path(folder), 2)


@pytest.mark.fault(
    "processes",
    "a rank is killed inside a save: while it writes, before the manifest, at the rename",
    "what is unfinished is removed with a warning; the run resumes from the checkpoint before",
)
@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["describe_file", "write_manifest", "_rename"])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "replacing"])
def test_kill_9_inside_a_save(tmp_path: Path, moment: str, again: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    if again:
        store.save(folder, 2, state(9.0), {})
    killed_when((tmp_path / "inside").exists, _save_and_hang, 2, str(folder), moment)
    assert (folder / ".step_00000002.tmp").exists()

    store.remove_unfinished(folder)
    assert ".step_00000002.tmp is an unfinished checkpoint" in capsys.readouterr().err
    expected = [(1, 1.0), (2, 9.0)] if again else [(1, 1.0)]
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step, _ in expected]
    latest = store.find_latest(folder)
    assert latest == folder / f"step_{expected[-1][0]:08d}"
    assert holds(latest, expected[-1][1])
    assert holds(save(folder, 2), 2.0)


def test_a_checkpoint_that_cannot_be_replaced_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on for a while after a save that fails, and another may read what is there."""
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == ".step_00000001.tmp":
            raise OSError(5, "Input/output error", str(target))
        rename(source, target)

    save(tmp_path, 1)
    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="Input/output error"):
        store.save(tmp_path, 1, state(9.0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert holds(tmp_path / "step_00000001", 1.0)


def _save_for_ever(ranks: Ranks, folder: str, first: int) -> None:
    for step in range(first, sys.maxsize):
        save(Path(folder), step)


@pytest.mark.fault(
    "processes",
    "ranks that save all the time are killed at any moment",
    "the newest checkpoint is whole",
)
@pytest.mark.distributed
def test_kill_9_at_any_time(tmp_path: Path) -> None:
    first = 1
    for round_number in range(4):
        wanted = first + round_number  # the more rounds, the later in the life of the writer

        def come_far(wanted: int = wanted) -> bool:
            return (tmp_path / f".step_{wanted:08d}.tmp/__0_0.distcp").exists()

        killed_when(come_far, _save_for_ever, 2, str(tmp_path), first)
        store.remove_unfinished(tmp_path)
        latest = store.find_latest(tmp_path)
        if latest is None:
            assert wanted == 1
            continue
        step = store.read_manifest(latest)["step"]
        assert step >= wanted - 1
        assert holds(latest, float(step))
        first = step + 1
