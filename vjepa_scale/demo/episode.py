"""A planned episode as a strip of pictures."""

from pathlib import Path

from vjepa_scale.data.trajectories import Floats
from vjepa_scale.demo.synthetic import U8


def draw_episode(path: Path, pictures: U8, goal: U8, distances_m: Floats, *, title: str) -> None:
    """Write a PNG or SVG, by the path's ending: what the camera saw at each step, and the goal at the end.

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
