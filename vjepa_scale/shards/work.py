"""A data set that is being made: what was asked for, and what is done of it.

    OUT/.work/source.json            what was asked for; written last of this and sources/
    OUT/.work/sources/000000.jsonl   the sources in their order, a chunk to a file
    OUT/.work/probed/000000.jsonl    what became of each of those (probe.py)
    OUT/.work/plan/                  which record goes where (plan.py)
    OUT/.work/written/               a receipt per finished shard (write.py)

Where the sources have changed since, they are listed anew, with what is known of those that have not (records.py).

Any number of processes may work on it at once, on any machines that see the folder. Nothing is locked: a file
appears whole under its name or not at all, its bytes do not depend on who wrote it, and the first to write it wins.
What one process does alone is a chunk of the sources, or a shard.
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
_BEFORE = ".work.before"  # the work of an earlier listing, while the new one takes its place
_CHANGED = "changed"  # in the work: a source was found to be another than was probed
JOBS = ".slurm"  # launch/shard_jobs.py: beside the work, since its jobs write logs until after its end
DIGESTS = ".digests_of_train.npy"  # beside the two data sets of a split: what val must not have (plan.py)
CHUNK = 1000  # sources of a long listing
SHORT = 64_000  # sources: a listing of fewer is held until its length is known
SHARES = 256  # chunks of a short listing, at most: many jobs are to have some each, however few the videos
VERSION = 1

# Told (what is being done, how much is done, of how much).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is made of the sources.

    shard_records: clips per shard; or else shard_mb: a shard is full at this many megabytes of video
    images:        pictures are records too, as static clips
    segment_s:     longer videos are cut into clips of up to this many seconds (see remux.py)
    min_s:         shorter clips are rejected
    decode_timeout_s: a source is rejected when its decoder gives no new frame for so long
    trajectories:  sources are robot trajectories in this layout (trajectories.LAYOUTS); view: of which camera
    retime:        their videos are given the log's times where they have one frame per step
    transcode:     videos are encoded anew (transcode.py). short_side: in pixels, at most; None keeps the size
    fps:           at this rate, a fraction; None for the source's
    side:          of a split, train or val, whose sources these are (sources.of_side); None: all sources
    val, val_by:   the fraction of val, and what is not torn apart: source, folder, or a list's column
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
    """The share of one of several jobs: of all chunks, and of all shards, index, index + of, …"""

    index: int
    of: int


@dataclass(frozen=True)
class Work:
    """videos: the folder or list; root: what the sources' paths are relative to; source: what identifies all of it.

    files: how many sources there are; chunk: how many to a file
    made_out: OUT was made for this, and goes with it if nothing comes of it
    listed: tells this listing from another
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
        """Work that ``begin`` has begun, by this process or another. Raises UserError where there is none."""
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
        """How many sources are in one chunk."""
        return min(self.chunk, self.files - chunk * self.chunk)

    def sources(self, chunk: int) -> list[Source]:
        """Those of one chunk."""
        with open(_chunk(self.folder, chunk), "rb") as file:
            return [Source(**json.loads(line)) for line in file]

    def check(self) -> None:
        """Raises UserError where another process has listed the sources anew: what this one does is of the old ones."""
        if Work.open(self.out).listed != self.listed:
            raise UserError("the sources were listed anew meanwhile", where=self.out, fix="run the same command again")

    def source_changed(self) -> None:
        """Let the next run look at the sources again."""
        (self.folder / _CHANGED).touch()

    def remove(self) -> None:
        """Forget all that is known, and OUT where it was made for this and nothing else is in it."""
        tidy(self.out)
        if self.made_out:
            with suppress(OSError):
                self.out.rmdir()


