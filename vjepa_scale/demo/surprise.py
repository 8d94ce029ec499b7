"""Does a model find impossible motion surprising? Videos that differ in nothing but an event (demo/impossible.py)."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch

from vjepa_scale.demo.impossible import EVENTS, CrossedVideos, render_impossible
from vjepa_scale.demo.synthetic import World
from vjepa_scale.inference.model import Model
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.init import initialise

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
    """``pairs_right``: how often the impossible videos surprise more than the possible ones.

    world:  that the model was trained on; default: make_synthetic.py's
    events: that the pairs have in turn
    A pair is two possible videos and the two impossible ones of the same pictures; what is compared is the sum of their
    mean surprises. Also the ``standard_error`` of the share, ``pairs``, ``by_kind``: the share of each event's pairs,
    ``by_maximum``: the share where the sums of the maxima are compared instead, and ``untrained``: ``pairs_right`` of
    the same networks before training: it is above 0.5, since features at a seam are odd whatever was predicted, so what
    training taught is the difference. Videos are rendered, and not compressed. Raises UserError where they are shorter
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
    """The same model with the weights that training begins with."""
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
    """The two possible and then the two impossible videos at the model's rate and size: [4, 3, T, H, W]."""
    numbers = np.arange(int(world.seconds * model.config.fps + 1e-6)) * world.fps / model.config.fps
    shown = np.floor(numbers + 1e-6).astype(int)  # the picture on screen at k/fps s, as in decoding
    return torch.cat([model.preprocess(video[shown]) for video in (*crossed.possible, *crossed.impossible)])
