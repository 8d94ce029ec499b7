"""What becomes of a source: records, or why not; as objects, and as what is written down of them."""

from dataclasses import asdict, dataclass
from typing import Any

from vjepa_scale.shards.cut import Cut
from vjepa_scale.shards.trajectories import Trajectory
from vjepa_scale.shards.transcode import Transcode
from vjepa_scale.video.inspect import VideoFacts


@dataclass(frozen=True)
class Rejected:
    """A source file that was left out. reason: one of few, to count by; detail: the particular."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One clip of the plan.

    path: relative to the sources' folder, or absolute; size, sha256: of the record's bytes; cut: where it is a part
    trajectory: of a robot's: what is beside the video
    mtime_ns: when a file that is copied was last changed, before it was probed
    transcode: what it will be; size then is an estimate, and sha256 that of the source's sha256 and the part
    """

    path: str
    size: int
    label: str | None
    facts: VideoFacts
    sha256: str
    cut: Cut | None = None
    metadata: dict[str, Any] | None = None
    trajectory: Trajectory | None = None
    transcode: Transcode | None = None
    mtime_ns: int | None = None

    @property
    def part(self) -> tuple[float, float] | None:
        """What it shows, in seconds of the source; None where it is the source."""
        made = self.cut or self.transcode
        return None if made is None else (made.start_s, made.end_s)


@dataclass(frozen=True)
class Verdict:
    """What became of one source. Several records where it is cut. stamp: of its files (relisting.stamp_of)."""

    records: list[Record]
    rejected: list[Rejected]
    stamp: str | None = None


def verdict_tree(number: int, verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is written down. number: of the source, among those of its chunk."""
    return {"n": number, **asdict(verdict)}


def record_of(tree: dict[str, Any]) -> Record:
    """A record, of what was written down."""
    cut = None if tree["cut"] is None else Cut(**tree["cut"])
    trajectory = None if tree["trajectory"] is None else Trajectory(**tree["trajectory"])
    transcode = None if tree["transcode"] is None else Transcode(**tree["transcode"])
    made = {"cut": cut, "trajectory": trajectory, "transcode": transcode}
    return Record(**{**tree, "facts": VideoFacts(**tree["facts"]), **made})
