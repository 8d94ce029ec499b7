"""Resolves a stage's keys for weight decay and EMA momentum to a ramp for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.phases import Phase, Ramp
from vjepa_scale.recipe.stage_sections import Horizon, RampConfig

if TYPE_CHECKING:
    from vjepa_scale.recipe.stage import Stage


def in_steps(horizon: Horizon, covered: int) -> int:
    """Returns a horizon in steps. An integer counts steps; a float is a multiple of the steps that the ramp covers."""
    return horizon if isinstance(horizon, int) else max(1, round(horizon * covered))


class Schedule:
    """One value over the phases of a stage. Call ``of_phase`` for each phase, in their order.

    of_stage:  the ramp over the whole stage, if the stage has one
    value:     the value before the stage
    scheduled: whether the stage or one of its phases has a schedule; otherwise every phase gets None
    """

    def __init__(self, of_stage: Ramp | None, value: float, *, scheduled: bool) -> None:
        self._of_stage, self._value, self._scheduled = of_stage, value, scheduled

    def of_phase(self, given: RampConfig | None, first: int, steps: int) -> Ramp | None:
        """Returns the ramp of a phase: its own, else the stage's, else a constant at the last value before it."""
        if not self._scheduled:
            return None
        if given is not None:
            ramp = _ramp(given, self._value, first, steps)
        else:
            ramp = self._of_stage or Ramp(self._value, self._value, first, steps)
        self._value = ramp.after(first + steps - ramp.first)
        return ramp


def schedules_of(stage: Stage, first: int) -> tuple[Schedule, Schedule]:
    """Returns the schedules of weight decay and EMA momentum. first: the stage's first step

    A stage that continues from a stage of the recipe starts at the last value of that stage's schedule. If it has its
    own ``optimizer`` section, it starts at that section's weight decay.
    """
    config = stage.config
    before = stage.earlier.get(str(config.continue_from))
    last = None if before is None else before.phases[-1]
    decay = None if last is None or config.optimizer else last.weight_decay_ramp
    momentum = None if last is None else last.ema_ramp

    def schedule(key: str, constant: float, inherited: Ramp | None) -> Schedule:
        given: RampConfig | None = getattr(config, key)
        value = constant
        if last is not None and inherited is not None:
            value = inherited.after(last.end - inherited.first)
        of_stage = None if given is None else _ramp(given, value, first, config.steps)
        says = given is not None or inherited is not None
        return Schedule(of_stage, value, scheduled=says or any(getattr(phase, key) for phase in config.phases))

    return (
        schedule("weight_decay", stage.optimizer.weight_decay, decay),
        schedule("ema_momentum", stage.recipe.jepa.ema_momentum, momentum),
    )


def scheduled_after(stage: Stage, *, first: int, step: int) -> dict[str, float]:
    """The values at which the schedules of a stage that began at step ``first`` stand after ``step`` completed steps.

    Only of what is scheduled: ``weight_decay``, ``ema_momentum``.
    """
    phases = stage.phases_from(first)
    phase = next((phase for phase in phases if phase.first < step <= phase.end), phases[0])
    ramps = {"weight_decay": phase.weight_decay_ramp, "ema_momentum": phase.ema_ramp}
    return {key: ramp.after(step - ramp.first) for key, ramp in ramps.items() if ramp is not None}


def _ramp(given: RampConfig, value: float, first: int, steps: int) -> Ramp:
    """value: the start, if the section has none"""
    start = value if given.start is None else given.start
    horizon = steps if given.horizon is None else in_steps(given.horizon, steps)
    return Ramp(start, given.final, first, horizon, given.shape)


def peak_weight_decay(phases: Sequence[Phase]) -> float | None:
    """Returns an upper bound of the scheduled weight decay of some phases; None if none is scheduled."""
    ramps = [phase.weight_decay_ramp for phase in phases if phase.weight_decay_ramp is not None]
    return max((max(ramp.start, ramp.final) for ramp in ramps), default=None)


def check_schedules(stage: Stage, key: str) -> None:
    """Raises UserError for a schedule of a value that the stage does not have. key: the stage's key in errors"""
    places = {key: stage.config} | {f"{key}.phases.{n}": phase for n, phase in enumerate(stage.config.phases)}
    for place, given in places.items():
        if given.ema_momentum is not None and not stage.has_target_encoder:
            raise UserError(
                f"a stage of kind {stage.kind} has no target encoder", where=f"{place}.ema_momentum", fix="leave it out"
            )
        if given.weight_decay is not None and stage.trains_probes:
            raise UserError(
                "each probe has a constant weight decay of its own",
                where=f"{place}.weight_decay",
                fix=f"{stage.name}.weight_decays",
            )
