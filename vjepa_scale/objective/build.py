"""The objective of each stage."""

from collections.abc import Mapping

from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.selection import task_classes
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.objective.action import ActionConditioned
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.objective.objective import Objective
from vjepa_scale.objective.probe import Probes
from vjepa_scale.recipe import Recipe


def build_objective(recipe: Recipe, stage_name: str, engine: Engine, manifests: Mapping[str, Manifest]) -> Objective:
    """With fresh networks. manifests: of the stage's data sets"""
    if stage_name == "action":
        return ActionConditioned(recipe, engine)
    if stage_name == "probe":
        return Probes(recipe, engine, classes=task_classes(recipe, manifests))
    return Jepa(recipe, engine)
