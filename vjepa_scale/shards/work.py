"""The state of an unfinished data set: the request, and the finished work.

    OUT/.work/source.json            the request; written after sources/
    OUT/.work/sources/000000.jsonl   the sources in their order, one file per chunk
    OUT/.work/probed/000000.jsonl    the verdicts on these (probe.py)
    OUT/.work/plan/                  the position of each record (plan.py)
    OUT/.work/written/               a receipt per finished shard (write.py)

Where the sources have changed, they are listed again, and verdicts on unchanged ones are kept (records.py).

Any number of processes may work on it at once, on any machines that share the folder. There are no locks: a file
appears complete under its name or not at all, its bytes do not depend on the process, and the first writer wins. The
unit of work of one process is a chunk of the sources, or a shard.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import fsync_path, move_dir, publish_first, read_json, restore_dir, write_json, writing
from vjepa_scale.core.installed import as_called
from vjepa_scale.data.manifest import MANIFEST, REJECTED
from vjepa_scale.shards.droid import LOG
from vjepa_scale.shards.records import KnownVerdicts, what_differs
from vjepa_scale.shards.sources import Source, find_sources, folder_source, of_side
from vjepa_scale.shards.trajectories import find_trajectories

WORK = ".work"
_BEFORE = ".work.before"  # the work of an earlier listing, while the new one replaces it
_CHANGED = "changed"  # in the work: a source has changed since it was probed
JOBS = ".slurm"  # launch/shard_jobs.py: outside the work folder, since jobs write logs until after it is removed
DIGESTS = ".digests_of_train.npy"  # in the folder of a split: digests of train, which val must not contain (plan.py)
CHUNK = 1000  # sources per chunk of a long listing
SHORT = 64_000  # sources: a shorter listing is held in memory until its length is known
SHARES = 256  # most chunks of a short listing: enough that each of many jobs gets some
VERSION = 1

# Called with (activity, amount done, total amount).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """Settings of a data set.

    shard_records: clips per shard; or else shard_mb: a shard is full at this many megabytes of video
    images:        images are records too, as static clips
    segment_s:     longer videos are cut into clips of up to this many seconds (see remux.py)
    min_s:         shorter clips are rejected
    decode_timeout_s: a source is rejected when its decoder returns no new frame for this time
    trajectories:  sources are robot trajectories in this layout (trajectories.LAYOUTS); view: the camera
    retime:        videos with one frame per step get the log's times
    transcode:     videos are transcoded (transcode.py). short_side: maximum in pixels; None keeps the size
    fps:           rate of the transcode, a fraction; None for the source's
    side:          side of a split, train or val (sources.of_side); None: all sources
    val, val_by:   the fraction of val, and the groups that stay on one side: source, folder, or a list's column
    """

    seed: int = 0
    shard_records: int | None = None
    shard_mb: int = 256
    images: bool = False
    segment_s: float | None = None
    min_s: float = 0.0
    decode_timeout_s: float = 60.0
    trajectories: str | None = None
    view: str = "left"
    retime: bool = False
    transcode: bool = False
    short_side: int | None = None
    fps: str | None = None
    side: str | None = None
    val: float = 0.0
    val_by: str = "source"


@dataclass(frozen=True)
class Part:
    """The share of one of several jobs: chunks and shards index, index + of, …"""

    index: int
    of: int


@dataclass(frozen=True)
class Work:
    """An unfinished data set.

    videos: the folder or list; root: the folder that sources' paths are relative to; source: identity of the data set
    files: number of sources; chunk: sources per file
    made_out: OUT was created for this work, and is removed with it if no source is usable
    listed: identifies this listing
    """

    out: Path
    videos: Path
    root: Path
    settings: Settings
    source: dict[str, Any]
    files: int
    chunk: int
    made_out: bool
    listed: str | None = None

    @classmethod
    def open(cls, out: Path) -> "Work":
        """Opens work that ``begin`` has begun, in this process or another. Raises UserError where there is none."""
        path = out / WORK / "source.json"
        if not path.exists():
            raise UserError(
                "no shards were begun here", where=out, fix=as_called("tools/make_shards.py VIDEOS OUT begins them")
            )
        tree = read_json(path)
        if tree.get("version") != VERSION:
            raise UserError(
                "begun by another version of make_shards", where=path, fix="remove this folder, or give another"
            )
        settings = Settings(**tree["settings"])
        paths = Path(tree["videos"]), Path(tree["root"])
        known = tree["source"], tree["files"], tree["chunk"], tree["made_out"], tree.get("listed")
        return cls(out, *paths, settings, *known)

    @property
    def folder(self) -> Path:
        return self.out / WORK

    @property
    def chunks(self) -> int:
        return -(-self.files // self.chunk)

    def files_in(self, chunk: int) -> int:
        """Returns the number of sources in one chunk."""
        return min(self.chunk, self.files - chunk * self.chunk)

    def sources(self, chunk: int) -> list[Source]:
        """Returns the sources of one chunk."""
        with open(_chunk(self.folder, chunk), "rb") as file:
            return [Source(**json.loads(line)) for line in file]

    def check(self) -> None:
        """Raises UserError where another process has listed the sources again, so that this one uses an old listing."""
        if Work.open(self.out).listed != self.listed:
            raise UserError("the sources were listed anew meanwhile", where=self.out, fix="run the same command again")

    def source_changed(self) -> None:
        """Makes the next run list the sources again."""
        (self.folder / _CHANGED).touch()

    def remove(self) -> None:
        """Removes the work, and OUT where it was created for this and is otherwise empty."""
        tidy(self.out)
        if self.made_out:
            with suppress(OSError):
                self.out.rmdir()


def begin(videos: Path, out: Path, settings: Settings, *, relist: bool | None = None) -> Work | None:
    """Lists the sources, or opens the work that was begun; returns None where the data set is finished.

    videos: a folder, or a list (see sources.py)
    relist: whether changed sources may be listed again; default: unless jobs of a cluster may be running
    Raises UserError, before anything is written, where there are no sources or where ``out`` holds something else.
    """
    if relist is None:
        relist = not (out / JOBS).exists()
    try:
        return _begin(videos, out, settings, relist)
    except (UserError, FileNotFoundError):
        if not (out / MANIFEST).exists():
            raise
        # Another process may have finished meanwhile, and removed the work with this process's listing.
        return _begin(videos, out, settings, relist)


def _begin(videos: Path, out: Path, settings: Settings, relist: bool) -> Work | None:
    restore_dir(out / WORK, old=out / _BEFORE)
    listing = _listing(videos, out, settings)
    if not _held(out):
        _list_sources(listing, videos, out, settings)
        return replace(Work.open(out), videos=videos, root=listing.root)
    for _ in listing:
        pass
    asked = listing.describe(settings)
    if (out / MANIFEST).exists():
        _same(out / MANIFEST, asked, videos, out, settings)
        tidy(out)
        return None
    work = Work.open(out)
    other = {name for name in asked.keys() | work.source.keys() if asked.get(name) != work.source.get(name)}
    if relist and other <= {"files", "listing"} and (other or (work.folder / _CHANGED).exists()):
        _relist(_listing(videos, out, settings), work, videos, settings)
        work = Work.open(out)
    else:
        _same(work.folder / "source.json", asked, videos, out, settings)
    return replace(work, videos=videos, root=listing.root)


def check_sides(videos: Path, out: Path, settings: Sequence[Settings]) -> None:
    """Raises UserError where ``out`` cannot hold the data sets of a split, or where one of them has no source."""
    names = {asked.side for asked in settings}
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    held = sorted(p.name for p in out.iterdir() if p.name not in names and p.name != DIGESTS) if out.exists() else []
    if held:
        raise UserError(f"OUT is not empty: {held[0]}", where=out, fix="with --val give a new or empty folder")
    for asked in settings:
        _listing(videos, out, asked)


def tidy(out: Path) -> None:
    """Removes the work, and files under temporary names."""
    if (out / WORK).exists():
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(out / WORK, _temporary(out))
    for left in out.glob(f"{WORK}.*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*out.glob(".*.tmp"), *(out / "columns").glob(".*.tmp")):
        if not left.name.startswith(WORK):  # a temporary work folder belongs to another process, which removes it
            left.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file to its final name, unless another process has done so: existing files never change."""
    fsync_path(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # the file system has no hard links
        os.rename(temporary, path)
    temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


# -- begin -----------------------------------------------------------------------------------------


def _listing(videos: Path, out: Path, settings: Settings, *, everything: bool = False) -> "_Listing":
    find = find_trajectories if settings.trajectories else find_sources
    root, sources = find(videos, out, everything=everything)
    if settings.side is not None:
        side, val, by = settings.side, settings.val, settings.val_by
        sources = of_side(sources, root, side=side, val=val, by=by, seed=settings.seed, where=videos)
    return _Listing(root, sources)


class _Listing:
    """Iterates over the sources, and computes a digest of their names and sizes, complete after the last one."""

    def __init__(self, root: Path, sources: Iterator[Source]) -> None:
        self.root, self._sources = root, sources
        self._digest = hashlib.sha256()
        self.files = 0

    def __iter__(self) -> Iterator[Source]:
        for source in self._sources:
            asked = repr(source.path) if source == folder_source(source.path) else repr(source)
            path = source.path if source.trajectory is None else os.path.join(source.trajectory, LOG)
            try:
                size = os.stat(self.root / path).st_size
            except (OSError, ValueError):
                size = -1
            self._digest.update(f"{asked} {size}\n".encode("utf-8", "backslashreplace"))
            self.files += 1
            yield source

    def describe(self, settings: Settings) -> dict[str, Any]:
        """Returns the identity of a data set before it is made: names and sizes of the files, and the settings."""
        plain = asdict(Settings())
        always = ("seed", "shard_records", "shard_mb")  # others only if set, so older data sets keep their identity
        chosen = {key: value for key, value in asdict(settings).items() if key in always or value != plain[key]}
        return {"files": self.files, "listing": self._digest.hexdigest(), **chosen}


def _held(out: Path) -> bool:
    """Returns whether ``out`` has a data set, unfinished or finished. Raises UserError where it has anything else."""
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    if (out / MANIFEST).exists() or (out / WORK / "source.json").exists():
        return True
    if not out.is_dir():
        return False
    if any(out.glob("*.tar")):
        raise UserError("OUT holds shards of unknown origin", where=out, fix="give a new or empty folder")
    foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith((WORK, JOBS)))
    if foreign and not (out / WORK / "source.json").exists():  # checked again: another process may have begun
        raise UserError(
            f"OUT is not empty: {foreign[0]}" + (f" and {len(foreign) - 1} more" if foreign[1:] else ""),
            where=out,
            fix="give a new or empty folder",
        )
    return False


