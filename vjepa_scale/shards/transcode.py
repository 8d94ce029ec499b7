"""Plans transcodes to small videos that decode fast: h264 yuv420p at a constant rate, a keyframe every 30 frames.

Output frame k shows the source's picture on screen at the middle of its interval, start + (k + 1/2) / rate. Where the
source has the same rate, the middle is half a frame from every change of picture, so each source frame is used exactly
once, however its timestamps were rounded. Where the source's rate varies, a change of picture comes at most half an
output frame early or late, and a picture shown for less than an output frame may be dropped.

There are no B-frames: decoding order is display order, so a seek (containers count decoding time) reaches the right
keyframe, and any frame needs at most 30 decoded frames. There are no additional keyframes at scene cuts.

The facts of the new videos are known before anything is encoded (``plan_transcodes``, ``facts_of``), so encode.py can
encode after the shards are planned.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import whole_ticks
from vjepa_scale.video.inspect import Decoded, VideoFacts

SHORTEST_SIDE = 16  # pixels: one patch
SLOWEST, FASTEST = Fraction(1, 60), Fraction(1000)  # allowed frame rates, frames per second
_STANDARD_RATES = [Fraction(n, d) for n, d in ((24000, 1001), (30000, 1001), (60000, 1001))]
_STANDARD_RATES += [Fraction(n) for n in (24, 25, 30, 50, 60)]
_SNAP = 1e-3  # of the rate
_NEAR = 0.6  # of an output frame: half of one, plus the rounding of times in containers
_LARGEST_DENOMINATOR = 1001
# Typical bits per pixel of real videos after encode.py, in the range 0.02 to 0.5. Noise takes ten times as many.
_TYPICAL_BITS = 0.12


@dataclass(frozen=True)
class Transcode:
    """A transcode of a part of a video.

    start_s, end_s: the shown part, in seconds of the source
    rate: frames per second, as a fraction: "30000/1001"; frames, width, height: of the new, upright video
    shown: a digest of the source pictures that it shows, in order
    stamped: constant rate of the source's frames, a fraction, where its timestamps are not used
    """

    start_s: float
    end_s: float
    rate: str
    frames: int
    width: int
    height: int
    shown: str
    stamped: str | None = None


def plan_transcodes(
    decoded: Decoded,
    *,
    short_side: int | None,
    fps: Fraction | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    segment_s: float | None = None,
) -> list[Transcode]:
    """Returns the parts that cover start_s to end_s, each segment_s long except the last. Encodes nothing.

    short_side: maximum in pixels; None keeps the size. fps: None for the source's
    Parts begin and end where the picture changes, at the change nearest to the requested time (elsewhere only where
    no change is within half an output frame), so that no picture is split, lost or doubled between segments.
    Raises DecodeError.
    """
    facts = decoded.facts
    if (start_s or 0.0) >= facts.duration:
        raise DecodeError("no such part", f"start {start_s} s, the video ends at {facts.duration:.3f} s")
    rate = standard_rate(facts.fps) if fps is None else fps
    changes = np.append(decoded.times_s, facts.duration)

    def at_change(time_s: float) -> float:
        nearest = float(changes[np.abs(changes - time_s).argmin()])
        return nearest if abs(nearest - time_s) <= _NEAR / rate else time_s

    begin, end = start_s or 0.0, min(end_s or facts.duration, facts.duration)
    bounds = [at_change(begin)]
    if segment_s is not None:
        asked = begin + segment_s * np.arange(1, int((end - begin) / segment_s) + 1)
        for bound in map(at_change, asked.tolist()):
            if (bound - bounds[-1]) * rate >= 0.5:
                bounds.append(bound)
    end = at_change(end)
    if (end - bounds[-1]) * rate < 0.5:  # less than one frame remains
        if len(bounds) > 1:
            bounds.pop()
        else:  # less than one frame was requested: use one that ends with the video at the latest
            bounds = [at_change(max(0.0, min(begin, facts.duration - float(1 / rate))))]
            end = at_change(min(bounds[0] + float(1 / rate), facts.duration))
    bounds.append(end)
    width, height = _even_size(facts.width, facts.height, short_side)
    return [_part(decoded, first, last, rate, width, height) for first, last in pairwise(bounds)]


def standard_rate(fps: float) -> Fraction:
    """Returns the standard rate within 0.1 % of a mean rate, or else a simple fraction."""
    nearest = min(_STANDARD_RATES, key=lambda rate: abs(float(rate) / fps - 1))
    if abs(float(nearest) / fps - 1) <= _SNAP:
        return nearest
    if fps >= 1:
        return Fraction(fps).limit_denominator(_LARGEST_DENOMINATOR)
    return 1 / Fraction(1 / fps).limit_denominator(_LARGEST_DENOMINATOR)


def _even_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Returns an even size, never above the source's; the short side at most short_side, the other in proportion."""
    short, long = sorted((width, height))
    if short_side is None or short_side >= short:
        return max(2, width // 2 * 2), max(2, height // 2 * 2)
    new_short = short_side // 2 * 2
    new_long = min(round(long * new_short / short / 2), long // 2) * 2
    return (new_short, new_long) if width <= height else (new_long, new_short)


def _part(decoded: Decoded, start_s: float, end_s: float, rate: Fraction, width: int, height: int) -> Transcode:
    frames = max(1, int((end_s - start_s) * float(rate) + 0.5))
    ticks = np.rint(decoded.times_s / decoded.tick_s).astype(np.int64)
    wanted = whole_ticks(middles(start_s, rate, frames), decoded.tick_s)
    shown = np.maximum(np.searchsorted(ticks, wanted, side="right") - 1, 0)
    digest = digest_of(decoded.digests[i] for i in shown.tolist())
    stamped = None if decoded.stamped is None else str(decoded.stamped)
    return Transcode(start_s, end_s, f"{rate.numerator}/{rate.denominator}", frames, width, height, digest, stamped)


def middles(start_s: float, rate: Fraction, frames: int) -> npt.NDArray[np.float64]:
    """Returns the middle of each output frame's interval, in seconds of the source."""
    return np.asarray(start_s + (np.arange(frames) + 0.5) * float(1 / rate), np.float64)


def digest_of(digests: Iterable[bytes]) -> str:
    """Returns a digest of a part, from the digests of its pictures."""
    total = hashlib.blake2b(digest_size=8)
    for digest in digests:
        total.update(digest)
    return total.hexdigest()


def digest_of_part(source_sha256: str, part: Transcode) -> str:
    """Returns a key of a part, which differs for other parts and for sources with other bytes (at equal settings)."""
    return hashlib.sha256(f"{source_sha256} {part.start_s!r} {part.end_s!r}".encode()).hexdigest()


def facts_of(transcode: Transcode) -> VideoFacts:
    """Returns the facts that probing the new video will find, exactly."""
    tick_s, gap = clock(Fraction(transcode.rate))
    seconds, frames = float(tick_s), transcode.frames
    duration = (frames * gap) * seconds
    fps = (frames - 1) / (((frames - 1) * gap) * seconds) if frames > 1 else 1 / duration
    return VideoFacts(duration, fps, frames, transcode.width, transcode.height)


def typical_bytes(transcode: Transcode) -> int:
    """Estimates the bytes of the new video, since shards are planned before anything is encoded."""
    return int(transcode.frames * transcode.width * transcode.height * _TYPICAL_BITS / 8)


def clock(rate: Fraction) -> tuple[Fraction, int]:
    """Returns seconds per tick of the new file, and ticks per frame. (Players expect about 10,000 ticks per second.)"""
    finer = 1 << (10_000 // rate.numerator).bit_length()
    return Fraction(1, rate.numerator * finer), rate.denominator * finer
