"""Sources that are gone, new or changed before a data set is finished: it goes on with what is known of the others."""

import shutil
from pathlib import Path

import pytest

from tests.shards.test_shards_inputs import samples
from tests.shared import contents
from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.shards import probe as probe_module
from vjepa_scale.shards import work as work_module
from vjepa_scale.shards import write as write_module
from vjepa_scale.shards.make import Part, Settings, Work, begin, make_shards, plan, probe, write

SETTINGS = Settings(seed=3, shard_records=2)
WHOLE = Part(0, 1)


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six videos in two classes, and a file that is none; two sources to a chunk."""
    monkeypatch.setattr(work_module, "SHARES", 3)
    for n in range(6):
        path = tmp_path / f"videos/class {n % 2}/{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(6 + n, rate=10))
    (tmp_path / "videos/empty.mp4").write_bytes(b"")
    return tmp_path / "videos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were probed, in this process."""
    paths = list[str]()
    usual = probe_module._probe_source

    def told(root: str, source: probe_module.Source, settings: Settings) -> probe_module.Verdict:
        paths.append(source.path)
        return usual(root, source, settings)

    monkeypatch.setattr(probe_module, "_probe_source", told)
    in_turn = lambda function, items, **_: ((n, function(item)) for n, item in enumerate(items))  # noqa: E731
    monkeypatch.setattr(probe_module, "map_in_workers", in_turn)
    return paths


def begun(videos: Path, out: Path, settings: Settings = SETTINGS) -> Work:
    work = begin(videos, out, settings)
    assert work is not None
    return work


def as_from_nothing(videos: Path, out: Path, settings: Settings = SETTINGS) -> None:
    """``out``, finished, has the bytes of a data set that was made at once, and nothing else."""
    make_shards(videos, out, settings, workers=1, progress=quiet)
    make_shards(videos, out.with_name("at once"), settings, workers=1, progress=quiet)
    assert contents(out) == contents(out.with_name("at once"))
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("until", ["probe amid", "plan", "write"])
def test_gone_new_and_changed_files(until: str, videos: Path, tmp_path: Path, decoded: list[str]) -> None:
    work = begun(videos, tmp_path / "out")
    if until == "probe amid":
        killed = iter([None] * 4)
        with pytest.raises(StopIteration):
            probe(work, WHOLE, workers=1, progress=lambda *_: next(killed))
    else:
        probe(work, WHOLE, workers=1, progress=quiet)
        plan(work)
    if until == "write":
        write(work, WHOLE, workers=1, progress=quiet)
    known = set(decoded)
    (videos / "class 1/1.mp4").unlink()
    shutil.copyfile(videos / "class 0/0.mp4", videos / "class 0/another copy.mp4")
    (videos / "class 0/2.mp4").write_bytes(encoded(30, rate=10))
    decoded.clear()
    begun(videos, tmp_path / "out")
    probe(begun(videos, tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    assert set(decoded) >= {"class 0/2.mp4", "class 0/another copy.mp4"}
    assert not set(decoded) & (known - {"class 0/2.mp4"})
    as_from_nothing(videos, tmp_path / "out")


def test_a_file_that_changes_while_shards_are_written(videos: Path, tmp_path: Path, decoded: list[str]) -> None:
    """Of the same length: the listing is the same."""
    work = begun(videos, tmp_path / "out")
    probe(work, WHOLE, workers=1, progress=quiet)
    plan(work)
    data = encoded(6, rate=10)
    (videos / "class 0/0.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"0\.mp4: the file has changed.*run the command again"):
        write(work, WHOLE, workers=1, progress=quiet)
    decoded.clear()
    probe(begun(videos, tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    assert decoded == ["class 0/0.mp4"]
    as_from_nothing(videos, tmp_path / "out")


def test_a_list_that_lost_a_row_or_has_another_label(videos: Path, tmp_path: Path, decoded: list[str]) -> None:
    (videos / "list.txt").write_text("".join(f'"class {n % 2}/{n}.mp4" {n % 2}\n' for n in range(6)))
    probe(begun(videos / "list.txt", tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    (videos / "other.txt").write_text("".join(f'"class {n % 2}/{n}.mp4" {n % 2 or 5}\n' for n in (5, 3, 1, 2)))
    decoded.clear()
    probe(begun(videos / "other.txt", tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    assert decoded == ["class 0/2.mp4"]
    as_from_nothing(videos / "other.txt", tmp_path / "out")
    assert {known["label"] for known, _ in samples(tmp_path / "out")} == {"1", "5"}


def test_sources_of_which_most_are_others_are_refused(videos: Path, tmp_path: Path) -> None:
    work = begun(videos, tmp_path / "out")
    probe(work, WHOLE, workers=1, progress=quiet)
    before = contents(tmp_path / "out")
    (tmp_path / "others/class 0").mkdir(parents=True)
    shutil.copyfile(videos / "class 0/0.mp4", tmp_path / "others/class 0/0.mp4")
    with pytest.raises(UserError, match="other videos, seed or shard size"):
        begin(tmp_path / "others", tmp_path / "out", SETTINGS)
    (videos / "class 1/1.mp4").unlink()
    with pytest.raises(UserError, match="other videos, seed or shard size"):
        begin(videos, tmp_path / "out", Settings(seed=4, shard_records=2))
    (tmp_path / "out/.slurm").mkdir()  # jobs may be at work on the sources as they were
    with pytest.raises(UserError, match="other videos, seed or shard size"):
        begin(videos, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == before


def test_a_process_of_the_old_listing_changes_nothing(videos: Path, tmp_path: Path) -> None:
    old = begun(videos, tmp_path / "out")
    probe(old, WHOLE, workers=1, progress=quiet)
    plan(old)
    (videos / "empty.mp4").unlink()
    new = begun(videos, tmp_path / "out")
    probe(new, WHOLE, workers=1, progress=quiet)
    plan(new)
    before = contents(tmp_path / "out")
    asked = probe_module._Unknown(old, range(1))
    asked._asked[0] = probe_module._Begun(0, 1, tmp_path / "out/.work/probed/000000.late.part"), 0, old.sources(0)[0]
    for late in (lambda: asked.tell(0, probe_module.Verdict([], [])), lambda: write_module._write_shard(old, 0)):
        with pytest.raises(UserError, match="listed anew"):
            late()
    assert contents(tmp_path / "out") == before
    as_from_nothing(videos, tmp_path / "out")


def test_killed_while_the_old_listing_was_removed(videos: Path, tmp_path: Path) -> None:
    probe(begun(videos, tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    shutil.copytree(tmp_path / "out/.work/sources", tmp_path / "out/.work.before/sources")
    (videos / "empty.mp4").unlink()
    as_from_nothing(videos, tmp_path / "out")


def test_killed_between_two_names(videos: Path, tmp_path: Path, decoded: list[str]) -> None:
    probe(begun(videos, tmp_path / "out"), WHOLE, workers=1, progress=quiet)
    (tmp_path / "out/.work").rename(tmp_path / "out/.work.before")
    (videos / "empty.mp4").unlink()
    decoded.clear()
    as_from_nothing(videos, tmp_path / "out")
    assert len(decoded) == 6  # of the one that is made at once
