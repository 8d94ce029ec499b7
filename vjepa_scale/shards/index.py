"""Writes a manifest for shards made by other tools; the tars do not change.

A sample is a video (or an image) with optional ``json`` and ``cls``, at any position in its tar. Its label is the
content of ``cls``, or else ``label`` in its JSON. Unusable samples are listed in rejected.jsonl, not in the manifest.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import parse_json, read_json, write_atomic
from vjepa_scale.core.worker_pool import Silent, map_in_workers
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest, Shard, write_manifest
from vjepa_scale.shards.make import Summary, summarize
from vjepa_scale.shards.records import Rejected
from vjepa_scale.shards.tars import Member, Sample, list_tar, sha256_beating
from vjepa_scale.shards.work import Progress
from vjepa_scale.video.container import DecodeError, FileSlice, open_media
from vjepa_scale.video.inspect import VideoFacts, decode_whole

SILENCE_S = 600.0  # a decoder without a new frame for this time hangs; long, because storage may be slow
_LONGEST_TEXT = 2**26  # bytes of a member that is not a video, which is read into memory
_TORN = "several videos, and other members apart from them: sort what is packed (tar --sort=name)"
_PLACES = ("video.offset", "video.size", "json.offset", "json.size")


@dataclass(frozen=True)
class _Found:
    """A usable sample: key, positions of its members (as _PLACES), and its facts."""

    key: str
    places: tuple[int, int, int, int]
    label: str | None
    facts: VideoFacts


@dataclass(frozen=True)
class _Indexed:
    shard: Shard
    found: list[_Found]
    rejected: list[Rejected]


def index_shards(folder: Path, *, workers: int, progress: Progress) -> Summary:
    """Decodes every sample of every tar in a folder and writes the manifest into it.

    Does nothing where make_shards has written the manifest. Raises UserError where there is nothing to index, or a
    manifest of other tars.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, fix="give a folder of .tar files")
    named = sorted(folder.glob("*.tar"))
    tars = [tar for tar in named if tar.is_file()]  # opening a pipe would block
    if not tars:
        what = f"{named[0].name} is not a file" if named else "no .tar files in this folder"
        raise UserError(what, where=folder, fix="give a folder of uncompressed tars")
    listing = hashlib.sha256("".join(f"{tar.name!r} {tar.stat().st_size}\n" for tar in tars).encode())
    source = {"indexed": len(tars), "listing": listing.hexdigest()}
    if (folder / MANIFEST).exists():
        _same(folder, named, source)
        return summarize(folder, existed=True)
    results: list[_Indexed | None] = [None] * len(tars)
    found_in = map_in_workers(_index, tars, workers=workers, silence_s=SILENCE_S)
    for done, (number, result) in enumerate(found_in, start=1):
        if not isinstance(result, _Indexed):
            how = "hangs in" if isinstance(result, Silent) else "crashes"
            raise UserError(f"a sample of this shard {how} the decoder", where=tars[number], fix="move it elsewhere")
        results[number] = result
        progress("indexing", done, len(tars))
    indexed = [result for result in results if result is not None]
    found = [sample for result in indexed for sample in result.found]
    rejected = [Rejected(path.name, "unreadable", "not a file") for path in named if path not in tars]
    rejected += [row for result in indexed for row in result.rejected]
    if not found:
        first = f": {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"no sample that can be used in {len(tars)} shards{first}", where=folder)
    classes, columns = _columns(found)
    write_atomic(folder / REJECTED, "".join(json.dumps(asdict(row)) + "\n" for row in rejected))
    shards = [result.shard for result in indexed if result.found]
    write_manifest(folder, shards=shards, classes=classes, columns=columns, source=source)
    return summarize(folder)


def _same(folder: Path, tars: Sequence[Path], source: dict[str, Any]) -> None:
    """Raises UserError where the manifest is not of these tars. Accepts a manifest that make_shards has written."""
    path, fix = folder / MANIFEST, "remove the manifest and run index again"
    tree = read_json(path)
    made = tree.get("source") if isinstance(tree, dict) else None
    if made == source:
        return
    if isinstance(made, dict) and "indexed" in made:
        count = f"{made['indexed']} tars, now {source['indexed']}"
        what = f"the tars are not as they were when they were indexed: {count}, or other names or sizes"
        raise UserError(what, where=path, fix=fix)
    listed = {shard.name for shard in Manifest.open(folder).shards}  # which compares their sizes
    if new := [tar.name for tar in tars if tar.name not in listed]:
        what = f"{new[0]} is not in the manifest, which make_shards has written"
        raise UserError(what, where=path, fix="move the tar to a folder of its own and index that")


def _columns(found: Sequence[_Found]) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """Returns the classes, and the manifest's columns."""
    classes = sorted({sample.label for sample in found if sample.label is not None})
    number = {None: -1} | {name: i for i, name in enumerate(classes)}
    places = np.array([sample.places for sample in found], np.int64)
    facts = [sample.facts for sample in found]
    return classes, {
        "key": np.array([sample.key.encode() for sample in found], "S"),
        **{name: places[:, i] for i, name in enumerate(_PLACES)},
        "duration": np.array([f.duration for f in facts], np.float64),
        "fps": np.array([f.fps for f in facts], np.float64),
        "frames": np.array([f.frames for f in facts], np.int64),
        "width": np.array([f.width for f in facts], np.int32),
        "height": np.array([f.height for f in facts], np.int32),
        "label": np.array([number[sample.label] for sample in found], np.int64),
    }


def _index(path: Path) -> _Indexed:
    try:
        return _indexed(path)
    except OSError as error:
        raise UserError(f"cannot read the shard: {reason_of(error)}", where=path, fix="make it readable") from None


def _indexed(path: Path) -> _Indexed:
    contents = list_tar(path)
    found, rejected = list[_Found](), [Rejected(path.name, "unreadable member", text) for text in contents.problems]
    if contents.damage is not None:
        rejected.append(Rejected(path.name, "damaged shard", contents.damage))
    rejected += [Rejected(f"{path.name}:{key}", "members lie apart", _TORN) for key in contents.torn]
    for sample in contents.samples:
        try:
            found.append(_look(path, sample))
        except DecodeError as error:
            rejected.append(Rejected(f"{path.name}:{sample.key}", error.reason, error.detail))
    return _Indexed(Shard(path.name, len(found), path.stat().st_size, sha256_beating(path)), found, rejected)


def _look(path: Path, sample: Sample) -> _Found:
    """Raises DecodeError."""

    def read(name: str) -> bytes:
        member = sample.members[name]
        if member.size > _LONGEST_TEXT:
            raise DecodeError("a member is too long", f"{name}: {member.size} bytes, not over {_LONGEST_TEXT}")
        with open_media(FileSlice(path, member.offset, member.size)) as file:
            return file.read()

    if len(sample.media) != 1:
        detail = f"members: {', '.join(sample.members)}"
        raise DecodeError(
            "not one video", detail if sample.media else f"{detail}; a video of this key must be in this tar"
        )
    video = sample.members[sample.media[0]]
    facts = decode_whole(FileSlice(path, video.offset, video.size), images=True).facts
    known = sample.members.get("json", Member(0, 0))
    label: Any = None
    if "cls" in sample.members:
        label = read("cls").decode("utf-8", "replace").strip()
    elif known.size:
        try:
            tree = parse_json(read("json"))
        except ValueError as error:
            raise DecodeError("not valid JSON", str(error)) from None
        label = tree.get("label") if isinstance(tree, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        label = None
    places = (video.offset, video.size, known.offset, known.size)
    return _Found(sample.key, places, None if label is None else str(label), facts)
