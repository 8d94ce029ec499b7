"""Worlds whose energy is a formula, so that the best actions are known."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vjepa_scale.data.poses import states_along
from vjepa_scale.planning.cem import Imagined


@dataclass
class Bowl:
    """Energy: how far the first action is from the episode's best one, squared; and the later ones from none.

    best: [B, 7]; calls: how many sequences each call had
    """

    best: Tensor
    calls: list[int] = field(default_factory=list)

    def __call__(self, states: Tensor, actions: Tensor, episodes: Tensor) -> Imagined:
        self.calls.append(len(actions))
        assert len(states) == len(actions) == len(episodes)
        apart = (actions[:, 0] - self.best[episodes]).square().sum(1) + actions[:, 1:].square().sum((1, 2))
        along = states_along(states, actions)
        return Imagined(apart, along[:, 1:, None].clone(), along)


@dataclass
class Reach:
    """A frame is one token, the hand's position and grip; the energy is how far the last frame is from the goal [B, 4].

    Frames on the way do not count.
    """

    goal: Tensor

    def __call__(self, states: Tensor, actions: Tensor, episodes: Tensor) -> Imagined:
        along = states_along(states, actions)
        frames = along[:, 1:, None, [0, 1, 2, 6]]
        energy = (frames[:, -1, 0] - self.goal[episodes]).abs().mean(1)
        return Imagined(energy, frames, along)


def some_states(count: int, seed: int = 0) -> Tensor:
    """[count, 7] float32, gripper half closed."""
    states = 0.3 * torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))
    states[:, 6] = 0.5
    return states
