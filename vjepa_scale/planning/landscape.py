"""Energy landscape: energies of one step's actions over two of their numbers, to check that the model finds the goal.

Drawn as in the V-JEPA 2 paper and its code. There should be one minimum, near the true action.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.planning.cem import Imagine

# The 7 numbers of an action, and their units.
AXES = (
    ("Δx", "m"),
    ("Δy", "m"),
    ("Δz", "m"),
    ("Δroll", "rad"),
    ("Δpitch", "rad"),
    ("Δyaw", "rad"),
    ("Δgripper", "0 open, 1 closed"),
)


@dataclass(frozen=True)
class Landscape:
    """axes: two numbers of the first action; values: [n] of each, ascending; energies: [n, n], indexed by first axis,
    then second."""

    axes: tuple[int, int]
    values: tuple[Tensor, Tensor]
    energies: Tensor

    @property
    def lowest(self) -> tuple[float, float]:
        """Returns the point on the two axes with the least energy."""
        row, column = divmod(int(self.energies.argmin()), self.energies.shape[1])
        return float(self.values[0][row]), float(self.values[1][column])


def check_landscape(path: str | Path, axes: Sequence[int]) -> None:
    """Raises UserError where the picture could not be written, or both axes are the same, before planning starts."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"no picture can be called {path.name!r}", where=path, fix="end the name in .png or .svg")
    if not path.parent.is_dir():
        raise UserError("no such folder", where=path.parent, fix="make it, or write elsewhere")
    if axes[0] == axes[1]:
        raise UserError(f"{axes[0]} and {axes[1]} are one axis", where="axes", fix="two different ones of 0 … 6")


@torch.no_grad()
def energy_landscape(
    imagine: Imagine,
    state_7: Tensor,
    *,
    axes: tuple[int, int] = (0, 1),
    limits: tuple[float, float] = (0.05, 0.05),
    points: int = 21,
    around_H7: Tensor | None = None,
    episode: int = 0,
    rows: int = 1024,
) -> Landscape:
    """Returns energies on a grid of points × points actions, from −limit to +limit on each axis.

    state_7:   the robot's state
    around_H7: actions whose other numbers are kept; default: one step, and all others 0
    episode:   index of this start and goal for ``imagine``; rows: actions per call of it
    """
    assert axes[0] != axes[1], f"axes {axes} are one"
    around = state_7.new_zeros(1, 7) if around_H7 is None else around_H7
    first, second = (torch.linspace(-limit, limit, points).to(state_7) for limit in limits)
    actions = around.repeat(points * points, 1, 1)
    actions[:, 0, list(axes)] = torch.cartesian_prod(first, second)
    energies = []
    for some in actions.split(rows):
        number = torch.full((len(some),), episode, device=some.device)
        energies.append(imagine(state_7.expand(len(some), 7), some, number).energy)
    return Landscape(axes, (first, second), torch.cat(energies).unflatten(0, (points, points)))


def draw_landscape(
    path: str | Path,
    landscape: Landscape,
    *,
    true_7: Tensor | None = None,
    planned_7: Tensor | None = None,
    title: str = "Energy of the first action",
) -> None:
    """Draws a landscape as PNG or SVG, by the file name, with the true and the planned action where they are given.

    Raises UserError for another file name, and where its folder is missing.
    """
    path = Path(path)
    check_landscape(path, landscape.axes)
    # Imported here, because the import takes half a second and only pictures need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Without a date and with fixed ids, an SVG has the same bytes every time. Text stays text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "landscape"}):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        plot = figure.add_subplot()
        first, second = (values.cpu().double().numpy() for values in landscape.values)
        energies = landscape.energies.cpu().double().numpy()
        mesh = plot.pcolormesh(first, second, energies.T, shading="nearest", cmap="viridis", rasterized=True)
        plot.contour(first, second, energies.T, levels=8, colors="white", linewidths=0.5, alpha=0.6)
        figure.colorbar(mesh, ax=plot, label="energy: mean |imagined − goal|")
        marked = partial(plot.plot, linestyle="none", markeredgecolor="black")
        marked(*landscape.lowest, marker="o", color="white", label="least energy")
        for action, marker, colour, label in (
            (true_7, "*", "#ff4d4d", "true action"),
            (planned_7, "X", "#ffb000", "planned action"),
        ):
            if action is not None:
                at = [float(action[axis]) for axis in landscape.axes]
                marked(*at, marker=marker, color=colour, markersize=11, label=label)
        across, up = ("{} ({})".format(*AXES[axis]) for axis in landscape.axes)
        plot.set_xlabel(across)
        plot.set_ylabel(up)
        plot.set_title(title)
        plot.legend(loc="upper right", fontsize="small")
        nothing = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=nothing)
