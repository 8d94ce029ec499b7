"""Decodes every source as a whole, in worker processes; records facts, or a reason to reject it; cuts long videos.

    OUT/.work/probed/000000.1a2b.part   one process's verdicts on sources of chunk 0, a line each, appended as they come
    OUT/.work/probed/000000.jsonl       all verdicts of the chunk, in its order: exists only if there are all

A killed run continues with the sources that have no line. Two processes on one chunk write two files; the merged file
takes each source's first line. A line truncated by a kill is ignored. Memory holds a few sources per worker, and, of
the chunks in work, which sources have a verdict.
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from vjepa_scale.core.errors import reason_of
from vjepa_scale.core.files import append_jsonl, temporary_beside, writing
from vjepa_scale.core.worker_pool import Crashed, Silent, map_in_workers
from vjepa_scale.data.substitution import CRASH, TIME_LIMIT
from vjepa_scale.shards.records import Record, Rejected, Verdict, stamp_of, verdict_tree
from vjepa_scale.shards.remux import Cut, checked_cut, plan_cuts
from vjepa_scale.shards.sources import Source
from vjepa_scale.shards.tars import sha256_beating
from vjepa_scale.shards.trajectories import probe_trajectory
from vjepa_scale.shards.transcode import digest_of_part, facts_of, plan_transcodes, typical_bytes
from vjepa_scale.shards.work import Part, Progress, Settings, Work, publish
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.inspect import Decoded, VideoFacts, decode_whole


def probe(work: Work, part: Part, *, workers: int, progress: Progress) -> None:
    """Probes every source of this part's chunks; continues where an earlier run ended."""
    chunks = range(part.index, work.chunks, part.of)
    total = sum(work.files_in(chunk) for chunk in chunks)
    unknown = _Unknown(work, chunks)
    results = map_in_workers(probe_source, unknown.tasks(), workers=workers, silence_s=work.settings.decode_timeout_s)
    for index, result in results:
        unknown.tell(index, result)
        progress("probing", unknown.known, total)


def probed(work: Work, chunk: int) -> Path:
    """Returns the path of the verdicts of a finished chunk."""
    return work.folder / "probed" / f"{chunk:06d}.jsonl"


def probe_sources(
    root: Path, sources: Sequence[Source], settings: Settings, *, workers: int, progress: Progress
) -> tuple[list[Record], list[Rejected]]:
    """Probes some files without writing to disk. Returns usable and rejected ones, in the order of ``sources``."""
    verdicts: dict[int, Verdict] = {}
    tasks = ((str(root), source, settings) for source in sources)
    for index, result in map_in_workers(probe_source, tasks, workers=workers, silence_s=settings.decode_timeout_s):
        verdicts[index] = _verdict(sources[index], settings, result)
        progress("probing", len(verdicts), len(sources))
    ordered = [verdicts[index] for index in range(len(sources))]
    return [r for v in ordered for r in v.records], [r for v in ordered for r in v.rejected]


# -- verdicts --------------------------------------------------------------------------------------


@dataclass
class _Begun:
    """A chunk in work. left: number of its sources without a verdict; part: this process's file of it."""

    number: int
    left: int
    part: Path


class _Unknown:
    """Iterates over sources without a verdict, chunk after chunk, and stores the verdicts."""

    def __init__(self, work: Work, chunks: range) -> None:
        self._work, self._chunks = work, chunks
        self._token = secrets.token_hex(4)
        self._asked: dict[int, tuple[_Begun, int, Source]] = {}
        self.known = 0

    def tasks(self) -> Iterator[tuple[str, Source, Settings]]:
        asked = 0
        for chunk in self._chunks:
            files = self._work.files_in(chunk)
            if probed(self._work, chunk).exists():
                self.known += files
                continue
            known = _lines_of_parts(self._work, chunk)
            self.known += len(known)
            begun = _Begun(chunk, files - len(known), _part_file(self._work, chunk, self._token))
            if not begun.left:
                _merge(self._work, chunk)
                continue
            for number, source in enumerate(self._work.sources(chunk)):
                if number not in known:
                    self._asked[asked] = begun, number, source
                    asked += 1
                    yield str(self._work.root), source, self._work.settings

    def tell(self, index: int, result: Verdict | Crashed | Silent) -> None:
        begun, number, source = self._asked.pop(index)
        self._work.check()
        append_jsonl(begun.part, verdict_tree(number, _verdict(source, self._work.settings, result)))
        self.known += 1
        begun.left -= 1
        if not begun.left:
            _merge(self._work, begun.number)


def _part_file(work: Work, chunk: int, token: str) -> Path:
    return work.folder / "probed" / f"{chunk:06d}.{token}.part"


def _lines_of_parts(work: Work, chunk: int) -> dict[int, bytes]:
    """Returns the first complete line of every source in the part files of a chunk."""
    found: dict[int, bytes] = {}
    for path in sorted(_part_file(work, chunk, "x").parent.glob(f"{chunk:06d}.*.part")):
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:  # another process has merged them
            continue
        for line in lines:
            try:
                tree = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if tree is not None:
                found.setdefault(tree["n"], line)
    return found


