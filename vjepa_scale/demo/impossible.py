"""Videos of the synthetic world that cannot be, and possible ones of the same pictures.

In that world a sheet of equal shapes slides on for ever as it began (synthetic.py). What breaks this is an event that
a model which has learned the world should not expect. Two possible videos are cut at the same moment and their ends
exchanged, which gives two impossible ones:

    reverse   the two move in opposite directions, and meet: exchanged, the motion turns back
    turn      they move at right angles: the motion turns a corner
    jump      the sheet of one is aside by half its lattice's period: it leaps there
    shape     they show different shapes: one turns into the other
    vanish    one has a bare background: the sheet is gone, or there all at once

Possible and impossible videos together show the same beginnings and the same ends, so neither are harder to predict
for what they show: only the event can make a difference. (Otherwise a bare background, for one, is easy to foresee,
and a sheet that vanishes makes for a *smaller* error.) As IntPhys has it, arXiv 1803.07616, where of two
possible and two impossible videos of the same things the sums are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.demo.synthetic import LABELS, MOTIONS, SHAPES, U8, Scene, World, noisy

EVENTS = ("reverse", "turn", "jump", "shape", "vanish")


@dataclass(frozen=True)
class CrossedVideos:
    """possible, impossible: uint8 [2, T, size, size, 3]. Video i of either begins alike; they differ from ``first`` on.

    event: one of EVENTS; label: ``shape-motion``, of the first possible one
    """

    possible: U8
    impossible: U8
    event: str
    label: str
    first: int


def render_impossible(world: World, seed: int, index: int, events: Sequence[str] = EVENTS) -> CrossedVideos:
    """Number ``index``, a function of the arguments. ``events`` take turns, and for each of them labels do.

    The event falls into the middle third of the video, uniformly. No scene is one of ``render_clip``'s.
    Raises UserError for unknown events, and for a world whose videos have less than six frames.
    """
    if not events or any(event not in EVENTS for event in events):
        raise UserError(f"no events {list(events)}", where="render_impossible", fix=f"some of {', '.join(EVENTS)}")
    frames = world.frames
    if frames < 6:
        raise UserError(f"videos of {frames} frames", where="render_impossible", fix="6 or more (seconds, fps)")
    event = events[index % len(events)]
    label = LABELS[index // len(events) % len(LABELS)]
    shape, motion = label.split("-")
    draws = KeyedRng(seed, "impossible", index)
    first = frames // 3 + draws.integer(frames // 3)
    another = [name for name in SHAPES if name != shape][draws.integer(len(SHAPES) - 1)]
    side = (-1, 1)[draws.integer(2)]
    scene = Scene.draw(draws, world)

    way = np.array(MOTIONS[motion], np.float64)
    across = side * np.array([-way[1], way[0]])
    # Of the second video: its shape, its direction, and how far aside its sheet is. Both are at the same place in the
    # last frame before the event.
    other_shape = {"shape": another, "vanish": None}.get(event, shape)
    other_way = {"reverse": -way, "turn": across}.get(event, way)
    leap = scene.period / 2 * across if event == "jump" else np.zeros(2)

    possible = np.empty((2, frames, world.size, world.size, 3), np.uint8)
    courses = ((shape, way, np.zeros(2)), (other_shape, other_way, leap))
    for video, (shown, direction, aside) in zip(possible, courses, strict=True):
        for k in range(frames):
            moved = scene.speed / world.fps * (k - (first - 1)) * direction
            video[k] = scene.picture(world, shown, _f32(moved + aside), _f32(moved / 2))
    possible = noisy(possible, world.noise, KeyedRng(seed, "impossible.noise", index))
    impossible = np.concatenate([possible[:, :first], possible[::-1, first:]], axis=1)
    return CrossedVideos(possible, impossible, event, label, first)


def _f32(place: np.ndarray) -> tuple[np.float32, np.float32]:
    return np.float32(place[0]), np.float32(place[1])
