"""surprise_of_pairs: which videos it compares, and which way round."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.checkpoint import FPS, SIZE, write_checkpoint
from vjepa_scale import load_model
from vjepa_scale.core.errors import UserError
from vjepa_scale.demo.surprise import EVENTS, clips_of, render_impossible, surprise_of_pairs, untrained_like
from vjepa_scale.demo.synthetic import World
from vjepa_scale.inference.model import Model
from vjepa_scale.model import Encoder
from vjepa_scale.model.init import initialise

WORLD = World(size=SIZE, fps=8, seconds=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_checkpoint(tmp_path_factory.mktemp("consolidated")))


def test_shares_are_counts_of_pairs(model: Model) -> None:
    found = surprise_of_pairs(model, WORLD, seed=2, pairs=10)
    right: dict[str, list[bool]] = {}
    right_by_maximum = []
    for index in range(10):
        crossed = render_impossible(WORLD, 2, index)
        # Pictures on screen at k/5 s, of a video at 8 per second.
        shown = [int(k * 8 / FPS + 1e-9) for k in range(10)]
        possible, impossible = (
            [model.surprise(model.preprocess(video[shown])).windows[0] for video in videos]
            for videos in (crossed.possible, crossed.impossible)
        )
        by_mean, by_maximum = (
            sum(f(w).item() for w in impossible) > sum(f(w).item() for w in possible) for f in (torch.mean, torch.max)
        )
        right.setdefault(crossed.event, []).append(by_mean)
        right_by_maximum.append(by_maximum)
    share = np.mean([was for of_event in right.values() for was in of_event])
    assert found["pairs"] == 10
    assert found["pairs_right"] == share
    assert found["standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / 10))
    assert found["by_kind"] == {event: np.mean(was) for event, was in right.items()}
    assert found["by_maximum"] == np.mean(right_by_maximum)
    assert list(found["by_kind"]) == list(EVENTS)


@pytest.mark.parametrize(("sign", "share"), [(1, 1.0), (-1, 0.0), (0, 0.0)])
def test_right_is_the_higher_surprise_of_the_impossible(
    model: Model, monkeypatch: pytest.MonkeyPatch, sign: int, share: float
) -> None:
    """A score that knows: whether a video is one of the first two."""

    class Known:
        def __init__(self, clips: torch.Tensor) -> None:
            whole = [(clip == other).all() for clip in clips for other in clips[:2]]
            self.mean = self.maximum = sign * (1 - torch.tensor(whole).view(4, 2).any(1).float())

    monkeypatch.setattr(Model, "surprise", lambda _, clips, **settings: Known(clips))
    found: dict[str, Any] = surprise_of_pairs(model, WORLD, pairs=5)
    assert (found["pairs_right"], found["by_maximum"], found["untrained"]) == (share, share, share)
    assert found["by_kind"] == dict.fromkeys(EVENTS, share)


def test_videos_shorter_than_a_clip_are_refused(model: Model) -> None:
    world = World(size=SIZE, fps=8, seconds=1.0)
    assert clips_of(model, world, render_impossible(world, 0, 0)).shape == (4, 3, 5, SIZE, SIZE)
    with pytest.raises(UserError, match="a video of 5 frames, a window of 8"):
        surprise_of_pairs(model, world, pairs=1)


def test_the_untrained_one_is_what_the_recipes_seed_makes(model: Model) -> None:
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    untrained = untrained_like(model, seed=4)
    fresh = Encoder(model.config.model)
    initialise(fresh, seed=4, prefix="encoder")
    for name, value in untrained.encoder.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    assert all(not token.any() for token in untrained.predictor.mask_tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    clips = clips_of(model, WORLD, render_impossible(WORLD, 2, 0))
    assert not torch.equal(untrained.surprise(clips).mean, model.surprise(clips).mean)
