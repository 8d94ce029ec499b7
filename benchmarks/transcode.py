"""Measures the cost of make_shards --transcode, and the clips per second before and after.

Plans and encodes a video with the usual keyframe every 250 frames, as make_shards does. Then decodes clips of 16 frames
at 4 per second from random times of both. Reports process CPU time, one thread. The video is sliding texture with some
noise; real ones may differ several times in bytes and decoding time.

    python benchmarks/transcode.py --size 1280x720 --seconds 20 --short-side 288
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vjepa_scale.core.errors import run_command
from vjepa_scale.shards.encode import transcode
from vjepa_scale.shards.transcode import plan_transcodes
from vjepa_scale.video.decode import pictures_at, upright_rgb
from vjepa_scale.video.inspect import decode_whole

_RATE = 30
_FRAMES, _FPS = 16, 4

_T = TypeVar("_T")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1280x720", metavar="WxH")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--short-side", type=int, default=288)
    parser.add_argument("--keyframe-every", type=int, default=250, metavar="FRAMES", help="in the source")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="the best counts")
    arguments = parser.parse_args(argv)
    if arguments.seconds * _FPS < _FRAMES:
        parser.error(f"--seconds: at least {_FRAMES // _FPS}, the length of a clip")
    width, height = map(int, arguments.size.split("x"))
    source = _make_video(width, height, arguments.seconds, arguments.keyframe_every)

    probing_s, decoded = _timed(lambda: decode_whole(source))
    (part,) = plan_transcodes(decoded, short_side=arguments.short_side)
    (same,) = plan_transcodes(decoded, short_side=None)
    made = {"source": (source, 0.0)}
    for name, planned in (("same size", same), (f"short side {arguments.short_side}", part)):
        taken_s, data = _timed(partial(transcode, source, planned))
        made[name] = data, taken_s

    print(f"{arguments.seconds} s of {width}x{height}, {_RATE} frames a second, a keyframe every ", end="")
    print(f"{arguments.keyframe_every} frames; probing takes {probing_s / arguments.seconds:.2f} CPU s per second\n")
    print(f"{'file':15} | {'MB':>6} | {'÷ source':>8} | {'CPU s per s':>11} | {'clips/s/core':>12} | {'× source':>8}")
    rate_before = None
    for name, (data, taken_s) in made.items():
        rate = max(_clips_per_second(data, arguments.seconds, arguments.clips) for _ in range(arguments.rounds))
        rate_before = rate_before or rate
        share, cost = len(data) / len(source), taken_s / arguments.seconds
        print(f"{name:15} | {len(data) / 1e6:6.2f} | {share:8.2f} | {cost:11.2f} ", end="")
        print(f"| {rate:12.2f} | {rate / rate_before:8.1f}")
    return 0


def _clips_per_second(data: bytes, seconds: int, clips: int) -> float:
    starts = np.random.default_rng(0).uniform(0, seconds - _FRAMES / _FPS, clips).tolist()
    taken_s, _ = _timed(lambda: [_clip(data, start) for start in starts])
    return clips / taken_s


def _clip(data: bytes, start_s: float) -> list[np.ndarray]:
    reformatter = VideoReformatter()
    pictures, aspect = pictures_at(data, [start_s + k / _FPS for k in range(_FRAMES)])
    return [upright_rgb(reformatter, picture, aspect) for picture in pictures]


def _timed(function: Callable[[], _T]) -> tuple[float, _T]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def _make_video(width: int, height: int, seconds: int, gop: int) -> bytes:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (height // 16 + 20, width // 16 + 20, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    plane = (0.7 * smooth + rng.integers(0, 60, smooth.shape)).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=_RATE, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = width, height, "yuv420p", gop
        for k in range(seconds * _RATE):
            x, y = int(150 + 150 * np.sin(k / 40)), int(150 + 150 * np.cos(k / 53))
            noise = rng.integers(0, 12, (height, width, 1), np.uint8)
            view = np.minimum(plane[y : y + height, x : x + width], 243) + noise
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


if __name__ == "__main__":
    run_command(main)
