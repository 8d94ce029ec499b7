"""Masks of whole time steps. Their number is drawn per training step, so no list is truncated:

    future         |c c c c T T T T|  the first part predicts the rest
    frame_dropout  |c T T c c T c T|  steps drawn per clip are predicted from the others
    multi_rate     |c c c T T . T .|  steps_ahead 1, 2, 4 from the last context step; the dots are neither

A time step is ``model.tubelet`` frames. multi_rate predicts all distances of a clip in one pass, with equal weights. So
distant steps weigh more than in ``future``, which has more near ones. Steps that are neither context nor target cost
the encoder and the predictor nothing.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.masking.generator import Grid, Mask, MaskGenerator, SectionT, random_ranks, subset
from vjepa_scale.recipe.mask_sections import MaskSection
from vjepa_scale.recipe.sections import PositiveInt, ShareRange

_CONTEXT_SHARE = Field(
    (0.5, 0.5),
    description="future, multi_rate: share of time that is context, from the start; of a range, drawn per step",
)


class FutureMasksConfig(MaskSection):
    """The first part of a clip predicts the rest."""

    kind: Literal["future"]
    context_share: ShareRange = _CONTEXT_SHARE


class FrameDropoutMasksConfig(MaskSection):
    """Whole time steps, drawn per clip, are predicted from the others."""

    kind: Literal["frame_dropout"]
    dropped_share: ShareRange = Field(
        (0.5, 0.5), description="frame_dropout: share of time that is predicted; of a range, drawn per step"
    )


class MultiRateMasksConfig(MaskSection):
    """The first part of a clip predicts single time steps at several distances after it."""

    kind: Literal["multi_rate"]
    context_share: ShareRange = _CONTEXT_SHARE
    steps_ahead: tuple[PositiveInt, ...] = Field(
        (1, 2, 4),
        min_length=1,
        description="multi_rate: the time steps that are predicted, counted from the last one of the context",
    )

    @model_validator(mode="after")
    def _each_once(self) -> "MultiRateMasksConfig":
        if list(self.steps_ahead) != sorted(set(self.steps_ahead)):
            raise ValueError(f"steps_ahead must go up, not {list(self.steps_ahead)}")
        return self


class _FrameMasks(MaskGenerator[SectionT]):
    """Every row has the same number of True, which is the same on all ranks and in all mask groups of a step."""

    def draw(self, grid: Grid, *, seed: int, step: int, slots: range, group: range) -> tuple[Mask, Mask]:
        self.check(grid)
        t, h, w = grid
        u = KeyedRng(seed, "mask.frames", step, self.number).uniform()
        context_BT, target_BT = self._time_steps(t, u, seed=seed, step=step, slots=slots)
        return np.repeat(context_BT, h * w, axis=1), np.repeat(target_BT, h * w, axis=1)

    def check(self, grid: Grid) -> None:
        """Raises UserError naming ``masks.generators.N`` where a clip has too few time steps for context and target."""
        reach = self._reach()
        if grid[0] <= reach:
            raise UserError(
                f"a {self.config.kind} mask takes {reach + 1} time steps at least, a clip has {grid[0]} "
                f"(grid {'×'.join(map(str, grid))}: time × height × width)",
                where=f"masks.generators.{self.number}",
                fix="longer clips" + (", or smaller steps_ahead" if reach > 1 else ", or kind: blocks"),
            )

    def _reach(self) -> int:
        """Returns how many time steps must remain after the context."""
        return 1

    @abstractmethod
    def _time_steps(self, t: int, u: float, *, seed: int, step: int, slots: range) -> tuple[Mask, Mask]:
        """Returns context and target time steps of each slot: bool [slots, t] each.

        u: the step's draw in [0, 1): the position of the share in the configured range
        """


class FutureMasks(_FrameMasks[FutureMasksConfig]):
    """kind: future"""

    section = FutureMasksConfig

    def _time_steps(self, t: int, u: float, *, seed: int, step: int, slots: range) -> tuple[Mask, Mask]:
        steps = _steps(self.config.context_share, u, t, most=t - 1)
        context_BT = np.broadcast_to(np.arange(t) < steps, (len(slots), t))
        return context_BT, ~context_BT

    @classmethod
    def hides_future(cls, entry: Mapping[str, Any]) -> bool:
        return True


class FrameDropoutMasks(_FrameMasks[FrameDropoutMasksConfig]):
    """kind: frame_dropout"""

    section = FrameDropoutMasksConfig

    def _time_steps(self, t: int, u: float, *, seed: int, step: int, slots: range) -> tuple[Mask, Mask]:
        steps = _steps(self.config.dropped_share, u, t, most=t - 1)
        everything = np.ones((len(slots), t), np.bool_)
        target_BT = subset(everything, steps, random_ranks(seed, step, self.number, slots, t))
        return ~target_BT, target_BT


class MultiRateMasks(_FrameMasks[MultiRateMasksConfig]):
    """kind: multi_rate"""

    section = MultiRateMasksConfig

    def _reach(self) -> int:
        return max(self.config.steps_ahead)

    def _time_steps(self, t: int, u: float, *, seed: int, step: int, slots: range) -> tuple[Mask, Mask]:
        steps = _steps(self.config.context_share, u, t, most=t - self._reach())
        context_T = np.arange(t) < steps
        target_T = np.isin(np.arange(t) - (steps - 1), self.config.steps_ahead)
        return np.broadcast_to(context_T, (len(slots), t)), np.broadcast_to(target_T, (len(slots), t))

    @classmethod
    def hides_future(cls, entry: Mapping[str, Any]) -> bool:
        return True


def _steps(share: tuple[float, float], u: float, t: int, *, most: int) -> int:
    """Returns the number of time steps at the draw u in [0, 1) of the share, rounded, between 1 and ``most``."""
    drawn = share[0] + (share[1] - share[0]) * u
    return min(max(1, int(drawn * t + 0.5)), most)
