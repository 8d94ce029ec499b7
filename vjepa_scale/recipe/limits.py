"""Limits of time whose defaults follow from others of the recipe, in seconds of turns (a suspended job does not age).

The order in which they end what hangs: decoding of a clip < a loader worker < a step < a collective. The earlier ones
name the cause; a collective's time-out only says that some rank did not come.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vjepa_scale.recipe.schema import Recipe

# Set-up, a phase's first step, a save and an evaluation may take as many times engine.timeout_s. Their collectives
# have their own time-out.
OUTSIDE_STEPS = 4


def step_limit_s(recipe: "Recipe") -> float:
    """Returns the limit of a step: ``guards.step_limit_s``, or one below ``engine.timeout_s``."""
    if recipe.guards.step_limit_s is not None:
        return recipe.guards.step_limit_s
    timeout_s = recipe.engine.timeout_s
    return max(0.8 * timeout_s, (timeout_s + recipe.data.faults.decode_timeout_s) / 2)


def item_limit_s(recipe: "Recipe") -> float:
    """Returns the limit of a loader worker without progress: ``data.faults.item_timeout_s``, or one below a step's."""
    if recipe.data.faults.item_timeout_s is not None:
        return recipe.data.faults.item_timeout_s
    decode_s, step_s = recipe.data.faults.decode_timeout_s, step_limit_s(recipe)
    return (decode_s + step_s) / 2 if decode_s < step_s else step_s


def outside_limit_s(recipe: "Recipe") -> float:
    """Returns the limit of what a rank does before and between steps."""
    return OUTSIDE_STEPS * recipe.engine.timeout_s


def check(recipe: "Recipe") -> None:
    """Raises ValueError if an earlier limit is not less than a later one."""
    faults, timeout_s = recipe.data.faults, recipe.engine.timeout_s
    decode_s, item_s = faults.decode_timeout_s, faults.item_timeout_s
    if decode_s >= timeout_s:
        raise ValueError(
            f"data.faults.decode_timeout_s {decode_s:g} is not less than engine.timeout_s {timeout_s}: "
            "the other ranks would time out before the clip is replaced"
        )
    for name, seconds in (("guards.step_limit_s", recipe.guards.step_limit_s), ("data.faults.item_timeout_s", item_s)):
        if seconds is not None and seconds >= timeout_s:
            raise ValueError(
                f"{name} {seconds:g} is not less than engine.timeout_s {timeout_s}: the other ranks would time out "
                "first, and their errors do not name the rank that hangs"
            )
    if item_s is not None and item_s <= decode_s:
        raise ValueError(
            f"data.faults.item_timeout_s {item_s:g} is not more than data.faults.decode_timeout_s {decode_s:g}: no "
            "clip would be replaced"
        )