def _merge(work: Work, chunk: int) -> None:
    """Merges the verdicts of a chunk into one file, after all its sources have one."""
    lines = _lines_of_parts(work, chunk)
    final = probed(work, chunk)
    if not final.exists():  # else another process has merged and removed the parts
        if len(lines) != work.files_in(chunk):
            raise FileNotFoundError(errno.ENOENT, "verdicts were removed meanwhile", str(final))
        temporary = temporary_beside(final)
        with writing(final):
            temporary.write_bytes(b"".join(lines[number] for number in sorted(lines)))
        publish(temporary, final)
    for path in final.parent.glob(f"{chunk:06d}.*.part"):
        path.unlink(missing_ok=True)


# -- one source ------------------------------------------------------------------------------------


def _verdict(source: Source, settings: Settings, result: Verdict | Crashed | Silent) -> Verdict:
    if isinstance(result, Crashed):
        return Verdict([], [Rejected(source.path, CRASH)])
    if isinstance(result, Silent):
        return Verdict([], [Rejected(source.path, TIME_LIMIT, f"no new frame in {settings.decode_timeout_s:g} s")])
    return result


def probe_source(task: tuple[str, Source, Settings]) -> Verdict:
    """Probes one source: returns a record, several where it is cut, or a rejection. task: root, source, settings"""
    stamp = stamp_of(Path(task[0]), task[1])  # before the file is read, so that a change meanwhile is detected
    return replace(_probe_source(*task), stamp=stamp)


def _probe_source(root: str, source: Source, settings: Settings) -> Verdict:
    path = Path(root) / source.path
    try:
        if source.trajectory is not None:
            return _verdict_of([_probe_trajectory(Path(root), source, source.trajectory, settings)])
        if (why := _no_file(path)) is not None:
            return Verdict([], [Rejected(source.path, "unreadable", why)])
        before = path.stat()
        decoded = decode_whole(path, images=settings.images, in_order=settings.transcode)
        whole = (source.start_s, source.end_s, settings.segment_s) == (None, None, None)
        still = decoded.facts.duration == 0
        if settings.transcode and not still:
            return _verdict_of(_plan_transcodes(path, source, settings, decoded))
        cuts = None
        if not (whole or still):
            cuts = plan_cuts(path, decoded, start_s=source.start_s, end_s=source.end_s, segment_s=settings.segment_s)
        if cuts is not None:
            return _verdict_of([_probe_cut(path, source, settings, decoded, cut) for cut in cuts])
        if not still and (short := _too_short(source.path, decoded.facts, settings)):
            return Verdict([], [short])
        record = Record(
            source.path,
            before.st_size,
            source.label,
            decoded.facts,
            sha256_beating(path),
            metadata=source.metadata,
            mtime_ns=before.st_mtime_ns,
        )
        return Verdict([record], [])
    except OSError as error:
        return Verdict([], [Rejected(source.path, "unreadable", reason_of(error))])
    except DecodeError as error:
        return Verdict([], [Rejected(source.path, error.reason, error.detail)])
    except Exception as error:  # a bug here or in PyAV: it stops the run, and must name the file
        error.add_note(f"while probing {path}")
        raise


def _verdict_of(found: Sequence[Record | Rejected]) -> Verdict:
    return Verdict([f for f in found if isinstance(f, Record)], [f for f in found if isinstance(f, Rejected)])


def _no_file(path: Path) -> str | None:
    """Returns why a source is not a regular file (reading a pipe would block), or None. Raises OSError."""
    if path.is_file():
        return None
    if path.is_symlink():
        return "a broken link"
    if path.is_dir():
        with os.scandir(path):  # raises the reason where a folder could not be listed
            pass
    return "not a file" if path.exists() else "no such file"


def _probe_trajectory(root: Path, source: Source, folder: str, settings: Settings) -> Record | Rejected:
    found = probe_trajectory(root, folder, view=settings.view, retime=settings.retime)
    known = found.known | (source.metadata or {})
    record = Record(found.path, found.size, source.label, found.facts, found.sha256, None, known, found.trajectory)
    return _too_short(source.path, found.facts, settings) or record


def _plan_transcodes(path: Path, source: Source, settings: Settings, decoded: Decoded) -> list[Record | Rejected]:
    parts = plan_transcodes(
        decoded,
        short_side=settings.short_side,
        fps=None if settings.fps is None else Fraction(settings.fps),
        start_s=source.start_s,
        end_s=source.end_s,
        segment_s=settings.segment_s,
    )
    digest, found = sha256_beating(path), list[Record | Rejected]()
    for part in parts:
        facts = facts_of(part)
        record = Record(
            source.path,
            typical_bytes(part),
            source.label,
            facts,
            digest_of_part(digest, part),
            metadata=source.metadata,
            transcode=part,
        )
        found.append(_too_short(source.path, facts, settings, start_s=part.start_s) or record)
    return found


def _probe_cut(path: Path, source: Source, settings: Settings, decoded: Decoded, cut: Cut) -> Record | Rejected:
    try:
        data, facts = checked_cut(path, decoded, cut)
    except DecodeError as error:
        part = f"from {cut.start_s:.3f} to {cut.end_s:.3f} s"
        return Rejected(source.path, error.reason, f"{part}: {error.detail}" if error.detail else part)
    digest = hashlib.sha256(data).hexdigest()
    short = _too_short(source.path, facts, settings, start_s=cut.start_s)
    return short or Record(source.path, len(data), source.label, facts, digest, cut, source.metadata)


def _too_short(path: str, facts: VideoFacts, settings: Settings, start_s: float | None = None) -> Rejected | None:
    if facts.duration >= settings.min_s:
        return None
    part = "" if start_s is None else f", from {start_s:.3f} s on"
    return Rejected(path, "too short", f"{facts.duration:.3f} s{part}")
