"""Draws masks over frames, features as colours, and an episode as a strip of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vjepa_scale.data.trajectories import Floats
from vjepa_scale.demo.synthetic import U8
from vjepa_scale.masking.generator import Grid, Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F32 = npt.NDArray[np.float32]

_HIDDEN = 0.2  # brightness of places that the encoder does not see
_TARGET = np.array([1.0, 0.55, 0.1])  # colour over the targets


def draw_masks(path: Path, frames_THW3: U8, masks: Mapping[str, tuple[Mask, Mask]], grid: Grid) -> None:
    """Draws a row of frames for each mask generator: the context, and the targets in orange.

    frames_THW3: of one clip; masks: context and target tokens [1, t·h·w] of each generator, by its name
    """
    T = len(frames_THW3)
    every = T // grid[0]
    figure, rows = _figure(1 + len(masks), grid[0])
    shown = frames_THW3[::every] / 255
    for plot, frame in zip(rows[0], shown, strict=True):
        plot.imshow(frame)
    _name(rows[0], "clip")
    for row, (name, (context, target)) in zip(rows[1:], masks.items(), strict=True):
        over = [_over_pixels(mask.reshape(grid), frames_THW3.shape[1:3]) for mask in (context, target)]
        for plot, frame, seen, wanted in zip(row, shown, *over, strict=True):
            picture = np.where(seen[..., None], frame, _HIDDEN * frame)
            plot.imshow(np.where(wanted[..., None], 0.45 * frame + 0.55 * _TARGET, picture))
        _name(row, name)
    _save(figure, path, "What the encoder sees, and what is predicted (orange)")


def draw_features(path: Path, clips: U8, tokens: Mapping[str, Tensor], grid: Grid) -> None:
    """Draws the first three principal components of patch features as red, green and blue, below their frames.

    clips:  [n, T, H, W, 3];  tokens: [n, t·h·w, D] of each encoder, by its name
    """
    n, T = clips.shape[:2]
    figure, rows = _figure(n * (1 + len(tokens)), grid[0])
    colours = {name: principal_colours(value).reshape(n, *grid, 3) for name, value in tokens.items()}
    for number in range(n):
        mine = rows[number * (1 + len(tokens)) : (number + 1) * (1 + len(tokens))]
        for plot, frame in zip(mine[0], clips[number, :: T // grid[0]], strict=True):
            plot.imshow(frame)
        _name(mine[0], f"clip {number + 1}")
        for row, (name, values) in zip(mine[1:], colours.items(), strict=True):
            for plot, value in zip(row, values[number], strict=True):
                plot.imshow(value, interpolation="nearest")
            _name(row, name)
    _save(figure, path, "Patch features: their first three principal components as colours")


def principal_colours(tokens_BND: Tensor) -> F32:
    """Returns projections on the first three principal components over all tokens, each scaled to [0, 1]: [B, N, 3].

    The middle 98 % of a component's values cover the whole range, because outliers would leave the rest grey.
    """
    flat = tokens_BND.detach().flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    values = (centred @ vectors[:, -3:].flip(1)).numpy()
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    spread = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return spread.astype(np.float32).reshape(*tokens_BND.shape[:2], 3)


def _over_pixels(tokens_thw: Mask, size: tuple[int, ...]) -> Mask:
    """Upsamples a mask of tokens, [t, h, w], to the pixels of one frame per token step: [t, H, W]."""
    patch = size[0] // tokens_thw.shape[1]
    return tokens_thw.repeat(patch, 1).repeat(patch, 2)


def _figure(rows: int, columns: int) -> tuple["Figure", npt.NDArray[Any]]:
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    figure = Figure(figsize=(1.3 * columns + 0.8, 1.35 * rows + 0.5), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set_xticks([])
        plot.set_yticks([])
    return figure, plots


def _name(row: npt.NDArray[Any], name: str) -> None:
    row[0].set_ylabel(name, fontsize="small")


def _save(figure: "Figure", path: Path, title: str) -> None:
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_episode(path: Path, pictures: U8, goal: U8, distances_m: Floats, *, title: str) -> None:
    """Writes a PNG or SVG, by the path's ending: the camera's picture at each step, and the goal at the end.

    pictures: [steps + 1, H, W, 3]; goal: [H, W, 3]; distances_m: from the hand to its goal at each step
    """
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    frames = [*pictures, goal]
    names = [f"step {step}\n{100 * left:.0f} cm" for step, left in enumerate(distances_m)] + ["goal"]
    figure = Figure(figsize=(1.1 * len(frames), 1.7), layout="constrained")
    for plot, frame, name in zip(figure.subplots(1, len(frames)), frames, names, strict=True):
        plot.imshow(frame)
        plot.set_axis_off()
        plot.set_title(name, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
