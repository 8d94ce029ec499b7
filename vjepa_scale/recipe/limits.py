"""Limits of time whose defaults follow from others of the recipe, in seconds of turns (a suspended job does not age).

The order in which they end what hangs: decoding of a clip < a loader worker < a step < a collective. The earlier ones
name the cause; a collective's time-out only says that some rank did not come.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vjepa_scale.recipe.schema import Recipe

# Set-up, a phase's first step, a save and an evaluation may take as many times engine.timeout_s. Their collectives
# have their own time-out.
OUTSIDE_STEPS = 4


def step_limit_s(recipe: "Recipe", *, world_size: int) -> float:
    """Returns the limit of a step: ``guards.step_limit_s``, or one below ``engine.timeout_s``; 0: none.

    A single rank has no default: no collective of it can time out.
    """
    if recipe.guards.step_limit_s is None and world_size == 1:
        return 0.0
    return _step_s(recipe)


def _step_s(recipe: "Recipe") -> float:
    if recipe.guards.step_limit_s is not None:
        return recipe.guards.step_limit_s
    faults, timeout_s = recipe.data.faults, recipe.engine.timeout_s
    before_s = faults.decode_timeout_s if faults.item_timeout_s is None else faults.item_timeout_s
    return max(0.8 * timeout_s, (timeout_s + before_s) / 2)


def item_limit_s(recipe: "Recipe") -> float:
    """Returns the limit of a loader worker without progress: ``data.faults.item_timeout_s``, or one below a step's."""
    if recipe.data.faults.item_timeout_s is not None:
        return recipe.data.faults.item_timeout_s
    return (recipe.data.faults.decode_timeout_s + _step_s(recipe)) / 2


def outside_limit_s(recipe: "Recipe") -> float:
    """Returns the limit of what a rank does before and between steps."""
    return OUTSIDE_STEPS * recipe.engine.timeout_s


# What a limit that is not less than the next one costs.
_ORDER = {
    "data.faults.decode_timeout_s": "no clip would be replaced",
    "data.faults.item_timeout_s": "the loader worker that hangs would not be named",
    "guards.step_limit_s": "the other ranks would time out first, and their errors do not name the rank that hangs",
}


def check(recipe: "Recipe") -> None:
    """Raises ValueError if an earlier limit is not less than a later one. Defaults fit between those that are set."""
    faults = recipe.data.faults
    values = (faults.decode_timeout_s, faults.item_timeout_s, recipe.guards.step_limit_s)
    limits = [(name, seconds) for name, seconds in zip(_ORDER, values, strict=True) if seconds is not None]
    limits.append(("engine.timeout_s", recipe.engine.timeout_s))
    for number, ((name, seconds), (later, later_s)) in enumerate(pairwise(limits)):
        if seconds >= later_s:
            least = limits[number - 1][1] if number else 0
            most = limits[number + 2][1] if number + 2 < len(limits) else float("inf")
            works = [f"{name} between {least:g} and {later_s:g}"] if least < later_s else []
            works += [f"{later} between {seconds:g} and {most:g}"] if seconds < most < float("inf") else []
            works += [f"{later} above {seconds:g}"] if most == float("inf") else []
            raise ValueError(
                f"{name} {seconds:g} is not less than {later} {later_s:g}: {_ORDER[name]} "
                f"({', or '.join(works) or 'null for both'})"
            )
