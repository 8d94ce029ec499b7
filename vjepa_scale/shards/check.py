"""Checks a folder of shards against its manifest, and lists every difference."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json, sha256_file
from vjepa_scale.core.worker_pool import Silent, map_in_workers
from vjepa_scale.data.manifest import MANIFEST, REJECTED, Manifest, Shard
from vjepa_scale.data.trajectories import MEMBERS, read_trajectory
from vjepa_scale.shards.index import SILENCE_S
from vjepa_scale.shards.plan import FACTS
from vjepa_scale.shards.tars import list_tar, sha256_beating
from vjepa_scale.shards.work import Progress
from vjepa_scale.video.container import DecodeError, FileSlice, Media
from vjepa_scale.video.inspect import decode_whole

_COLUMNS = frozenset(
    [
        "key",
        "video.offset",
        "video.size",
        "json.offset",
        "json.size",
        "duration",
        "fps",
        "frames",
        "width",
        "height",
        "label",
    ]
)


@dataclass(frozen=True)
class _ShardTask:
    folder: Path
    shard: Shard
    first: int
    decode: bool


def check_shards(folder: Path, *, decode: bool, workers: int, progress: Progress) -> list[str]:
    """Returns a line for each problem, by shard; an empty list where there is none.

    decode: also decode every clip as a whole
    Raises UserError where there is no readable manifest.
    """
    manifest = Manifest.open(folder, look=False)
    wrong = _check_manifest(manifest)
    if wrong:  # without columns, positions cannot be compared
        return wrong
    firsts = np.cumsum(manifest.records_per_shard) - manifest.records_per_shard
    tasks = [_ShardTask(folder, s, int(f), decode) for s, f in zip(manifest.shards, firsts, strict=True)]
    found: list[list[str]] = [[] for _ in tasks]
    results = map_in_workers(_check_shard, tasks, workers=workers, silence_s=SILENCE_S)
    for done, (number, result) in enumerate(results, start=1):
        how = "hangs in" if isinstance(result, Silent) else "crashes"
        lost = [f"{tasks[number].shard.name}: a clip {how} the decoder"]
        found[number] = result if isinstance(result, list) else lost
        progress("checking", done, len(tasks))
    listed = {shard.name for shard in manifest.shards}
    indexed = "indexed" in manifest.source  # an indexed tar without a usable sample is not in the manifest
    extra = [] if indexed else [path.name for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    return [line for lines in found for line in lines] + [f"{name}: not in the manifest" for name in extra]


def _check_manifest(manifest: Manifest) -> list[str]:
    wrong = []
    if manifest.records != sum(shard.records for shard in manifest.shards):
        wrong.append(f"{MANIFEST}: its number of records is not the sum of its shards'")
    identity = hashlib.sha256("\n".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    if manifest.identity != identity:
        wrong.append(f"{MANIFEST}: its identity does not match its shards")
    if not (manifest.folder / REJECTED).is_file():
        wrong.append(f"{REJECTED} is missing: what was left out, and why")
    wrong += [f"{MANIFEST}: no column {name}" for name in sorted(_COLUMNS - set(manifest.described))]
    for name, described in manifest.described.items():
        path = manifest.folder / described["file"]
        if not path.is_file():
            wrong.append(f"{described['file']}: missing")
        elif sha256_file(path) != described["sha256"]:
            wrong.append(f"{described['file']}: other bytes than the manifest's sha256 says")
        elif len(manifest.column(name)) != manifest.records:
            wrong.append(f"{described['file']}: {len(manifest.column(name))} values for {manifest.records} records")
    return wrong


def _check_shard(task: _ShardTask) -> list[str]:
    path, shard = task.folder / task.shard.name, task.shard
    if not path.is_file():
        return [f"{shard.name}: missing"]
    wrong = []
    if path.stat().st_size != shard.bytes:
        wrong.append(f"{shard.name}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    elif sha256_beating(path) != shard.sha256:
        wrong.append(f"{shard.name}: other bytes than the manifest's sha256 says")
    contents = list_tar(path)
    if contents.damage is not None:
        wrong.append(f"{shard.name}: {contents.damage}")
    samples: dict[str, list[dict[tuple[int, int], str]]] = {}
    for sample in contents.samples:
        places = {(member.offset, member.size): name for name, member in sample.members.items()}
        samples.setdefault(sample.key, []).append(places)
    manifest = Manifest.open(task.folder, look=False)
    for record in range(task.first, task.first + shard.records):
        key = manifest.key(record)
        try:
            wrong += [f"{shard.name}: record {key}: {text}" for text in _check_record(manifest, record, samples, task)]
        except UserError as error:
            wrong.append(f"{shard.name}: record {key}: {error.what}")
    if "indexed" not in manifest.source:
        listed = {manifest.key(record) for record in range(task.first, task.first + shard.records)}
        wrong += [f"{shard.name}: {key}: not in the manifest" for key in samples if key not in listed]
        wrong += [f"{shard.name}: {text}" for text in contents.problems]
    return wrong


def _check_record(
    manifest: Manifest, record: int, samples: dict[str, list[dict[tuple[int, int], str]]], task: _ShardTask
) -> list[str]:
    place = {role: manifest.place(record, role) for role in ("video", "json")}
    candidates = samples.get(manifest.key(record), [])
    if not candidates:
        return ["not in the shard"]
    if not any(place["video"] in members for members in candidates):
        return ["its video is elsewhere in the shard"]
    wrong = []
    facts = {name: manifest.column(name)[record].item() for name in FACTS}
    if place["json"][1]:
        if not any(members.get(place["json"]) == "json" for members in candidates):
            return ["its JSON is elsewhere in the shard"]
        wrong += _check_known(manifest, record, facts)
    wrong += _check_beside(manifest, record, candidates)
    if task.decode:
        wrong += _check_video(FileSlice(task.folder / task.shard.name, *place["video"]), facts)
    return wrong


def _check_beside(manifest: Manifest, record: int, candidates: list[dict[tuple[int, int], str]]) -> list[str]:
    """Checks the members of a robot's record: their positions, their values, and their times against the video's."""
    if "states.offset" not in manifest.described:
        return []
    wrong = []
    for name in MEMBERS:
        if manifest.has(record, name):
            place = manifest.place(record, name)
            if not any(members.get(place) == f"{name}.npy" for members in candidates):
                wrong.append(f"its {name} are elsewhere in the shard")
    if not wrong:
        read_trajectory(manifest, record)
    return wrong


def _check_known(manifest: Manifest, record: int, facts: dict[str, Any]) -> list[str]:
    try:
        known = parse_json(manifest.read(record, "json"))
    except ValueError as error:
        return [f"its JSON cannot be read: {error}"]
    if "indexed" in manifest.source:
        return []
    if not isinstance(known, dict):
        return ["its JSON is no object"]
    number = int(manifest.column("label")[record])
    columns = facts | {"label": None if number < 0 else manifest.classes[number]}
    return [
        f"{n} is {columns[n]} in the columns, {known.get(n)} in its JSON" for n in columns if known.get(n) != columns[n]
    ]


def _check_video(data: Media, facts: dict[str, Any]) -> list[str]:
    try:
        decoded = decode_whole(data, images=True)
    except DecodeError as error:
        return [str(error)]
    seen = asdict(decoded.facts)
    if (facts["width"], facts["height"]) == decoded.unscaled:  # earlier versions ignored the pixel aspect
        seen |= {name: facts[name] for name in ("width", "height")}
    return [
        f"{name} is {facts[name]} in the columns, {seen[name]} decoded" for name in facts if seen[name] != facts[name]
    ]
