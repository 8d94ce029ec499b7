"""Plans a robot's actions towards a goal picture with a world model.

>>> world = vjepa_scale.load_world_model("DIR")
>>> plan = world.plan("now.png", state, "goal.png")

``world`` is the model, ``cem`` the planner, independent of the network, ``landscape`` plots the energies.
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
