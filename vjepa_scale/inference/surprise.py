"""Surprise: how far a video deviates from the model's predictions (violation of expectation).

A window slides over the video. The encoder sees the window's first frames, and the predictor predicts the features of
the others. Surprise is the mean absolute difference to the normalised features of the whole window. Source: "Intuitive
physics understanding emerges from self-supervised pretraining on natural videos", arXiv 2502.11831. There, the mean
over the windows decides between two videos that differ in one event, and the maximum rates a single video.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa_scale.checkpoint.formats.source import future_mask_token
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.clips import Size

if TYPE_CHECKING:
    from vjepa_scale.inference.model import Model

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class Surprise:
    """Prediction errors over a video's windows and token steps, and their summaries.

    Numbers are mean absolute differences of features that are normalised over D, so their unit is the standard
    deviation of a token's features; 0 is a perfect prediction. Compare videos under one model and one setting only.

    errors:         float32 [B, C, W, s]: by context length, window, and token step of the window; the mean over space
                    and D. NaN in the context
    context_frames: the C context lengths
    first_steps:    int64 [W], the number of each window's first token step in the video
    start_s, end_s: float64 [t], seconds: start and end of each token step in the video. Frames after the last whole
                    tubelet are in no window
    """

    errors: Tensor
    context_frames: tuple[int, ...]
    first_steps: Tensor
    start_s: Tensor
    end_s: Tensor

    @property
    def windows(self) -> Tensor:
        """[B, W]: the mean over all predictions of a window, then over the context lengths."""
        return self.errors.nanmean(-1).mean(1)

    @property
    def window_start_s(self) -> Tensor:
        """[W] seconds."""
        return self.start_s[self.first_steps]

    @property
    def window_end_s(self) -> Tensor:
        """[W] seconds."""
        return self.end_s[self.first_steps + self.errors.shape[-1] - 1]

    @property
    def mean(self) -> Tensor:
        """[B]: over the windows."""
        return self.windows.mean(-1)

    @property
    def maximum(self) -> Tensor:
        """[B]: over the windows."""
        return self.windows.amax(-1)

    @property
    def curve(self) -> Tensor:
        """[B, t]: the mean of all predictions of each token step. NaN in the first steps, which no window predicts.

        A step in the middle of a video is predicted from several distances, the first and last ones from one window
        only. Where that matters, use one column of ``errors``, which has a single distance.
        """
        steps = (self.first_steps[:, None] + torch.arange(self.errors.shape[-1])).flatten()
        sums = torch.zeros(len(self.errors), len(self.start_s))
        sums.index_add_(1, steps, self.errors.nansum(1).flatten(1))
        counts = torch.zeros(len(self.start_s))
        counts.index_add_(0, steps, (~self.errors[0].isnan()).sum(0).flatten().float())
        return sums / counts


@torch.no_grad()
def surprise(
    model: Model,
    video: str | Path | Tensor,
    *,
    context_frames: int | Sequence[int] | None = None,
    stride: int | None = None,
    window: int | None = None,
    mask_token: int | None = None,
    fps: float | None = None,
    size: int | Size | None = None,
    start: float = 0.0,
    batch: int = 8,
) -> Surprise:
    """Measures the surprise of a video of any length, from ``start`` on. Holds a few windows of a file in memory.

    video:          a file, or a normalised clip [B, 3, T, H, W] (its first frame is at ``start`` seconds)
    context_frames: number of context frames in a window; the others are predicted. Several lengths: each in turn.
                    Default: half of the window
    stride:         frames from one window to the next. Default: a tubelet, as published
    window:         frames. Default: the checkpoint's clip length
    mask_token:     index of the mask token for the future. Default: that of the recipe's first mask generator whose
                    context is the past; a model trained without one is weak at this task (docs/surprise.md)
    fps, size:      as in ``Model.preprocess``
    batch:          windows per forward pass

    All lengths are multiples of the tubelet. Where the stride does not reach the last token step, one more window ends
    there. The checkpoint's encoder, by default the EMA target encoder, encodes both targets (from the whole window) and
    context. Raises UserError where the video is shorter than a window.
    """
    tubelet = model.config.model.tubelet
    window = _frames(window, model.config.frames, tubelet, least=2 * tubelet, most=None, name="window")
    if context_frames is None or isinstance(context_frames, int):
        context_frames = (window // tubelet // 2 * tubelet if context_frames is None else context_frames,)
    contexts = tuple(
        _frames(length, 0, tubelet, least=tubelet, most=window - tubelet, name="context_frames")
        for length in context_frames
    )
    if not contexts:
        raise UserError("no length of the context", where="surprise context_frames", fix="one or more")
    # A larger stride would leave steps that no window predicts.
    stride = _frames(stride, tubelet, tubelet, least=tubelet, most=window - min(contexts), name="stride")
    if batch < 1:
        raise UserError(f"{batch} windows", where="surprise batch", fix="1 or more")
    token = future_mask_token(model.config) if mask_token is None else mask_token
    fps = model.frames_per_second(fps)

    pictures = model.pictures(video, fps=fps, size=size, start=start)
    slid = sliding(pictures, tubelet=tubelet, window=window, stride=stride)
    firsts, errors = list[int](), list[Tensor]()
    while some := list(islice(slid, batch)):
        firsts += [first for first, _ in some]
        errors.append(_errors(model, [model.joined(clip) for _, clip in some], contexts, token))
    steps = torch.arange(firsts[-1] + window // tubelet, dtype=torch.float64) * tubelet / fps + start
    return Surprise(torch.cat(errors, dim=2), contexts, torch.tensor(firsts), steps, steps + tubelet / fps)


def sliding(
    pictures: Iterable[Picture], *, tubelet: int, window: int, stride: int
) -> Iterator[tuple[int, list[Picture]]]:
    """Yields (number of the first token step, pictures) of windows that begin ``stride`` pictures apart.

    The last window ends with the last whole tubelet, for any stride. Raises UserError where there is no window.
    """
    steps = deque[list[Picture]](maxlen=window // tubelet)
    count, last, source = 0, None, iter(pictures)
    while len(step := list(islice(source, tubelet))) == tubelet:
        steps.append(step)
        count += 1
        first = count - window // tubelet
        if first >= 0 and first % (stride // tubelet) == 0:
            last = first
            yield first, [picture for step in steps for picture in step]
    if last is None:
        raise UserError(
            f"a video of {count * tubelet + len(step)} frames, a window of {window}",
            where="surprise",
            fix="a longer video, a smaller window, or more frames per second",
        )
    if last < count - window // tubelet:
        yield count - window // tubelet, [picture for step in steps for picture in step]


def _errors(model: Model, clips: list[Tensor], contexts: Sequence[int], token: int) -> Tensor:
    """Returns the errors of W windows [B, 3, F, H, W] in one batch: [B, C, W, s], on the CPU."""
    together = torch.cat(clips)
    tokens_BND = model.encode_clips(together)
    targets_BND = F.layer_norm(tokens_BND, tokens_BND.shape[-1:])
    tubelet = model.config.model.tubelet
    steps = together.shape[2] // tubelet
    space = tokens_BND.shape[1] // steps
    places = torch.arange(steps * space)
    errors = torch.full((len(together), len(contexts), steps), torch.nan)
    for number, length in enumerate(contexts):
        seen = length // tubelet
        predicted = model.predict(together, places[: seen * space], places[seen * space :], token)
        apart = (predicted - targets_BND[:, seen * space :]).abs()
        errors[:, number, seen:] = apart.unflatten(1, (-1, space)).mean((2, 3)).cpu()
    return errors.unflatten(0, (len(clips), -1)).permute(1, 2, 0, 3)


def _frames(value: int | None, default: int, tubelet: int, *, least: int, most: int | None, name: str) -> int:
    value = default if value is None else value
    if value % tubelet or value < least or (most is not None and value > most):
        limits = f"from {least}" + ("" if most is None else f" to {most}")
        raise UserError(
            f"{value} frames", where=f"surprise {name}", fix=f"a multiple of {tubelet} (the tubelet) {limits}"
        )
    return value
