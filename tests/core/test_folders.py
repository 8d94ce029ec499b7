"""Folders are whole or absent, whenever the process that writes them ends."""

import os
from pathlib import Path

import pytest

from vjepa_scale.core import files
from vjepa_scale.core.files import (
    move_dir,
    publish_dir,
    publish_first,
    remove_dir,
    replace_dir,
    replaced_folder,
    restore_dir,
)


class Killed(BaseException):
    """Stands for a kill: nothing after it is done."""


def made(folder: Path, text: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "part").write_text(text)
    return folder


def held(folder: Path) -> dict[str, str]:
    """Folder → what it holds, of all in a folder."""
    return {path.name: (path / "deep" / "part").read_text() for path in folder.iterdir()}


def test_a_finished_folder_gets_its_name(tmp_path: Path) -> None:
    publish_dir(made(tmp_path / ".a.tmp", "new"), tmp_path / "a")
    assert held(tmp_path) == {"a": "new"}
    with pytest.raises(OSError, match="not empty"):
        publish_dir(made(tmp_path / ".a.tmp", "newer"), tmp_path / "a")
    assert held(tmp_path) == {"a": "new", ".a.tmp": "newer"}


def test_the_first_of_several_gives_the_name(tmp_path: Path) -> None:
    for text in ("first", "second"):
        publish_first(made(tmp_path / ".a.tmp", text), tmp_path / "a")
    assert held(tmp_path) == {"a": "first"}
    with pytest.raises(FileNotFoundError):
        publish_first(tmp_path / "absent", tmp_path / "b")


@pytest.mark.parametrize("left", [False, True], ids=["", "an earlier kill left its old folder"])
def test_a_folder_is_replaced(tmp_path: Path, left: bool) -> None:
    made(tmp_path / "a", "old")
    if left:
        made(tmp_path / ".a.replaced", "older")
    replace_dir(made(tmp_path / ".a.tmp", "new"), tmp_path / "a")
    assert held(tmp_path) == {"a": "new"}
    replace_dir(made(tmp_path / ".b.tmp", "there was none"), tmp_path / "b")
    assert held(tmp_path) == {"a": "new", "b": "there was none"}


def test_where_it_cannot_be_replaced_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no room")

    made(tmp_path / "a", "old")
    for step in ("flush_dir", "_rename"):
        with monkeypatch.context() as patch:
            patch.setattr(files, step, fails)
            with pytest.raises(OSError, match="no room"), replaced_folder(tmp_path / "a") as folder:
                made(folder, "new")
        assert held(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("step", range(6))
def test_a_kill_at_any_step_leaves_one_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """step: how many renames and removals are done before it."""
    left = iter(range(step))

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args: object, **kwargs: object) -> object:
            if next(left, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return call

    made(tmp_path / "a", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(files.shutil, "rmtree", counted(files.shutil.rmtree))
        try:
            with replaced_folder(tmp_path / "a") as folder:
                made(folder, "new")
            survived = True
        except Killed:
            survived = False
    restore_dir(tmp_path / "a")
    assert held(tmp_path)["a"] in ({"new"} if survived else {"old", "new"})
    with replaced_folder(tmp_path / "a") as folder:
        made(folder, "again")
    assert held(tmp_path) == {"a": "again"}


def test_a_folder_moves_and_goes(tmp_path: Path) -> None:
    made(tmp_path / "b", "in the way")
    move_dir(made(tmp_path / "a", "moves"), tmp_path / "b")
    assert held(tmp_path) == {"b": "moves"}
    made(tmp_path / ".b.removing", "a kill left it")
    remove_dir(tmp_path / "b")
    assert held(tmp_path) == {}
