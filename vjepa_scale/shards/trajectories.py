"""Robot trajectories as records: the video of one view, with the robot's log (see data/trajectories.py).

A video whose times do not match its control log would teach a model wrong actions. It is rejected, or, where it has one
frame per step of the log, copied with the log's times.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.trajectories import MEMBERS, Floats, StateLog, check_clocks, step_s
from vjepa_scale.shards.droid import LOG, METADATA, VIDEOS, read_log, read_view
from vjepa_scale.shards.remux import checked_retimed, retimed
from vjepa_scale.shards.sources import Source, read_list, walk_sources
from vjepa_scale.shards.tars import sha256_beating
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.inspect import Decoded, VideoFacts, decode_whole

LAYOUTS = ("droid",)


@dataclass(frozen=True)
class Trajectory:
    """The sources of a record's other members.

    folder:     relative to the common folder of all sources, or absolute
    steps:      steps with a picture, which the record has; logged: steps of the log, whose last may have no picture
    clock:      source of the times: a dataset of the log, or a nominal rate
    extrinsics: whether the log has them for this camera
    retimed:    extension of the copy with the log's times; None for the unchanged video
    sha256:     of the members' bytes
    """

    folder: str
    view: str
    serial: str
    steps: int
    logged: int
    clock: str
    extrinsics: bool
    retimed: str | None
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Returns the trajectory's entry in a record's JSON."""
        known = {name: value for name, value in asdict(self).items() if name != "sha256"}
        return known | {"retimed": self.retimed is not None}


@dataclass(frozen=True)
class Found:
    """A usable trajectory. path: of its video, relative as Trajectory.folder; size, sha256: of the record's video"""

    path: str
    size: int
    sha256: str
    facts: VideoFacts
    trajectory: Trajectory
    known: dict[str, Any]


def find_trajectories(videos: Path, out: Path, *, everything: bool = False) -> tuple[Path, Iterator[Source]]:
    """Returns the folder that paths are relative to, and all trajectories, sorted by path.

    A trajectory is a folder with metadata or with a log.
    videos: a folder, or a list of trajectories' folders (as the published code's), whose order is kept
    everything: as in ``walk_sources``
    Raises UserError where there are none, and during iteration where a list cannot be read.
    """
    if videos.is_file():
        return videos.parent, map(_whole, read_list(videos))
    found = _folders(videos, out, everything)
    first = next(found, None)
    if first is None:
        fix = f"a trajectory is a folder with {LOG} and {METADATA}"
        raise UserError("no trajectories in this folder or below it", where=videos, fix=fix)
    return videos, (Source(folder, trajectory=folder) for folder in chain([first], found))


def _whole(row: Source) -> Source:
    if (row.start_s, row.end_s) != (None, None):
        fix = "leave start and end out: states would have to be cut with the video"
        raise UserError("a part of a trajectory", where=row.path, fix=fix)
    return replace(row, trajectory=row.path)


def _folders(videos: Path, out: Path, everything: bool) -> Iterator[str]:
    around = list[str]()  # nested trajectories that contain the current file
    for path in walk_sources(videos, out, everything=everything):
        while around and around[-1] != "." and not path.startswith(f"{around[-1]}/"):
            around.pop()
        parent, name = os.path.split(path)
        if name == LOG or fnmatch(name, METADATA):
            if (parent or ".") not in around:
                around.append(parent or ".")
                yield around[-1]
        elif (videos / path).is_dir():  # an unreadable folder, which may contain trajectories
            yield path


def probe_trajectory(root: Path, folder: str, *, view: str, retime: bool) -> Found:
    """Checks a whole trajectory. Raises DecodeError with the reason to reject it, and OSError.

    retime: where there is one frame per step, give each picture the time of its step
    """
    next((root / folder).iterdir(), None)  # a folder that cannot be read would look empty
    seen = read_view(root / folder, view)
    path = root / folder / VIDEOS / seen.video
    if not path.is_file():
        raise DecodeError("no video", f"{VIDEOS}/{seen.video}")
    log, clock = read_log(root / folder, seen.serial)
    logged = len(log.times_s)
    decoded = decode_whole(path)
    log = _with_pictures(log, decoded.facts.frames)
    digest, size, extension = sha256_beating(path), path.stat().st_size, None
    if retime and len(log.times_s) == decoded.facts.frames and not _on_screen(decoded, log.times_s):
        data, extension, decoded = checked_retimed(path, decoded, log.times_s)
        digest, size = hashlib.sha256(data).hexdigest(), len(data)
    _check_clocks(decoded, log.times_s)
    trajectory = Trajectory(
        folder=folder,
        view=view,
        serial=seen.serial,
        steps=len(log.times_s),
        logged=logged,
        clock=clock,
        extrinsics=log.extrinsics is not None,
        retimed=extension,
        sha256=_digest(_members(log)),
    )
    return Found(_within(folder, seen.video), size, digest, decoded.facts, trajectory, seen.known)


def retimed_video(video: Path, root: Path, trajectory: Trajectory) -> bytes:
    """Returns the record's retimed video, with deterministic bytes. Raises DecodeError, and OSError."""
    log, _ = read_log(root / trajectory.folder, trajectory.serial)
    return retimed(video, _with_pictures(log, trajectory.steps).times_s)[0]


def members(root: Path, trajectory: Trajectory) -> dict[str, bytes]:
    """Returns the record's .npy members, by name. Raises DecodeError where the log has changed, and OSError."""
    log, _ = read_log(root / trajectory.folder, trajectory.serial)
    made = _members(_with_pictures(log, trajectory.steps))
    if _digest(made) != trajectory.sha256:
        raise DecodeError("changed", LOG)
    return made


def _within(folder: str, video: str) -> str:
    return f"{VIDEOS}/{video}" if folder == "." else f"{folder}/{VIDEOS}/{video}"


def _with_pictures(log: StateLog, frames: int) -> StateLog:
    """Removes the log's last step if only that has no picture: DROID's MP4 exporter stops one frame early."""
    if frames != len(log.times_s) - 1 or frames < 2:
        return log
    extrinsics = None if log.extrinsics is None else log.extrinsics[:frames]
    return StateLog(log.states[:frames], log.times_s[:frames], extrinsics)


def _on_screen(decoded: Decoded, times_s: Floats) -> bool:
    """Returns whether frame k is on screen at times_s[k], for all k."""
    shown = np.searchsorted(decoded.times_s, times_s + 1e-6, side="right") - 1
    return bool((shown == np.arange(len(times_s))).all()) and decoded.facts.duration > times_s[-1]


def _check_clocks(decoded: Decoded, times_s: Floats) -> None:
    """Raises DecodeError where a video's times do not match its log.

    It must end with the log, to one step. Where it has one frame per step, each must come within half a step of its own
    step; otherwise the nearest picture to a state would belong to another step.
    """
    check_clocks(decoded.facts.duration, times_s)
    if len(times_s) != decoded.facts.frames:
        return
    apart = np.abs(decoded.times_s - times_s)
    if apart.max() > step_s(times_s) / 2 + 1e-6:
        frame = int(apart.argmax())
        detail = f"frame {frame} comes at {decoded.times_s[frame]:.3f} s, its step was at {times_s[frame]:.3f} s"
        raise DecodeError("clocks disagree", detail)


def _members(log: StateLog) -> dict[str, bytes]:
    arrays = dict(zip(MEMBERS, (log.states, log.times_s, log.extrinsics), strict=True))
    return {name: _npy(array) for name, array in arrays.items() if array is not None}


def _npy(array: Floats) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _digest(made: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in made.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
