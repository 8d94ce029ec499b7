"""Which frames the published code takes: at equal distances, whatever their times (``data.sampling: stride``)."""

import numpy as np
import numpy.typing as npt

# A rate that is measured from rounded timestamps (30.004) is not 31.
_RATE_TOLERANCE = 0.01


def strides(source_fps: float | npt.NDArray[np.float64], fps: float) -> npt.NDArray[np.int64]:
    """Frames from one of a clip to the next, of videos of these rates, before they are spread over the window."""
    return np.asarray(np.maximum(1, np.ceil(np.asarray(source_fps) - _RATE_TOLERANCE) // fps), np.int64)


def strided_frames(draw: float, *, source_frames: int, source_fps: float, fps: float, frames: int) -> tuple[int, ...]:
    """Numbers of the frames, from 0 in the order of display, of a clip of T frames: never past the video's last.

    draw: uniform in [0, 1): where in a video the window lies
    source_frames, source_fps: of the video; fps, frames: asked for, frames = T
    As published (src/datasets/video_dataset.py, one clip per video, without overlap): the stride is ⌈source fps⌉ // fps
    and the window T·stride frames, over which T numbers are spread evenly, first and last included, so that they
    are T·stride/(T−1) apart. A video that is not longer than the window is spread over as many of the T as
    its length holds strides, and its last frame fills the rest. The published code fails where the stride is 0; here
    it is 1 at least.
    """
    stride = int(strides(source_fps, fps))
    length = frames * stride
    if source_frames > length:
        first = int(draw * (source_frames - length))
        numbers = np.linspace(first, first + length, num=frames).clip(first, first + length - 1)
    else:
        spread = np.linspace(0, source_frames, num=source_frames // stride)[:frames]
        numbers = np.append(spread, [source_frames] * (frames - len(spread))).clip(0, source_frames - 1)
    return tuple(numbers.astype(int).tolist())
