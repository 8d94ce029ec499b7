"""The cross-entropy method: draw action sequences, keep those that end nearest to the goal, draw around them again.

method.md 9; V-JEPA 2 paper, section 3.2. Independent of the network: ``imagine`` predicts what a sequence leads to.
Letters: B episodes, S samples, H steps ahead, C sequences of one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.poses import GRIPPER


@dataclass(frozen=True)
class PlanConfig:
    """How to plan; the defaults are the published setting.

    samples, elites, iterations: sequences drawn and kept per iteration, and number of iterations; horizon: H
    max_translation_m, max_rotation_rad, max_gripper: largest absolute value of the numbers of an action
    momentum_mean, momentum_std: weight of the old mean and deviation in the new ones
    still_gripper: a planned gripper motion below this is set to 0
    """

    samples: int = 400
    elites: int = 10
    iterations: int = 10
    horizon: int = 2
    max_translation_m: float = 0.05
    max_rotation_rad: float = 0.0
    max_gripper: float = 0.75
    momentum_mean: float = 0.15
    momentum_std: float = 0.15
    still_gripper: float = 0.25

    def __post_init__(self) -> None:
        wrong = {
            "elites": ("between 2 and samples", not 2 <= self.elites <= self.samples),
            "iterations": ("at least 1", self.iterations < 1),
            "horizon": ("at least 1", self.horizon < 1),
            "max_translation_m": ("at least 0", not self.max_translation_m >= 0),
            "max_rotation_rad": ("between 0 and 1.5", not 0 <= self.max_rotation_rad <= 1.5),
            "max_gripper": ("between 0 and 1", not 0 <= self.max_gripper <= 1),
            "momentum_mean": ("at least 0 and below 1", not 0 <= self.momentum_mean < 1),
            "momentum_std": ("at least 0 and below 1", not 0 <= self.momentum_std < 1),
            "still_gripper": ("at least 0", not self.still_gripper >= 0),
        }
        for name, (right, is_wrong) in wrong.items():
            if is_wrong:
                raise UserError(f"{getattr(self, name)!r} does not plan", where=f"plan.{name}", fix=right)

    @property
    def limits(self) -> list[float]:
        """Largest absolute values of the 7 numbers of an action."""
        return 3 * [self.max_translation_m] + 3 * [self.max_rotation_rad] + [self.max_gripper]

    @property
    def first_std(self) -> list[float]:
        """Standard deviations of the first draws: as published, the limits, but for the gripper wider and clipped."""
        return 3 * [self.max_translation_m] + 3 * [self.max_rotation_rad] + [1.0]


class Imagined(NamedTuple):
    """Predicted outcome of action sequences.

    energy: [C], the distance of the last frame from the goal; tokens: [C, H, N, D]; states: [C, H+1, 7]
    """

    energy: Tensor
    tokens: Tensor
    states: Tensor


class Imagine(Protocol):
    """A world: a model, or a formula."""

    def __call__(self, states_C7: Tensor, actions_CH7: Tensor, episodes_C: Tensor, /) -> Imagined:
        """Predicts the outcome of actions from states. episodes_C: int64, below B, selects pictures and goals

        Poses follow ``data.poses.advance`` from step to step.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """A plan for B episodes.

    actions:  [B, H, 7], the final mean, with the gripper rule applied
    energy:   [B], tokens: [B, H, N, D], states: [B, H+1, 7], predicted for these actions
    energies: [B, iterations, samples], of all drawn sequences
    """

    actions: Tensor
    energy: Tensor
    tokens: Tensor
    states: Tensor
    energies: Tensor


@torch.no_grad()
def cross_entropy_plan(
    imagine: Imagine, states_B7: Tensor, config: PlanConfig, *, seed: int | Sequence[int], rows: int = 1024
) -> Plan:
    """Plans B independent episodes at once.

    states_B7: first state of each
    seed:      equal seeds give equal plans; a sequence has one seed per episode, a single seed gives all the same draws
    rows:      sequences per call of ``imagine``, which bounds its memory
    Raises UserError where an energy is not a number.
    """
    episodes, samples, horizon = len(states_B7), config.samples, config.horizon
    seeds = [seed] * episodes if isinstance(seed, int) else list(seed)
    assert len(seeds) == episodes, f"{len(seeds)} seeds for {episodes} episodes"
    limits = states_B7.new_tensor(config.limits)
    mean = states_B7.new_zeros(episodes, horizon, 7)
    std = states_B7.new_tensor(config.first_std).expand_as(mean)
    energies = []
    for iteration in range(config.iterations):
        noise = _noise(seeds, iteration, samples, horizon).to(states_B7)
        drawn = (mean[:, None] + std[:, None] * noise).clamp(-limits, limits)
        energies.append(_energies(imagine, states_B7, drawn, rows))
        best = energies[-1].topk(config.elites, dim=1, largest=False).indices
        elites = drawn.gather(1, best[:, :, None, None].expand(-1, -1, horizon, 7))
        mean = config.momentum_mean * mean + (1 - config.momentum_mean) * elites.mean(1)
        std = config.momentum_std * std + (1 - config.momentum_std) * elites.std(1)
    gripper = mean[..., GRIPPER]
    mean[..., GRIPPER] = torch.where(gripper.abs() < config.still_gripper, 0.0, gripper)
    every = torch.arange(episodes, device=states_B7.device)
    parts = [imagine(states_B7[some], mean[some], some) for some in every.split(rows)]
    energy, tokens, states = (torch.cat(list(field)) for field in zip(*parts, strict=True))
    _check_finite(energy[:, None])
    return Plan(mean, energy, tokens, states, torch.stack(energies, 1))


def _energies(imagine: Imagine, states_B7: Tensor, drawn_BSH7: Tensor, rows: int) -> Tensor:
    """Returns energies [B, S]. Raises UserError where one is not a number."""
    episodes, samples = drawn_BSH7.shape[:2]
    episode = torch.arange(episodes, device=states_B7.device).repeat_interleave(samples)
    parts = [
        imagine(states_B7[some], actions, some).energy
        for some, actions in zip(episode.split(rows), drawn_BSH7.flatten(0, 1).split(rows), strict=True)
    ]
    energies = torch.cat(parts).unflatten(0, (episodes, samples))
    _check_finite(energies)
    return energies


def _check_finite(energies_BS: Tensor) -> None:
    if not energies_BS.isfinite().all():
        episode = int((~energies_BS.isfinite()).nonzero()[0, 0])
        raise UserError(
            "the energy of what is imagined is not a number",
            where=f"planning, episode {episode}",
            fix="give finite pictures and states, and a sound checkpoint",
        )


def _noise(seeds: Sequence[int], iteration: int, samples: int, horizon: int) -> Tensor:
    """Returns normal draws, float64 [B, S, H, 7]; the first samples do not depend on the number of samples."""
    own = {seed: _normals(KeyedRng(seed, "plan", iteration), samples * horizon * 7) for seed in set(seeds)}
    return torch.from_numpy(np.stack([own[seed] for seed in seeds])).reshape(-1, samples, horizon, 7)


def _normals(draws: KeyedRng, count: int) -> np.ndarray:
    """Returns independent normal numbers, by the Box-Muller method."""
    radius_angle = draws.uniforms(count + count % 2).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log1p(-radius_angle[:, 0]))
    angle = 2 * np.pi * radius_angle[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]
