"""A trained model: maps clips to features and predictions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, future_mask_token, trained_mask_token
from vjepa_scale.checkpoint.load import network_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.clips import Chunk, Size, clip_of_array, clip_of_file, cropped_pictures, cut_chunks
from vjepa_scale.inference.surprise import Surprise, surprise
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.encoder import PixelNormaliser
from vjepa_scale.model.positions import Grid
from vjepa_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class Features:
    """Tokens of a video, and the times of its token steps.

    tokens:         float32 [B, N, D], N = t·h·w, step by step, row by row; for several layers [B, L, N, D]
    grid:           (t, h, w)
    start_s, end_s: float64 [t], seconds: start and end of each token step in the video. The last one is shorter where
                    the last picture was repeated to complete its tubelet
    """

    tokens: Tensor
    grid: Grid
    start_s: Tensor
    end_s: Tensor


def load_model(
    path: str | Path,
    device: str | torch.device | None = "cpu",
    *,
    model: str | ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> "Model":
    """Loads a trained model, in eval mode.

    device:      None: a GPU where there is one
    path, model: as for load_encoder: weights of any format, and the model where the path does not contain it
    dtype:       of weights and activations; features are always float32

    Raises UserError where the path is something else, or where there is no such device.
    """
    return Model(Path(path), usable_device(device), model, dtype)


class Model:
    """Encoder and predictor of a checkpoint, with the preprocessing of their input.

    config: geometry, frame rate and normalisation of the checkpoint; the defaults of the methods' arguments
    Methods run without gradients. Raises UserError for input that does not fit.
    """

    def __init__(self, path: Path, device: torch.device, model: str | ModelConfig | None, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._source = open_weights(path, model=model)  # once: of a run, every byte is verified
        self.config: ConsolidatedConfig = self._source.config
        self.encoder: Encoder = network_of(self._source, "encoder", Encoder, device).to(dtype).requires_grad_(False)
        self._pixels = PixelNormaliser(self.config.mean, self.config.std, device)

    @cached_property
    def predictor(self) -> Predictor:
        """The predictor, read on first use, because features do not need it."""
        predictor = network_of(self._source, "predictor", Predictor, self.device)
        return predictor.to(self.dtype).requires_grad_(False)

    # -- clips -------------------------------------------------------------------------------------

    def preprocess(
        self,
        video: str | Path | Any,
        frames: int | Literal["all"] | None = None,
        fps: float | None = None,
        size: int | Size | None = None,
        start: float = 0.0,
    ) -> Tensor:
        """Returns a normalised clip, float32 [1, 3, T, H, W].

        video:  a video file; an image file, which becomes a static clip; or pictures: uint8 RGB [T, H, W, 3], taken
                to be 1/fps seconds apart, or [H, W, 3], an image
        frames: T. Default: the checkpoint's (of pictures in memory: all). "all": to the end of the video
        fps:    pictures per second: picture k is the one on screen at start + k/fps s. Default: the checkpoint's
        size:   pixels, or (height, width): resizes the short side to fit, and crops the centre. Default: the
                checkpoint's
        start:  seconds

        A clip past the end of the video repeats the last picture, as training does for short videos.
        """
        in_file = isinstance(video, str | Path)
        if frames is None and in_file:
            frames = self.config.frames
        if isinstance(frames, int) and frames < 1:
            raise UserError(f"{frames} frames", where="preprocess", fix='1 or more, or "all"')
        clip_of = clip_of_file if in_file else clip_of_array
        clip = clip_of(
            video,
            frames=None if frames == "all" else frames,
            fps=self.frames_per_second(fps),
            size=self._size(size),
            start_s=_not_negative(start),
            still=self.config.frames,
        )
        return self.normalise(clip[None])

    def normalise(self, clips: Tensor) -> Tensor:
        """Converts uint8 clips [B, 3, T, H, W] to float32 on the model's device, (pixel in 0 … 1 − mean) / std."""
        return self._pixels(clips)

    # -- features ----------------------------------------------------------------------------------

    def encode(
        self,
        video: str | Path | Tensor,
        chunk: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        fps: float | None = None,
        size: int | Size | None = None,
        start: float = 0.0,
    ) -> Features:
        """Returns features of a video of any length, from ``start`` to its end. Arguments: see ``encode_chunks``."""
        parts = list(self.encode_chunks(video, chunk, layers=layers, fps=fps, size=size, start=start))
        return Features(
            tokens=torch.cat([part.tokens for part in parts], dim=-2),
            grid=(sum(part.grid[0] for part in parts), *parts[0].grid[1:]),
            start_s=torch.cat([part.start_s for part in parts]),
            end_s=torch.cat([part.end_s for part in parts]),
        )

    def encode_chunks(
        self,
        video: str | Path | Tensor,
        chunk: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        fps: float | None = None,
        size: int | Size | None = None,
        start: float = 0.0,
    ) -> Iterator[Features]:
        """Yields features chunk by chunk; of a file, at most two chunks are in memory at a time.

        video:  a file, or a normalised clip [B, 3, T, H, W] of any T (its first frame is at ``start`` seconds)
        chunk:  frames per forward pass; a multiple of the tubelet. Default: the checkpoint's clip length
        layers: block numbers, each through the final norm; default: the encoder's output
        fps, size: as in ``preprocess``

        Every token step comes from exactly one forward pass. The rest after the last whole chunk is encoded together
        with earlier pictures, in a clip of the same length, and only the new steps are returned. A video shorter than a
        chunk is encoded in its own length. An odd last picture is repeated to complete its tubelet, and ``end_s`` is
        then shorter. An image is a static clip of the checkpoint's length.
        """
        chunk, fps, start = chunk or self.config.frames, self.frames_per_second(fps), _not_negative(start)
        tubelet = self.config.model.tubelet
        if chunk < 1 or chunk % tubelet:
            raise UserError(f"chunks of {chunk} frames", where="encode", fix=f"a multiple of {tubelet} (the tubelet)")
        for part in cut_chunks(self.pictures(video, fps=fps, size=size, start=start), chunk=chunk, tubelet=tubelet):
            clip = self.joined(part.frames)
            yield self._features(clip, part, layers=layers, fps=fps, start_s=start)

    def pictures(
        self,
        video: str | Path | Tensor,
        *,
        fps: float | None = None,
        size: int | Size | None = None,
        start: float = 0.0,
    ) -> Iterable[Tensor]:
        """Yields single pictures for ``joined``: of a file uint8 [1, 3, 1, H, W] from ``start``, of a clip its frames.

        video, fps, size, start: as in ``encode_chunks``. An image is repeated to the checkpoint's clip length.
        """
        fps, start = self.frames_per_second(fps), _not_negative(start)
        if isinstance(video, Tensor):
            return _normalised(video).split(1, dim=2)
        pictures, is_image = cropped_pictures(video, fps=fps, size=self._size(size), start_s=start)
        frames = (picture[None] for picture in pictures)
        return list(frames) * self.config.frames if is_image else frames

    def joined(self, pictures: Sequence[Tensor]) -> Tensor:
        """Joins pictures of ``pictures`` to a normalised clip [B, 3, T, H, W] on the model's device."""
        clip = torch.cat(list(pictures), dim=2)
        return clip.to(self.device) if clip.is_floating_point() else self.normalise(clip)

    def _features(
        self, clip: Tensor, part: Chunk[Tensor], *, layers: Sequence[int] | None, fps: float, start_s: float
    ) -> Features:
        """Returns the features of a chunk's new steps."""
        tubelet = self.config.model.tubelet
        _, height, width = self.encoder.patch_embed.grid(clip)
        steps = part.new // tubelet
        tokens = self.encode_clips(clip, layers)[..., -steps * height * width :, :]
        numbers = part.first + torch.arange(steps, dtype=torch.float64) * tubelet
        ends = (numbers + tubelet).clamp(max=part.first + part.real)
        return Features(tokens, (steps, height, width), start_s + numbers / fps, start_s + ends / fps)

    @torch.no_grad()
    def encode_clips(self, clips: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Runs one forward pass: normalised clips [B, 3, T, H, W] → float32 [B, N, D], or [B, L, N, D] of L layers."""
        clips = clips.to(self.device, self.dtype)
        if layers is None:
            return self.encoder(clips).float()
        return torch.stack(self.encoder.layers(clips, layers), dim=1).float()

    # -- predictions -------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, clip: Tensor, context: Tensor, target: Tensor, mask_token: int | None = None) -> Tensor:
        """Returns predicted features at the target places, float32 [B, M, D], from the context's pixels only.

        clip:            normalised [B, 3, T, H, W]
        context, target: int64 token numbers n = τ·h·w + y·w + x, [B, K] and [B, M], or [K] and [M] for all clips
        mask_token:      index of the learned mask token for the targets (modulo their number). A recipe's mask
                         generator j trains token j: 0 short-range, 1 long-range masks, unless jepa.mask_token makes
                         all generators train the first. Default: that of long-range masks, if it was trained

        The predictions are *normalised* features: the predictor learns layer_norm(tokens) over D, without parameters.
        Compare them with that, not with the tokens of ``encode``.
        """
        grid = self.encoder.patch_embed.grid(_normalised(clip))
        context_BK, target_BM = (
            self._places(name, places, clip.shape[0], grid)
            for name, places in (("context", context), ("target", target))
        )
        tokens_BKD = self.encoder(clip.to(self.device, self.dtype), context_BK)
        token = trained_mask_token(self.config) if mask_token is None else mask_token
        return self.predictor(tokens_BKD, context_BK, target_BM, grid, token).float()

    def rollout(
        self, clip: Tensor, frames: int, mask_token: int | None = None, *, fps: float | None = None
    ) -> Features:
        """Predicts features of the ``frames`` frames that follow a clip; times are from the clip's first frame.

        clip: normalised [B, 3, T, H, W]; T and ``frames`` are multiples of the tubelet

        Runs the predictor once: every token of the clip is context, and all places of the later steps are targets. The
        features are normalised, as those of ``predict``. They are neither pixels nor samples: where several futures
        are possible, the prediction is an average of them. Predictions are not fed back. Clip and future together
        should not be longer than training's clips. Masks that hide the whole end of a clip (``kind: future``, or
        ``max_context_frames`` below 1) train this task; where a recipe has them, their mask token is the default.
        """
        tubelet = self.config.model.tubelet
        if frames < 1 or frames % tubelet:
            raise UserError(
                f"{frames} frames to predict", where="rollout", fix=f"a multiple of {tubelet} (the tubelet)"
            )
        steps, height, width = self.encoder.patch_embed.grid(clip)
        later = frames // tubelet
        table = self.config.model.sincos.frames if self.config.model.positions == "sincos" else None
        if table is not None and (steps + later) * tubelet > table:
            raise UserError(
                f"{(steps + later) * tubelet} frames in all: this model's table of positions has {table}",
                where="rollout",
                fix="a shorter clip, or fewer frames",
            )
        known, every = steps * height * width, (steps + later) * height * width
        # The encoder selects the context's tubelets first, so the values of the future frames are not used.
        unknown = clip.new_zeros(*clip.shape[:2], frames, *clip.shape[3:])
        places = torch.arange(every)
        token = future_mask_token(self.config) if mask_token is None else mask_token
        tokens = self.predict(torch.cat([clip, unknown], dim=2), places[:known], places[known:], token)
        starts = torch.arange(steps, steps + later, dtype=torch.float64) * tubelet / self.frames_per_second(fps)
        return Features(tokens, (later, height, width), starts, starts + tubelet / self.frames_per_second(fps))

    def surprise(
        self,
        video: str | Path | Tensor,
        *,
        context_frames: int | Sequence[int] | None = None,
        stride: int | None = None,
        window: int | None = None,
        mask_token: int | None = None,
        fps: float | None = None,
        size: int | Size | None = None,
        start: float = 0.0,
    ) -> Surprise:
        """Measures how far a video deviates from the model's predictions. Arguments: see ``surprise.surprise``."""
        return surprise(
            self,
            video,
            context_frames=context_frames,
            stride=stride,
            window=window,
            mask_token=mask_token,
            fps=fps,
            size=size,
            start=start,
        )

    def _places(self, name: str, places: Tensor, batch: int, grid: Grid) -> Tensor:
        count = grid[0] * grid[1] * grid[2]
        if places.dtype != torch.int64 or places.ndim not in (1, 2) or (places.ndim == 2 and len(places) != batch):
            raise UserError(
                f"{places.dtype} of shape {list(places.shape)}",
                where=f"predict {name}",
                fix=f"int64 [K] or [{batch}, K]",
            )
        if not places.numel() or places.min() < 0 or places.max() >= count:
            raise UserError("no such token", where=f"predict {name}", fix=f"numbers in 0 … {count - 1}, at least one")
        return places.to(self.device).expand(batch, places.shape[-1])

    def frames_per_second(self, fps: float | None = None) -> float:
        """Returns the caller's rate, or the checkpoint's."""
        if fps is not None and not fps > 0:
            raise UserError(f"{fps} pictures per second", where="fps", fix="a number above 0")
        return fps or self.config.fps

    def _size(self, size: int | Size | None) -> Size:
        height, width = self.config.size if size is None else (size, size) if isinstance(size, int) else size
        patch = self.config.model.patch
        if min(height, width) < 1 or height % patch or width % patch:
            raise UserError(f"{height}×{width} pixels", where="size", fix=f"multiples of {patch} (the patch)")
        return height, width


def _not_negative(start: float) -> float:
    if not start >= 0:
        raise UserError(f"{start} s", where="start", fix="0 or later")
    return start


def _normalised(clip: Tensor) -> Tensor:
    """Returns the clip. Raises UserError where it is not a normalised clip."""
    if not clip.is_floating_point() or clip.ndim != 5 or not clip.numel():
        raise UserError(
            f"{clip.dtype} of shape {list(clip.shape)}",
            where="clip",
            fix="normalised clips [B, 3, T, H, W] (preprocess)",
        )
    return clip


def usable_device(asked: str | torch.device | None) -> torch.device:
    """Returns the requested device; None: a GPU where there is one. Raises UserError where the device is missing."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"{str(asked)!r} is no device", where="device", fix="cpu, cuda, or cuda:1") from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"{device}: {found} GPUs found", where="device", fix="cpu, or a GPU that PyTorch sees")
    return device