def _same(path: Path, asked: dict[str, Any], videos: Path, out: Path, settings: Settings) -> None:
    """Raises UserError naming the difference where ``out`` was made from something else. path: file of its identity"""
    tree = read_json(path)
    made = tree.get("source") if isinstance(tree, dict) else None
    if made == asked:
        return
    earlier = _listing(videos, out, settings, everything=True)  # the listing of an earlier version, which skipped none
    for _ in earlier:
        pass
    if made == earlier.describe(settings):
        return
    found = _listing(videos, out, settings)
    raise UserError(
        f"OUT holds another data set: {what_differs(made, asked, out, found.root, found)}",
        where=path,
        fix="give another folder, or remove this one",
    )


def _relist(listing: _Listing, work: Work, videos: Path, settings: Settings) -> None:
    """Replaces the work by work on the current sources, and carries over the known verdicts.

    Raises UserError where fewer than half of the sources still exist, because it may be another data set.
    """
    out, known = work.out, KnownVerdicts(work.folder)
    temporary = _temporary(out)
    try:
        _write_listing(temporary, listing, videos, settings, made_out=work.made_out, known=known)
        if 2 * known.kept < known.sources:
            _same(work.folder / "source.json", listing.describe(settings), videos, out, settings)
        work.check()  # another process may have done this first
        for made in (*out.glob("shard-*.tar"), out / REJECTED):  # of the old plan
            made.unlink(missing_ok=True)
        move_dir(work.folder, out / _BEFORE)
        publish_first(temporary, work.folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(out / _BEFORE, ignore_errors=True)
    print(f"{out}: the sources have changed: {known.carried} of {listing.files} are known from before", flush=True)


def _list_sources(listing: _Listing, videos: Path, out: Path, settings: Settings) -> None:
    """Writes all sources and the request: under a temporary name, then renamed."""
    made_out = not out.exists()
    temporary = _temporary(out)
    try:
        asked = _write_listing(temporary, listing, videos, settings, made_out=made_out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if made_out and out.exists() and not any(out.iterdir()):
            out.rmdir()
        raise
    publish_first(temporary, out / WORK)
    _same(out / WORK / "source.json", asked, videos, out, settings)  # another process may have begun another data set


def _write_listing(
    folder: Path,
    listing: _Listing,
    videos: Path,
    settings: Settings,
    *,
    made_out: bool,
    known: KnownVerdicts | None = None,
) -> dict[str, Any]:
    """Writes all sources, known verdicts, and the request into a new folder. Returns the identity."""
    sources = iter(listing)
    first = next(sources)  # raises where there is none, before OUT is created
    (folder / "sources").mkdir(parents=True)
    for name in ("probed", "written"):
        (folder / name).mkdir()
    front = [first, *islice(sources, SHORT - 1)]
    chunk = CHUNK if len(front) == SHORT else -(-len(front) // SHARES)
    sources, number = chain(front, sources), 0
    while rows := list(islice(sources, chunk)):
        lines = [json.dumps(_told(source)) + "\n" for source in rows]
        with writing(_chunk(folder, number)):
            _chunk(folder, number).write_text("".join(lines))
        if known is not None:
            carried = folder / "probed" / f"{number:06d}.carried.part"
            with writing(carried):
                carried.write_text("".join(known.carry(listing.root, rows, lines)))
        number += 1
    source = listing.describe(settings)
    asked: dict[str, Any] = {
        "version": VERSION,
        "source": source,
        "settings": asdict(settings),
        "videos": str(videos.absolute()),  # absolute, because jobs may start in another folder
        "root": str(listing.root.absolute()),
        "files": listing.files,
        "chunk": chunk,
        "made_out": made_out,
        "listed": secrets.token_hex(8),
    }
    write_json(folder / "source.json", asked)
    return source


def _told(source: Source) -> dict[str, Any]:
    return {name: value for name, value in vars(source).items() if value is not None}


def _chunk(folder: Path, chunk: int) -> Path:
    return folder / "sources" / f"{chunk:06d}.jsonl"


def _temporary(out: Path) -> Path:
    return out / f"{WORK}.{secrets.token_hex(4)}.tmp"
