"""Sources that are gone, new or changed before a data set is finished: it goes on with what is known of the others."""

import json
import shutil
from hashlib import sha256
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
    with pytest.raises(UserError, match="OUT holds another data set"):
        begin(tmp_path / "others", tmp_path / "out", SETTINGS)
    (videos / "class 1/1.mp4").unlink()
    with pytest.raises(UserError, match=r"settings differ: seed 3, now 4; 7 sources, now 6; class 1/1\.mp4 is gone"):
        begin(videos, tmp_path / "out", Settings(seed=4, shard_records=2))
    (tmp_path / "out/.slurm").mkdir()  # jobs may be at work on the sources as they were
    with pytest.raises(UserError, match="OUT holds another data set"):
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


# -- a finished set ---------------------------------------------------------------------------------


def refused(videos: Path, out: Path, settings: Settings = SETTINGS) -> str:
    """What is said of a finished data set that is made again."""
    with pytest.raises(UserError) as raised:
        begin(videos, out, settings)
    return str(raised.value)


def test_it_is_said_what_differs_from_a_finished_set(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_shards(videos, out, SETTINGS, workers=1, progress=quiet)
    begin_of = f"{out / 'manifest.json'}: OUT holds another data set: "
    fix = " (give another folder, or remove this one)"
    assert refused(videos, out, Settings(seed=3, shard_records=4, images=True)) == (
        f"{begin_of}settings differ: images None, now True; shard_records 2, now 4{fix}"
    )
    (videos / "class 1/5.mp4").rename(tmp_path / "5.mp4")
    assert refused(videos, out) == f"{begin_of}7 sources, now 6; class 1/5.mp4 is gone{fix}"
    shutil.copyfile(tmp_path / "5.mp4", videos / "class 0/new.mp4")
    assert refused(videos, out) == f"{begin_of}class 0/new.mp4 is new{fix}"
    (videos / "class 0/new.mp4").unlink()
    (videos / "class 1/5.mp4").write_bytes((tmp_path / "5.mp4").read_bytes() + b"x")
    size = (tmp_path / "5.mp4").stat().st_size
    assert refused(videos, out) == f"{begin_of}class 1/5.mp4 has {size + 1} bytes, before {size}{fix}"


def test_another_label_in_a_list_is_named(videos: Path, tmp_path: Path) -> None:
    (videos / "list.csv").write_text("path,label\nclass 0/0.mp4,a\nclass 1/1.mp4,b\n")
    make_shards(videos / "list.csv", tmp_path / "out", SETTINGS, workers=1, progress=quiet)
    (videos / "list.csv").write_text("path,label\nclass 0/0.mp4,a\nclass 1/1.mp4,c\n")
    assert "class 1/1.mp4 has label 'c', before 'b'" in refused(videos / "list.csv", tmp_path / "out")


LEFT = (".DS_Store", "class 0/Thumbs.db", "class 0/._0.mp4", "class 1/desktop.ini", "__MACOSX/0.mp4", "@eaDir/0.jpg")


def test_what_file_managers_leave_is_no_source(videos: Path, tmp_path: Path) -> None:
    make_shards(videos, tmp_path / "out", SETTINGS, workers=1, progress=quiet)
    for name in LEFT:
        (videos / name).parent.mkdir(exist_ok=True)
        (videos / name).write_bytes(b"x")
    assert begin(videos, tmp_path / "out", SETTINGS) is None
    assert begun(videos, tmp_path / "other").files == 7


def test_a_set_for_which_an_earlier_version_listed_them_is_known(videos: Path, tmp_path: Path) -> None:
    """Earlier versions listed every file, and rejected these."""
    make_shards(videos, tmp_path / "out", SETTINGS, workers=1, progress=quiet)
    (videos / ".DS_Store").write_bytes(b"x")
    names = sorted(str(path.relative_to(videos)) for path in videos.rglob("*") if path.is_file())
    digest = sha256("".join(f"{name!r} {(videos / name).stat().st_size}\n" for name in names).encode())
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["source"] |= {"files": 8, "listing": digest.hexdigest()}
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert begin(videos, tmp_path / "out", SETTINGS) is None
