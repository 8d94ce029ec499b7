"""Which checkpoint is the newest, which ones stay, and who looks at which file: both sides of each comparison.

The checkpoints are files with a manifest, without tensors.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from vjepa_scale.checkpoint import manifest as manifest_module
from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.manifest import (
    aside,
    describe_file,
    last_name,
    name_of,
    newest_first,
    newest_name,
    problems,
    read_manifest,
    refuse_older,
    size_of,
    write_manifest,
)
from vjepa_scale.core.errors import UserError


def save(folder: Path, step: int, *, files: int = 1, named: str | None = None, **extra: Any) -> Path:
    path = folder / (named or name_of(step))
    path.mkdir(parents=True)
    for number in range(files):
        (path / f"__{number}_0.distcp").write_bytes(b"tensors")
    described = {file.name: describe_file(file) for file in path.iterdir()}
    write_manifest(path, step=step, world_size=1, files=described, extra=extra)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    for other in ("step_0000006", "step_00000007.damaged", ".step_00000008.tmp", "step_000000009x"):
        (tmp_path / other).mkdir()
    assert [path.name for path in newest_first(tmp_path)] == ["step_100000000", "step_99999999", "step_00000005"]
    assert newest_name(tmp_path) == tmp_path / "step_100000000"
    store.retain(tmp_path, keep=1)
    assert [path.name for path in newest_first(tmp_path)] == ["step_100000000"]


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_as_many_as_asked_for_stay(keep: int, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    store.retain(tmp_path, keep=keep)
    assert names(tmp_path) == [name_of(step) for step in (1, 2, 3)][-keep:]


def test_an_end_of_a_phase_among_the_newest_takes_a_place(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, ends_phase=step in (1, 3))
    store.retain(tmp_path, keep=2)
    assert names(tmp_path) == [name_of(step) for step in (1, 3, 4)]


@pytest.mark.parametrize(
    ("found", "saved", "refused"),
    [
        (None, [], None),
        (2, [1, 2], None),
        (2, [2], None),
        (3, [1, 2], None),  # it was saved while the names were read
        (2, [1, 2, 3], "step_00000003"),
        (2, [3, 1, 2], "step_00000003"),
        (2, ["2.damaged", 2], None),
        (2, [1, 2, "3.damaged"], r"step_00000003\.damaged"),
        (None, [1], "step_00000001"),
        (99_999_999, [99_999_999, 100_000_000], "step_100000000"),
    ],
)
def test_an_older_checkpoint_does_not_stand_for_a_damaged_one(
    found: int | None, saved: list[int | str], refused: str | None, tmp_path: Path
) -> None:
    def path(step: int | str) -> Path:
        number, _, suffix = str(step).partition(".")
        return tmp_path / f"step_{int(number):08d}{suffix and '.' + suffix}"

    def refuse() -> None:
        refuse_older(None if found is None else path(found), [path(step) for step in saved], where=tmp_path)

    if refused is None:
        refuse()
        return
    with pytest.raises(UserError, match=f"its last checkpoint, {refused}, is damaged") as error:
        refuse()
    assert ("to use that one" in str(error.value)) == (found is not None)


def test_what_was_set_aside_counts_until_it_is_saved_again(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    assert manifest_module.set_aside(tmp_path / name_of(2)).name == "step_00000002.damaged"
    assert [path.name for path in aside(tmp_path)] == ["step_00000002.damaged"]
    with pytest.raises(UserError, match=r"step_00000002\.damaged, is damaged"):
        last_name(tmp_path)
    save(tmp_path, 2)
    assert aside(tmp_path) == []
    assert last_name(tmp_path) == tmp_path / name_of(2)
    assert aside(tmp_path / "absent") == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_each_file_is_looked_at_by_one_rank(world_size: int, tmp_path: Path) -> None:
    path = save(tmp_path, 1, files=5)
    for file in path.glob("*.distcp"):
        file.write_bytes(b"Tensors")  # the size is the same
    seen = [problems(path, rank=rank, world_size=world_size) for rank in range(world_size)]
    told = sorted(problem.partition(" ")[0] for found in seen for problem in found)
    assert told == [f"__{number}_0.distcp" for number in range(5)]
    assert max(map(len, seen)) == -(-5 // world_size)


@pytest.mark.parametrize("content", [b"tensor", b"tensors!", b""])
def test_a_file_of_another_size_is_seen_without_reading_it(content: bytes, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "__0_0.distcp").write_bytes(content)
    assert newest_name(tmp_path) == tmp_path / name_of(1)
    (problem,) = problems(tmp_path / name_of(2))
    assert problem == f"__0_0.distcp has {len(content)} bytes instead of 7"


@pytest.mark.parametrize("version", [0, 2])
def test_a_manifest_of_another_version_is_refused(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "VERSION", version)
        path = save(tmp_path, 1)
    assert json.loads((path / "manifest.json").read_text())["version"] == version
    with pytest.raises(UserError, match=f"version {version}; this program reads 1"):
        read_manifest(path)


def test_sizes_add_up(tmp_path: Path) -> None:
    assert size_of(save(tmp_path, 1, files=3)) == 21


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, "; and 1 more")])
def test_a_warning_names_four_files(count: int, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, files=6)
    for number in range(count):
        (path / f"__{number}_0.distcp").unlink()
    assert store.find_latest(tmp_path) == tmp_path / name_of(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; ".join(f"__{number}_0.distcp is missing" for number in range(4)) + more)
