"""Measures whether a model is surprised by impossible motion, with videos that differ only in an event.

In the synthetic world a sheet of equal shapes keeps its motion (synthetic.py). An event breaks this, and a model of the
world should not expect it. Two possible videos are cut at the same time and their ends exchanged, which gives two
impossible ones:

    reverse   the two move in opposite directions, and meet: after the exchange, the motion reverses
    turn      they move at right angles: the motion turns by 90°
    jump      the sheet of one is shifted by half its lattice's period: the sheet jumps
    shape     they show different shapes: one shape becomes the other
    vanish    one has only the background: the sheet vanishes, or appears

The possible and the impossible videos have the same beginnings and the same ends. So both are equally hard to predict,
except for the event. (Otherwise a bare background, for example, is easy to predict, and a vanishing sheet gives a
*smaller* error.) This follows IntPhys, arXiv 1803.07616, which compares the sums over two possible and two impossible
videos of the same objects.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.demo.synthetic import LABELS, MOTIONS, SHAPES, U8, Scene, World, noisy
from vjepa_scale.inference.model import Model
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.init import initialise

EVENTS = ("reverse", "turn", "jump", "shape", "vanish")


@dataclass(frozen=True)
class CrossedVideos:
    """possible, impossible: uint8 [2, T, size, size, 3]. Videos i of both are equal before frame ``first``.

    event: one of EVENTS; label: ``shape-motion``, of the first possible video
    """

    possible: U8
    impossible: U8
    event: str
    label: str
    first: int


def render_impossible(world: World, seed: int, index: int, events: Sequence[str] = EVENTS) -> CrossedVideos:
    """Renders pair ``index``, a function of the arguments. Events alternate, and labels within each event.

    The event is uniform in the middle third of the video. No scene occurs in ``render_clip``.
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
    # Shape, direction and shift of the second video's sheet. Both videos have the same position in the last frame
    # before the event.
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


# -- a model's surprise ----------------------------------------------------------------------------


PAIRS = 200


def surprise_of_pairs(
    model: Model,
    world: World | None = None,
    seed: int = 0,
    pairs: int = PAIRS,
    *,
    events: Sequence[str] = EVENTS,
    context_frames: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measures ``pairs_right``: the share of pairs whose impossible videos surprise more than the possible ones.

    world:  the world that the model was trained on; default: make_synthetic.py's
    events: events of the pairs, in turn

    A pair is two possible videos and the two impossible ones of the same pictures; the sums of their mean surprises are
    compared. Also returns ``standard_error`` of the share, ``pairs``, ``by_kind``: the share for each event,
    ``by_maximum``: the share by the sums of the maxima, and ``untrained``: ``pairs_right`` of the same networks before
    training. ``untrained`` is above 0.5, because features at a cut are unusual for any prediction; so the difference
    to it is the effect of training. Videos are rendered without compression. Raises UserError where they are shorter
    than the model's clips.
    """
    world = world or World()
    right: dict[str, list[bool]] = {event: [] for event in events}
    right_by_maximum, right_untrained = list[bool](), list[bool]()
    untrained = untrained_like(model)
    for index in range(pairs):
        crossed = render_impossible(world, seed, index, events)
        clips = clips_of(model, world, crossed)
        found = model.surprise(clips, context_frames=context_frames)
        right[crossed.event].append(_impossible_is_more(found.mean))
        right_by_maximum.append(_impossible_is_more(found.maximum))
        right_untrained.append(_impossible_is_more(untrained.surprise(clips, context_frames=context_frames).mean))
    every = [was for of_event in right.values() for was in of_event]
    share = float(np.mean(every))
    return {
        "pairs_right": share,
        "standard_error": float(np.sqrt(share * (1 - share) / pairs)),
        "pairs": pairs,
        "by_kind": {event: float(np.mean(was)) for event, was in right.items() if was},
        "by_maximum": float(np.mean(right_by_maximum)),
        "untrained": float(np.mean(right_untrained)),
    }


def untrained_like(model: Model, seed: int = 0) -> Model:
    """Returns the same model with initial weights."""
    untrained = copy(model)
    untrained.encoder = Encoder(model.config.model)
    untrained.predictor = Predictor(model.config.model)
    for name, network in (("encoder", untrained.encoder), ("predictor", untrained.predictor)):
        initialise(network, seed=seed, prefix=name)
        network.to(model.device, model.dtype).eval().requires_grad_(False)
    return untrained


def _impossible_is_more(surprises_4: torch.Tensor) -> bool:
    possible, impossible = surprises_4.double().view(2, 2).sum(1).tolist()
    return bool(impossible > possible)


def clips_of(model: Model, world: World, crossed: CrossedVideos) -> torch.Tensor:
    """Returns the two possible, then the two impossible videos at the model's rate and size: [4, 3, T, H, W]."""
    numbers = np.arange(int(world.seconds * model.config.fps + 1e-6)) * world.fps / model.config.fps
    shown = np.floor(numbers + 1e-6).astype(int)  # the picture on screen at k/fps s, as in decoding
    return torch.cat([model.preprocess(video[shown]) for video in (*crossed.possible, *crossed.impossible)])
