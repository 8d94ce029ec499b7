"""Finds, key by key, what a changed recipe contradicts of a stage's finished steps."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.networks import NETWORKS
from vjepa_scale.recipe.phases import Ramp


def recipe_changes(done: Stage, today: Stage, *, first: int, step: int, same_source: bool = False) -> list[str]:
    """Returns ``KEY: THEN then, NOW now`` for each changed value that the steps from ``first`` to ``step`` depend on.

    done: the stage by the recipe that trained these steps. Later steps may differ, and so may values that do not affect
          results.
    same_source: the stage's source is known to be the same, whatever the path in ``continue_from`` or ``init_from``
    """
    if done.kind != today.kind:
        return [f"{today.name}.kind: {done.kind} then, {today.kind} now"]
    # If either recipe schedules a value, its values at the trained steps are compared, not its constant.
    scheduled = _scheduled(done.phases_from(first)) | _scheduled(today.phases_from(first))
    decisive = _decisive(done, scheduled), _decisive(today, scheduled)
    if same_source:
        for values in decisive:
            del values[f"{today.name}.{today.starts_by}"]
    changed = list(_differences(*decisive))
    then, now = (_trained(stage, stage.phases_from(first), step, scheduled) for stage in (done, today))
    if list(then) != list(now):
        return [
            *changed,
            f"{today.name}.phases: {', '.join(then)} then, {', '.join(now)} now{_of_fractions(done, today)}",
        ]
    for steps in then:
        changed += _differences(then[steps], now[steps], f"{today.name} ({steps})")
    return changed


def _of_fractions(done: Stage, today: Stage) -> str:
    """Returns a hint if the phases have moved with the stage's length, because a recipe gives one as a fraction."""
    fractions = any(isinstance(phase.steps, float) for stage in (done, today) for phase in stage.config.phases)
    if done.config.steps == today.config.steps or not fractions:
        return ""
    return " (steps of a phase are a fraction of the stage's: give a number)"


def _scheduled(phases: list[Phase]) -> set[str]:
    """Returns which of ``weight_decay`` and ``ema_momentum`` have ramps."""
    ramps = {"weight_decay": phases[0].weight_decay_ramp, "ema_momentum": phases[0].ema_ramp}
    return {key for key, ramp in ramps.items() if ramp is not None}


def _decisive(stage: Stage, scheduled: set[str]) -> dict[str, Any]:
    """Returns the values that the results of all steps of a stage depend on, by the recipe's keys."""
    recipe, whole = stage.recipe, stage.recipe.model_dump(mode="json")
    data = {key: value for key, value in whole["data"].items() if key not in ("workers", "prefetch", "faults")}
    elsewhere = set(NETWORKS) - set(stage.networks)
    own = whole[stage.name]
    found = {
        **{f"{stage.name}.{word}": own[word] for word in ("continue_from", "init_from", "init_without")},
        "run": {"seed": recipe.run.seed},
        "engine": {"precision": recipe.engine.precision},
        "data": data | {"sets": stage.data_sets},  # names only: identities and mixtures are compared elsewhere
        "model": {key: value for key, value in whole["model"].items() if key not in elsewhere},
        "optimizer": stage.optimizer.model_dump(mode="json"),
        **stage.decisive(),
    }
    for section, key in (("optimizer", "weight_decay"), ("jepa", "ema_momentum")):
        if key in scheduled and section in found:
            found[section] = {name: value for name, value in found[section].items() if name != key}
    return found


def _trained(stage: Stage, phases: list[Phase], step: int, scheduled: set[str]) -> dict[str, dict[str, Any]]:
    """Returns the values of the steps before ``step``: a section ``steps FIRST to LAST`` for each phase."""
    recipe = stage.recipe
    out: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if phase.first >= step:
            break
        last = min(phase.end, step) - 1
        out[f"steps {phase.first} to {last}"] = {
            **_values("lr", phase.lr_ramp, phase.lr, phase.first, last),
            **_scheduled_values(stage, phase, last, scheduled),
            "clip.frames": phase.frames,
            "clip.size": list(phase.size),
            "global_batch": phase.global_batch,
            "mixture": phase.mixture,
            "frames of their own": phase.own_frames,
            "fps of their own": {
                name: fps for name in phase.mixture if (fps := recipe.data.fps_of(name)) != recipe.data.fps
            },
        }
    return out


def _scheduled_values(stage: Stage, phase: Phase, last: int, scheduled: set[str]) -> dict[str, Any]:
    """Returns the values that are in ``scheduled``, also if this recipe has a constant."""
    out: dict[str, Any] = {}
    if "weight_decay" in scheduled:
        constant = stage.optimizer.weight_decay
        ramp = phase.weight_decay_ramp or Ramp(constant, constant, phase.first, phase.steps)
        out |= _values("weight_decay", ramp, lambda step: ramp.after(step - ramp.first + 1), phase.first, last)
    if "ema_momentum" in scheduled:
        momentum = stage.recipe.jepa.ema_momentum
        ema = phase.ema_ramp or Ramp(momentum, momentum, phase.first, phase.steps)
        out |= _values("ema_momentum", ema, lambda step: ema.after(step - ema.first), phase.first, last)
    return out


def _values(name: str, ramp: Ramp, value_at: Callable[[int], float], first: int, last: int) -> dict[str, Any]:
    """Returns the values at two steps and the shape, which determine all values between them."""
    values = {f"{name} at step {step}": value_at(step) for step in (first, last)}
    bent = last > first and ramp.start != ramp.final
    return {**values, f"{name}'s shape": ramp.shape if bent else "linear"}


def _differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yields ``KEY: THEN then, NOW now`` for every value that differs, at the deepest key."""
    then_parts, now_parts = _parts(then), _parts(now)
    if then_parts and list(then_parts) == list(now_parts):
        for name in then_parts:
            yield from _differences(then_parts[name], now_parts[name], f"{key}.{name}" if key else name)
    elif then != now or then_parts:  # with parts: of other names, or in another order
        yield f"{key}: {_shown(then)} then, {_shown(now)} now"


def _parts(value: Any) -> dict[Any, Any]:
    """Returns the parts of a value: keys of a section, items of a list of sections."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return f"{len(value)} item{'s' * (len(value) != 1)}"
    if isinstance(value, float):
        return f"{value:.12g}"  # without rounding errors in the last digits
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