def begin(videos: Path, out: Path, settings: Settings, *, relist: bool | None = None) -> Work | None:
    """List the sources, or find that this data set was begun; None: it is finished.

    videos: a folder, or a list (see sources.py)
    relist: whether sources that have changed may be listed anew; default: unless a cluster's jobs may be at work
    Raises UserError, before anything is written, where there is nothing to make it from or where ``out``
    holds something else.
    """
    if relist is None:
        relist = not (out / JOBS).exists()
    try:
        return _begin(videos, out, settings, relist)
    except (UserError, FileNotFoundError):
        if not (out / MANIFEST).exists():
            raise
        # Another process may have finished it meanwhile, and removed the work, this one's listing with it.
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
    """Raises UserError where ``out`` cannot be the folder of a split's data sets, or one of them has no source."""
    names = {asked.side for asked in settings}
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    held = sorted(p.name for p in out.iterdir() if p.name not in names and p.name != DIGESTS) if out.exists() else []
    if held:
        raise UserError(f"OUT is not empty: {held[0]}", where=out, fix="with --val give a new or empty folder")
    for asked in settings:
        _listing(videos, out, asked)


def tidy(out: Path) -> None:
    """Remove what making has left: the work, and files under temporary names."""
    if (out / WORK).exists():
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(out / WORK, _temporary(out))
    for left in out.glob(f"{WORK}.*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*out.glob(".*.tmp"), *(out / "columns").glob(".*.tmp")):
        if not left.name.startswith(WORK):  # a folder: another process does the same, and will remove it
            left.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless another process has done so: what stands there never changes."""
    fsync_path(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
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
    """Sources as they come, and a digest of their names and sizes when all have come."""

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
        """What identifies a data set before it is made: names and sizes of the files, and the settings."""
        plain = asdict(Settings())
        always = ("seed", "shard_records", "shard_mb")  # others by choice: data sets made before they existed are known
        chosen = {key: value for key, value in asdict(settings).items() if key in always or value != plain[key]}
        return {"files": self.files, "listing": self._digest.hexdigest(), **chosen}


def _held(out: Path) -> bool:
    """Whether this data set, or one like it, is in ``out``, begun or finished. Raises UserError for anything else."""
    if out.exists() and not out.is_dir():
        raise UserError("OUT is a file", where=out, fix="give a new or empty folder")
    if (out / MANIFEST).exists() or (out / WORK / "source.json").exists():
        return True
    if not out.is_dir():
        return False
    if any(out.glob("*.tar")):
        raise UserError("OUT holds shards of unknown origin", where=out, fix="give a new or empty folder")
    foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith((WORK, JOBS)))
    if foreign and not (out / WORK / "source.json").exists():  # asked again: another process may have begun
        raise UserError(
            f"OUT is not empty: {foreign[0]}" + (f" and {len(foreign) - 1} more" if foreign[1:] else ""),
            where=out,
            fix="give a new or empty folder",
        )
    return False


def _same(path: Path, asked: dict[str, Any], videos: Path, out: Path, settings: Settings) -> None:
    """Raises UserError, which says what differs, where ``out`` was made of anything else. path: of what says so."""
    tree = read_json(path)
    made = tree.get("source") if isinstance(tree, dict) else None
    if made == asked:
        return
    earlier = _listing(videos, out, settings, everything=True)  # as a version listed them that ignored no file
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
    """Put work on the sources as they are now, with what is known of them, in the place of work that was begun.

    Raises UserError where fewer than half of the sources are still there: those may be another data set.
    """
    out, known = work.out, KnownVerdicts(work.folder)
    temporary = _temporary(out)
    try:
        _write_listing(temporary, listing, videos, settings, made_out=work.made_out, known=known)
        if 2 * known.kept < known.sources:
            _same(work.folder / "source.json", listing.describe(settings), videos, out, settings)
        work.check()  # another process may have been first
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
    """Write all sources and what was asked for: under a temporary name, then renamed."""
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
    _same(out / WORK / "source.json", asked, videos, out, settings)  # another process may have begun it, otherwise


def _write_listing(
    folder: Path,
    listing: _Listing,
    videos: Path,
    settings: Settings,
    *,
    made_out: bool,
    known: KnownVerdicts | None = None,
) -> dict[str, Any]:
    """All sources, what is known of them, and what was asked for, in a new folder. Returns what identifies it."""
    sources = iter(listing)
    first = next(sources)  # before OUT is made: where there is none, this raises
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
        "videos": str(videos.absolute()),  # for jobs that start in another folder
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
