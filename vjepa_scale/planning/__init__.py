"""From where a robot is to where it should be: actions that bring the imagined picture closest to a goal's.

>>> world = vjepa_scale.load_world_model("DIR")
>>> plan = world.plan("now.png", state, "goal.png")

``world`` is the model, ``cem`` the planner, which knows no network, ``landscape`` a picture of what it looks at.
"""

from vjepa_scale.planning.cem import Plan, PlanConfig, cross_entropy_plan
from vjepa_scale.planning.landscape import Landscape, check_landscape, draw_landscape
from vjepa_scale.planning.world import WorldModel, load_world_model

__all__ = [
    "Landscape",
    "Plan",
    "PlanConfig",
    "WorldModel",
    "check_landscape",
    "cross_entropy_plan",
    "draw_landscape",
    "load_world_model",
]
