"""Draws masks over frames, features as colours, and an episode as a strip of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from torch import Tensor

from vjepa_scale.data.trajectories import Floats
from vjepa_scale.demo.synthetic import U8
from vjepa_scale.masking.generator import Grid, Mask
from vjepa_scale.report.pictures import masked_frames, principal_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_masks(path: Path, frames_THW3: U8, masks: Mapping[str, tuple[Mask, Mask]], grid: Grid) -> None:
    """Draws a row of frames for each mask generator: the context, and the targets in orange.

    frames_THW3: of one clip; masks: context and target tokens [1, t·h·w] of each generator, by its name
    """
    T = len(frames_THW3)
    every = T // grid[0]
    figure, rows = _figure(1 + len(masks), grid[0])
    shown = frames_THW3[::every]
    for plot, frame in zip(rows[0], shown, strict=True):
        plot.imshow(frame)
    _name(rows[0], "clip")
    for row, (name, (context, target)) in zip(rows[1:], masks.items(), strict=True):
        for plot, frame in zip(row, masked_frames(shown, context.reshape(grid), target.reshape(grid)), strict=True):
            plot.imshow(frame)
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
